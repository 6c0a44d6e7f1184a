//! The optional CUDA half of libtorch.
//!
//! Programs link libtorch's CPU library only. Where a GPU is wanted, `libtorch_cuda.so` of an installation of the very same
//! build is loaded before the first operation; it registers its kernels with the libtorch that is linked, and brings cuBLAS,
//! cuDNN and the rest by its own path. One program serves hosts with and without a GPU.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

/// Variable that names the folder with `libtorch_cuda.so`.
pub const LIBTORCH_DIR_VARIABLE: &str = "GRAIL_LIBTORCH_DIR";

/// The build that this program is linked with; another build's kernels would not fit.
pub const BUILD: &str = "2.11.0+cu130";

/// As package indexes name it, whose wheels for Linux are this build.
const RELEASE: &str = "2.11.0";

const LIBRARY: &str = "libtorch_cuda.so";
/// An interpreter on a network file system may take seconds; longer means that it hangs.
const PYTHON_TIMEOUT: Duration = Duration::from_secs(20);
/// Prints torch's folder, or nothing; `find_spec` of a top-level package does not import it.
const FIND_TORCH: &str = "import importlib.util as u; s = u.find_spec('torch'); \
                          print((s and s.submodule_search_locations or [''])[0])";

/// Who named the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// [`LIBTORCH_DIR_VARIABLE`].
    Configured,
    /// The torch of `python3` on the path.
    Python,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Configured => LIBTORCH_DIR_VARIABLE,
            Self::Python => "python3's torch",
        })
    }
}

/// What came of looking for the CUDA library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GpuSupport {
    /// It is loaded. `devices` GPUs are visible; none without a driver.
    Loaded { library: PathBuf, origin: Origin, devices: usize },
    /// None is configured and Python has none: a CPU host.
    Absent { reason: String },
    /// None is configured, and Python did not say in time.
    Unanswered { reason: String },
    /// One was found but must not or cannot be loaded.
    Refused { library: PathBuf, origin: Origin, reason: String },
}

impl GpuSupport {
    /// Number of GPUs that can be used.
    #[must_use]
    pub const fn devices(&self) -> usize {
        match self {
            Self::Loaded { devices, .. } => *devices,
            Self::Absent { .. } | Self::Unanswered { .. } | Self::Refused { .. } => 0,
        }
    }

    /// Whether a later start may find more: a driver that is not up yet shows no device, and a cold file system makes Python slow.
    #[must_use]
    pub const fn may_change(&self) -> bool {
        matches!(self, Self::Loaded { devices: 0, .. } | Self::Unanswered { .. })
    }

    /// What to do about a GPU that is wanted and cannot be had.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Loaded { devices: 0, .. } => {
                "is the driver up, and does CUDA_VISIBLE_DEVICES show a GPU? `nvidia-smi -L` lists them".to_owned()
            }
            Self::Loaded { .. } => "choose one of these, or show another in CUDA_VISIBLE_DEVICES".to_owned(),
            Self::Absent { .. } | Self::Unanswered { .. } | Self::Refused { .. } => format!(
                "`python3 -m pip install torch=={RELEASE}` for the python3 on the PATH, or set {LIBTORCH_DIR_VARIABLE} to the \
                 torch/lib of torch {BUILD}"
            ),
        }
    }
}

impl fmt::Display for GpuSupport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loaded { library, origin, devices } => {
                write!(f, "{} from {origin}, {devices} devices", library.display())
            }
            Self::Absent { reason } | Self::Unanswered { reason } => write!(f, "no CUDA library: {reason}"),
            Self::Refused { library, origin, reason } => {
                write!(f, "{} from {origin} is refused: {reason}", library.display())
            }
        }
    }
}

