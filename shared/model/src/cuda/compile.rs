//! Machine code of the kernels: compiled where it runs, for the card and the model's shape, and kept on disk.

use std::ffi::{CStr, CString};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::{Xxh3Default, xxh3_128};

use super::ffi::Compiler;
use crate::gpu::BUILD;

/// A source by its name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source {
    name: &'static CStr,
    text: &'static CStr,
    /// Behind the number of the architecture: what of it no later card has.
    features: &'static str,
}

/// The forward pass's source; see its head for the macros.
pub(super) const FORWARD: Source =
    Source { name: c"kernels.cu", text: c_source(concat!(include_str!("../../cuda/kernels.cu"), "\0")), features: "" };
/// The source for weights where they lie; it has no macros.
pub(super) const WEIGHTS: Source =
    Source { name: c"weights.cu", text: c_source(concat!(include_str!("../../cuda/weights.cu"), "\0")), features: "" };
/// The source of attention on Hopper alone; see its head for the macros.
pub(super) const ATTEND: Source =
    Source { name: c"attend.cu", text: c_source(concat!(include_str!("../../cuda/attend.cu"), "\0")), features: "a" };

/// The source of the feed-forward's first half on Hopper alone; see its head for the macros.
pub(super) const GATE_UP_SILU: Source = Source {
    name: c"gate_up_silu.cu",
    text: c_source(concat!(include_str!("../../cuda/gate_up_silu.cu"), "\0")),
    features: "a",
};

/// Bytes of the checksum before a kept image.
const CHECKSUM_BYTES: usize = 16;

const fn c_source(text: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(source) => source,
        Err(_) => panic!("the source holds no zero byte"),
    }
}

/// Machine code of `source` for a card of compute capability `capability` and the given macros, from the cache or from the compiler
/// of the torch whose libraries lie in `libraries`.
///
/// # Errors
/// Why there is none: no compiler, or what the compiler says.
pub(super) fn image(
    libraries: &Path,
    capability: (i32, i32),
    source: Source,
    macros: &[String],
) -> Result<Vec<u8>, String> {
    let options = options(source, capability, macros);
    let kept = cache_folder().map(|folder| folder.join(file_name(source, &options)));
    if let Some(image) = kept.as_deref().and_then(read) {
        return Ok(image);
    }
    let started = std::time::Instant::now();
    let image = compiler(libraries)?.compile(source.name, source.text, &c_strings(&options)?)?;
    tracing::info!(source = ?source.name, ?capability, bytes = image.len(), took = ?started.elapsed(), "Kernels compiled.");
    if let Some(path) = kept
        && let Err(error) = write(&path, &image)
    {
        tracing::debug!(path = %path.display(), %error, "Kernels are not kept; the next start compiles them again.");
    }
    Ok(image)
}

fn options(source: Source, (major, minor): (i32, i32), macros: &[String]) -> Vec<String> {
    let architecture = format!("--gpu-architecture=sm_{major}{minor}{}", source.features);
    std::iter::once(architecture).chain(macros.iter().map(|definition| format!("-D{definition}"))).collect()
}

fn c_strings(options: &[String]) -> Result<Vec<CString>, String> {
    options.iter().map(|option| CString::new(option.as_str()).map_err(|error| error.to_string())).collect()
}

/// The compiler that belongs to that torch. `libcaffe2_nvrtc.so` is torch's own binding to it and knows where it lies.
fn compiler(libraries: &Path) -> Result<Compiler, String> {
    let beside = libraries.join("../../nvidia/cu13/lib");
    // The compiler asks for its other half by name and looks beside itself only if torch's binding loaded it.
    Compiler::preload(&beside.join("libnvrtc-builtins.so.13.0"));
    let places = [libraries.join("libcaffe2_nvrtc.so"), beside.join("libnvrtc.so.13"), PathBuf::from("libnvrtc.so.13")];
    let mut problems = Vec::new();
    for place in places {
        match Compiler::load(&place) {
            Ok(compiler) => return Ok(compiler),
            Err(problem) => problems.push(problem),
        }
    }
    Err(format!("no run-time compiler ({}): install nvidia-cuda-nvrtc beside torch", problems.join("; ")))
}

/// `$XDG_CACHE_HOME` or `~/.cache`; none for a service without a home.
fn cache_folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    cache.is_absolute().then(|| cache.join("grail-supervisor/kernels"))
}

/// One name for each source, set of options and build of torch, whose compiler it is.
fn file_name(source: Source, options: &[String]) -> String {
    let mut hasher = Xxh3Default::new();
    for part in std::iter::once(BUILD).chain(options.iter().map(String::as_str)) {
        hasher.update(part.as_bytes());
        hasher.update(&[0]);
    }
    hasher.update(source.text.to_bytes());
    format!("{:032x}.cubin", hasher.digest128())
}

/// A kept image whose checksum is right.
fn read(path: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(path).ok()?;
    let (checksum, image) = bytes.split_first_chunk::<CHECKSUM_BYTES>()?;
    (u128::from_le_bytes(*checksum) == xxh3_128(image)).then(|| image.to_vec())
}

/// Keeps an image; whoever reads at the same time sees all of it or nothing.
fn write(path: &Path, image: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder)?;
    let unfinished = path.with_extension(format!("{}.part", std::process::id()));
    let mut file = fs::File::create(&unfinished)?;
    file.write_all(&xxh3_128(image).to_le_bytes())?;
    file.write_all(image)?;
    drop(file);
    fs::rename(&unfinished, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_read_as_it_was_kept_and_a_damaged_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/folder/x.cubin");
        write(&path, b"machine code").unwrap();
        assert_eq!(read(&path).as_deref(), Some(&b"machine code"[..]));
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&path), None);
        fs::write(&path, b"short").unwrap();
        assert_eq!(read(&path), None);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing unfinished is left");
    }

    #[test]
    fn names_differ_by_source_card_and_shape() {
        let of = |source, capability, definition: &str| {
            file_name(source, &options(source, capability, &[definition.to_owned()]))
        };
        let name = |capability, definition: &str| of(FORWARD, capability, definition);
        assert_eq!(name((9, 0), "HIDDEN=64"), name((9, 0), "HIDDEN=64"));
        assert_ne!(name((9, 0), "HIDDEN=64"), name((8, 0), "HIDDEN=64"));
        assert_ne!(name((9, 0), "HIDDEN=64"), name((9, 0), "HIDDEN=128"));
        assert_ne!(name((9, 0), "HIDDEN=64"), of(WEIGHTS, (9, 0), "HIDDEN=64"));
        assert_eq!(options(FORWARD, (9, 0), &[]), ["--gpu-architecture=sm_90"]);
        assert_eq!(options(ATTEND, (9, 0), &[]), ["--gpu-architecture=sm_90a"]);
    }

    #[test]
    fn a_missing_compiler_is_named_with_the_remedy() {
        let problem = compiler(Path::new("/nonexistent")).err();
        // A host may have one on its own path.
        assert!(problem.is_none_or(|text| text.contains("nvidia-cuda-nvrtc") && text.contains("/nonexistent")));
    }
}
