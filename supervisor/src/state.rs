//! The state directory: who holds it, and where things lie in it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use grail_protocol::ids::WindowStart;
use grail_protocol::randomness::MinerRandomness;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::durable;
use crate::terminal::printable;

/// A state directory that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    #[error("{action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("no space left to {action} {}: free space and start again; what is spooled is safe", path.display())]
    Full { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error(
        "{} is in use by another supervisor ({holder}); stop that one first, or name another folder with --state-dir",
        path.display()
    )]
    Held { path: PathBuf, holder: String },
    #[error("{} holds no window record of this version: {detail}; move it away", path.display())]
    Malformed { path: PathBuf, detail: String },
}

impl StateError {
    /// A failure of the file system, with its own words where there is no room.
    #[must_use]
    pub fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        let path = path.to_owned();
        if durable::is_full(&source) { Self::Full { action, path, source } } else { Self::Io { action, path, source } }
    }
}

/// A locked state directory. The lock goes with the process, however it dies.
#[derive(Debug)]
pub struct StateDir {
    root: PathBuf,
    _lock: Flock<File>,
}

/// `R_m` of one window, kept so that a restart makes the same beacon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowRandomness {
    pub window: WindowStart,
    pub randomness: MinerRandomness,
    pub use_drand: bool,
}

impl StateDir {
    /// Creates `root` if need be and takes its lock.
    ///
    /// # Errors
    /// [`StateError::Held`] if another supervisor has it, [`StateError::Io`] if it cannot be written.
    pub fn open(root: &Path) -> Result<Self, StateError> {
        let io = |action| move |source| StateError::io(action, root, source);
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(io("create the state directory"))?;
        // Contexts beside window files name other folders relative to their own, so the root must be absolute.
        let root = root.canonicalize().map_err(io("resolve the state directory"))?;
        let lock = take_lock(&root.join("lock"))?;
        Ok(Self { root, _lock: lock })
    }

    /// The directory itself, absolute.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Signed groups, one file a window.
    #[must_use]
    pub fn spool(&self) -> PathBuf {
        self.root.join("spool")
    }

    /// Sealed window files with their contexts.
    #[must_use]
    pub fn windows(&self) -> PathBuf {
        windows_of(&self.root)
    }

    /// Bucket of the embedded default: checkpoints and window files under their real keys.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        store_of(&self.root)
    }

    /// Verified checkpoints of the embedded default.
    #[must_use]
    pub fn checkpoints(&self) -> PathBuf {
        checkpoints_of(&self.root)
    }

    /// The unpacked demo.
    #[must_use]
    pub fn demo(&self) -> PathBuf {
        self.root.join("demo")
    }

    /// What `R_m` of a window was, if it was chosen already.
    ///
    /// # Errors
    /// If the record is there and cannot be read.
    pub fn window_randomness(&self, window: WindowStart) -> Result<Option<WindowRandomness>, StateError> {
        read_window_randomness(&self.root, window)
    }

    /// Keeps `R_m` of a window.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn keep_window_randomness(&self, record: &WindowRandomness) -> Result<(), StateError> {
        let path = randomness_path(&self.root, record.window);
        let io = |source| StateError::io("write", &path, source);
        std::fs::create_dir_all(self.root.join("randomness")).map_err(io)?;
        durable::write_json(&path, record).map_err(io)
    }
}

/// Takes the lock and writes into it who holds it, for whoever comes second.
fn take_lock(path: &Path) -> Result<Flock<File>, StateError> {
    let io = |action| move |source| StateError::io(action, path, source);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(path).map_err(io("open"))?;
    let mut holder = String::new();
    let readable = file.read_to_string(&mut holder);
    let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => {
            let known = readable.is_ok() && !holder.trim().is_empty();
            let holder = if known { printable(holder.trim()) } else { "it has not written its name yet".to_owned() };
            StateError::Held { path: path.to_owned(), holder }
        }
        errno => StateError::io("lock", path, errno.into()),
    })?;
    let named = lock
        .set_len(0)
        .and_then(|()| lock.seek(SeekFrom::Start(0)))
        .and_then(|_| lock.write_all(holder_line().as_bytes()));
    if let Err(error) = named {
        // The lock is held all the same; a full disk must not keep what is spooled from its upload.
        tracing::warn!(%error, path = %path.display(), "The lock does not say who holds it.");
    }
    Ok(lock)
}

/// Who this process is: pid, host and the time, since a state directory may be shared between hosts.
fn holder_line() -> String {
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let since = chrono::DateTime::<chrono::Utc>::from(SystemTime::now());
    let since = since.to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
    format!("pid {} on host {} since {since}\n", std::process::id(), host.as_deref().unwrap_or("unknown"))
}

/// Folder of sealed window files under a state directory.
#[must_use]
pub fn windows_of(root: &Path) -> PathBuf {
    root.join("windows")
}

/// Folder of the local bucket under a state directory.
#[must_use]
pub fn store_of(root: &Path) -> PathBuf {
    root.join("store")
}

/// Folder of the local cache of checkpoints under a state directory.
#[must_use]
pub fn checkpoints_of(root: &Path) -> PathBuf {
    root.join("checkpoints")
}

fn randomness_path(root: &Path, window: WindowStart) -> PathBuf {
    root.join("randomness").join(format!("window-{window}.json"))
}

fn read_window_randomness(root: &Path, window: WindowStart) -> Result<Option<WindowRandomness>, StateError> {
    let path = randomness_path(root, window);
    match std::fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| StateError::Malformed { path, detail: error.to_string() }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(StateError::Io { action: "read", path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_told_who_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let first = StateDir::open(folder.path()).unwrap();
        let error = StateDir::open(folder.path()).unwrap_err().to_string();
        let host = nix::unistd::gethostname().unwrap().into_string().unwrap();
        let holder = format!("pid {} on host {host} since 2", std::process::id());
        assert!(error.contains(&holder) && error.contains("--state-dir"), "{error}");
        drop(first);
        StateDir::open(folder.path()).unwrap();
    }

    #[test]
    fn a_full_disk_has_its_own_words() {
        let error = |errno: nix::errno::Errno| StateError::io("write", Path::new("/s/lock"), errno.into()).to_string();
        assert!(
            error(nix::errno::Errno::ENOSPC).contains("/s/lock: free space"),
            "{}",
            error(nix::errno::Errno::ENOSPC)
        );
        assert_eq!(error(nix::errno::Errno::EROFS), "write /s/lock");
    }

    #[test]
    fn randomness_survives_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        let window = WindowStart::try_from(3_000).unwrap();
        assert_eq!(state.window_randomness(window).unwrap(), None);
        let randomness = grail_protocol::randomness::mix_miner(&grail_protocol::ids::BlockHash("0xab".into()), None);
        let record = WindowRandomness { window, randomness, use_drand: false };
        state.keep_window_randomness(&record).unwrap();
        assert_eq!(state.window_randomness(window).unwrap(), Some(record));
    }
}