/// Looks for the CUDA library and loads it, once in a process; later calls return the first answer.
///
/// The folder is that of [`LIBTORCH_DIR_VARIABLE`] if set, and then no other is tried; else the one of Python's torch.
pub fn enable() -> &'static GpuSupport {
    static SUPPORT: OnceLock<GpuSupport> = OnceLock::new();
    SUPPORT.get_or_init(|| {
        let configured = std::env::var_os(LIBTORCH_DIR_VARIABLE).filter(|folder| !folder.is_empty()).map(PathBuf::from);
        let support = locate(configured, Path::new("python3")).map_or_else(|none| none, load);
        match &support {
            GpuSupport::Loaded { library, origin, devices } => {
                tracing::info!(library = %library.display(), %origin, devices, "CUDA library loaded.");
            }
            GpuSupport::Absent { reason } | GpuSupport::Unanswered { reason } => {
                tracing::info!(reason, "No CUDA library.");
            }
            GpuSupport::Refused { library, origin, reason } => {
                tracing::warn!(library = %library.display(), %origin, reason, "CUDA library refused.");
            }
        }
        support
    })
}

/// A library that is there, and of the right build.
#[derive(Debug, PartialEq, Eq)]
struct Located {
    library: PathBuf,
    origin: Origin,
}

fn locate(configured: Option<PathBuf>, python: &Path) -> Result<Located, GpuSupport> {
    let (folder, origin) = match configured {
        Some(folder) => (folder, Origin::Configured),
        None => match torch_of(python) {
            Ok(torch) => (torch.join("lib"), Origin::Python),
            Err(none) => return Err(none),
        },
    };
    let library = folder.join(LIBRARY);
    if !library.exists() {
        return Err(match origin {
            Origin::Configured => GpuSupport::Refused { library, origin, reason: "the file does not exist".to_owned() },
            Origin::Python => GpuSupport::Absent { reason: format!("python3's torch has no {}", library.display()) },
        });
    }
    match build_of(&folder) {
        Ok(build) if build == BUILD => Ok(Located { library, origin }),
        Ok(build) => {
            let reason = format!("it is of torch {build}, and this program is linked with {BUILD}");
            Err(GpuSupport::Refused { library, origin, reason })
        }
        Err(reason) => Err(GpuSupport::Refused { library, origin, reason }),
    }
}

fn load(Located { library, origin }: Located) -> GpuSupport {
    match crate::ffi::load_globally(&library) {
        Ok(()) => {
            let devices = usize::try_from(tch::Cuda::device_count()).unwrap_or_default();
            GpuSupport::Loaded { library, origin, devices }
        }
        Err(reason) => GpuSupport::Refused { library, origin, reason },
    }
}

/// `__version__` of the torch whose libraries lie in `folder`.
fn build_of(folder: &Path) -> Result<String, String> {
    let path = folder.join("../version.py");
    let text = std::fs::read_to_string(&path)
        .map_err(|error| format!("its build is unknown, since {} cannot be read: {error}", path.display()))?;
    text.lines()
        .find_map(|line| line.strip_prefix("__version__ = "))
        .map(|quoted| quoted.trim_matches(['\'', '"', ' ']).to_owned())
        .ok_or_else(|| format!("its build is unknown, since {} names no __version__", path.display()))
}

/// Folder of the `torch` package of an interpreter.
fn torch_of(python: &Path) -> Result<PathBuf, GpuSupport> {
    let absent = |reason| GpuSupport::Absent { reason };
    let mut child = Command::new(python)
        .args(["-c", FIND_TORCH])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| absent(format!("{} cannot be run: {error}", python.display())))?;
    let stdout = child.stdout.take();
    let (sender, receiver) = std::sync::mpsc::channel();
    // Read on another thread: a hung interpreter must not hang the start of a worker.
    std::thread::spawn(move || {
        let text = stdout.and_then(|stdout| std::io::read_to_string(stdout).ok()).unwrap_or_default();
        // Nobody listens any more after the time-out.
        drop(sender.send(text));
    });
    let text = receiver.recv_timeout(PYTHON_TIMEOUT);
    if text.is_err() {
        // An interpreter that has ended meanwhile cannot be killed, which is as good.
        drop(child.kill());
    }
    let status = child.wait().map_err(|error| absent(format!("{} was lost: {error}", python.display())))?;
    match text {
        Err(_) => {
            let reason = format!("{} gave no answer within {} s", python.display(), PYTHON_TIMEOUT.as_secs());
            Err(GpuSupport::Unanswered { reason })
        }
        Ok(_) if !status.success() => Err(absent(format!("{} failed: {status}", python.display()))),
        Ok(text) if text.trim().is_empty() => Err(absent(format!("{} has no torch", python.display()))),
        Ok(text) => Ok(PathBuf::from(text.trim())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A `torch` folder with a library of no content and the given version.
    fn torch_folder(version: Option<&str>) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("lib")).unwrap();
        std::fs::write(root.path().join("lib").join(LIBRARY), b"no library").unwrap();
        if let Some(version) = version {
            std::fs::write(root.path().join("version.py"), format!("__version__ = '{version}'\n")).unwrap();
        }
        root
    }

    /// A program that stands in for `python3` and prints `answer`.
    fn interpreter(folder: &Path, answer: &str) -> PathBuf {
        let path = folder.join("python3");
        std::fs::write(&path, format!("#!/bin/sh\nprintf '%s\\n' '{answer}'\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn a_configured_folder_wins_and_is_never_replaced() {
        let right = torch_folder(Some(BUILD));
        let configured = Some(right.path().join("lib"));
        let located = locate(configured, Path::new("/nonexistent/python3")).unwrap();
        assert_eq!(located.origin, Origin::Configured);
        assert_eq!(located.library, right.path().join("lib").join(LIBRARY));

        let python = interpreter(right.path(), &right.path().display().to_string());
        let missing = locate(Some(right.path().join("elsewhere")), &python).unwrap_err();
        assert!(matches!(missing, GpuSupport::Refused { origin: Origin::Configured, .. }), "{missing}");
    }

    #[test]
    fn another_build_is_refused_by_name() {
        let other = torch_folder(Some("2.10.0+cu128"));
        let refused = locate(Some(other.path().join("lib")), Path::new("/nonexistent/python3")).unwrap_err();
        let text = refused.to_string();
        assert!(text.contains("2.10.0+cu128") && text.contains(BUILD), "{text}");

        let unknown = torch_folder(None);
        let refused = locate(Some(unknown.path().join("lib")), Path::new("/nonexistent/python3")).unwrap_err();
        assert!(refused.to_string().contains("version.py"), "{refused}");
    }

    #[test]
    fn the_torch_of_python_is_found_without_a_configured_folder() {
        let torch = torch_folder(Some(BUILD));
        let python = interpreter(torch.path(), &torch.path().display().to_string());
        assert_eq!(locate(None, &python).unwrap().origin, Origin::Python);
    }

    #[test]
    fn a_host_without_torch_is_a_cpu_host() {
        let folder = tempfile::tempdir().unwrap();
        let without = locate(None, &interpreter(folder.path(), "")).unwrap_err();
        assert!(matches!(without, GpuSupport::Absent { .. }), "{without}");
        let cpu_only = locate(None, &interpreter(folder.path(), &folder.path().display().to_string())).unwrap_err();
        assert!(matches!(cpu_only, GpuSupport::Absent { .. }), "{cpu_only}");
        let no_python = locate(None, &folder.path().join("nothing")).unwrap_err();
        assert!(matches!(no_python, GpuSupport::Absent { .. }), "{no_python}");
    }

    #[test]
    fn only_what_may_pass_is_said_to_change() {
        let loaded = |devices| GpuSupport::Loaded { library: LIBRARY.into(), origin: Origin::Python, devices };
        let reason = String::new;
        assert!(loaded(0).may_change() && GpuSupport::Unanswered { reason: reason() }.may_change());
        assert!(!loaded(1).may_change() && !GpuSupport::Absent { reason: reason() }.may_change());
        assert!(GpuSupport::Absent { reason: reason() }.remedy().contains("torch==2.11.0`"));
        assert!(BUILD.starts_with(RELEASE));
    }

    #[test]
    fn a_file_that_is_no_library_is_refused_with_the_linkers_reason() {
        let torch = torch_folder(Some(BUILD));
        let located = locate(Some(torch.path().join("lib")), Path::new("/nonexistent/python3")).unwrap();
        let refused = load(located);
        assert!(matches!(&refused, GpuSupport::Refused { reason, .. } if !reason.is_empty()), "{refused}");
    }
}
