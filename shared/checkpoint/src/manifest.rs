//! The manifest of a tree: which files it has and what their bytes hash to.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::blocking::Interest;
use crate::layout::{METADATA_FILE, SIGNATURE_FILE};

/// Bytes read at once while a file is hashed.
const READ_BYTES: usize = 1 << 20;
/// Files hashed at the same time: a few shards keep the disk busy, more would only take processor time from the miner.
const MAX_HASHING_THREADS: usize = 8;

/// SHA-256 of a file's bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sha256Digest(pub [u8; 32]);

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sha256Digest({self})")
    }
}

impl FromStr for Sha256Digest {
    type Err = hex::FromHexError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut digest = [0; 32];
        hex::decode_to_slice(text, &mut digest)?;
        Ok(Self(digest))
    }
}

/// Why a `file_manifest` is refused: its tree is ignored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestDefect {
    #[error("file_manifest is no object")]
    NotAnObject,
    #[error("file_manifest names {path:?}, which {why}")]
    UnsafePath { path: String, why: &'static str },
    #[error("file_manifest gives {value} for {path:?}: 64 hexadecimal digits are expected")]
    BadHash { path: String, value: String },
}

/// How a file differs from what its manifest says.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileDefect {
    #[error("the file is missing")]
    Missing,
    #[error("the file cannot be read")]
    Unreadable(#[source] io::Error),
    #[error("its {bytes} bytes have sha256 {found}, the manifest says {expected}")]
    Hash { expected: Sha256Digest, found: Sha256Digest, bytes: u64 },
}

/// The first file (by name) of a folder that differs from the manifest.
#[derive(Debug, thiserror::Error)]
#[error("{path} differs from its manifest")]
pub struct FolderDefect {
    pub path: String,
    #[source]
    pub defect: FileDefect,
}

/// Files of a tree by relative path; every path is safe to join to a folder.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Manifest(BTreeMap<String, Sha256Digest>);

impl Manifest {
    /// Reads the value of `file_manifest`.
    ///
    /// # Errors
    /// [`ManifestDefect`] for a path that could leave the folder, or a hash that is none.
    pub fn from_json(value: &Value) -> Result<Self, ManifestDefect> {
        let entries = value.as_object().ok_or(ManifestDefect::NotAnObject)?;
        let mut files = BTreeMap::new();
        for (path, hash) in entries {
            if let Some(why) = unsafe_path(path) {
                return Err(ManifestDefect::UnsafePath { path: path.clone(), why });
            }
            let digest = hash
                .as_str()
                .and_then(|text| text.parse().ok())
                .ok_or_else(|| ManifestDefect::BadHash { path: path.clone(), value: hash.to_string() })?;
            files.insert(path.clone(), digest);
        }
        Ok(Self(files))
    }

    /// The manifest as the value of `file_manifest`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        Value::Object(
            self.0.iter().map(|(path, hash)| (path.clone(), Value::from(hash.to_string()))).collect::<Map<_, _>>(),
        )
    }

    /// The files that must be there with these bytes. `metadata.json` and `manifest.sig` are left out even if they are
    /// listed: a retried upload lists the first attempt's, which were rewritten since, and can never match.
    pub fn required(&self) -> impl Iterator<Item = (&str, Sha256Digest)> {
        self.0.iter().map(|(path, hash)| (path.as_str(), *hash)).filter(|(path, _)| !is_rewritten(path))
    }

    /// Whether no file is required.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.required().next().is_none()
    }

    /// Hashes the required files of `folder`, several at a time.
    ///
    /// # Errors
    /// The first defect in the order of the paths.
    pub fn verify_folder(&self, folder: &Path) -> Result<(), FolderDefect> {
        self.verify_folder_while(folder, &Interest::default())
    }

    pub(crate) fn verify_folder_while(&self, folder: &Path, interest: &Interest) -> Result<(), FolderDefect> {
        let files: Vec<_> = self.required().collect();
        let next = AtomicUsize::new(0);
        let defects = Mutex::new(BTreeMap::new());
        let threads =
            std::thread::available_parallelism().map_or(1, usize::from).min(MAX_HASHING_THREADS).min(files.len());
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some((path, expected)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(defect) = check_file(&folder.join(path), *expected, interest) {
                            defects.lock().expect("no thread panics while it holds this lock").insert(*path, defect);
                        }
                    }
                });
            }
        });
        let first = defects.into_inner().expect("no thread panics while it holds this lock").pop_first();
        first.map_or(Ok(()), |(path, defect)| Err(FolderDefect { path: path.to_owned(), defect }))
    }
}

impl FromIterator<(String, Sha256Digest)> for Manifest {
    fn from_iter<I: IntoIterator<Item = (String, Sha256Digest)>>(files: I) -> Self {
        Self(files.into_iter().collect())
    }
}

/// Whether the upload writes this file after it has made the manifest.
#[must_use]
pub fn is_rewritten(path: &str) -> bool {
    path == METADATA_FILE || path == SIGNATURE_FILE
}

/// Length and SHA-256 of a file.
///
/// # Errors
/// What the file system says.
pub fn hash_file(path: &Path) -> io::Result<(u64, Sha256Digest)> {
    hash_file_while(path, &Interest::default())
}

pub(crate) fn hash_file_while(path: &Path, interest: &Interest) -> io::Result<(u64, Sha256Digest)> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut bytes = 0_u64;
    loop {
        interest.check()?;
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok((bytes, Sha256Digest(hash.finalize().into())));
        }
        hash.update(&buffer[..read]);
        bytes += read as u64;
    }
}

fn check_file(path: &Path, expected: Sha256Digest, interest: &Interest) -> Result<(), FileDefect> {
    match hash_file_while(path, interest) {
        Ok((_, found)) if found == expected => Ok(()),
        Ok((bytes, found)) => Err(FileDefect::Hash { expected, found, bytes }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(FileDefect::Missing),
        Err(error) => Err(FileDefect::Unreadable(error)),
    }
}

fn unsafe_path(path: &str) -> Option<&'static str> {
    if path.starts_with('/') {
        return Some("is absolute");
    }
    if path.contains('\\') {
        return Some("contains a backslash");
    }
    if path.contains('\0') {
        return Some("contains a NUL");
    }
    path.split('/').find_map(|segment| match segment {
        ".." => Some("leaves its folder"),
        "" | "." => Some("has an empty segment"),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn paths_that_could_leave_the_folder_are_refused() {
        for path in ["../x", "a/../../x", "/x", "a\\b", "a\0b", "", ".", "a//b", "a/", "./a"] {
            let defect = Manifest::from_json(&json!({ path: EMPTY })).unwrap_err();
            assert!(matches!(defect, ManifestDefect::UnsafePath { .. }), "{path:?}: {defect}");
        }
        assert!(Manifest::from_json(&json!({ "a/b.c..d": EMPTY })).is_ok());
    }

    #[test]
    fn hashes_must_be_sha256_in_hex() {
        for value in [json!("zz"), json!(EMPTY[1..]), json!(null), json!(7), json!(format!("{EMPTY} "))] {
            let defect = Manifest::from_json(&json!({ "a": value })).unwrap_err();
            assert!(matches!(defect, ManifestDefect::BadHash { .. }), "{defect}");
        }
        assert_eq!(Manifest::from_json(&json!([])).unwrap_err(), ManifestDefect::NotAnObject);
    }

    #[test]
    fn rewritten_files_are_never_required() {
        let manifest =
            Manifest::from_json(&json!({ METADATA_FILE: EMPTY, SIGNATURE_FILE: EMPTY, "FULL": EMPTY })).unwrap();
        assert_eq!(manifest.required().map(|(path, _)| path).collect::<Vec<_>>(), ["FULL"]);
        assert!(Manifest::from_json(&json!({ METADATA_FILE: EMPTY })).unwrap().is_empty());
        assert_eq!(Manifest::from_json(&manifest.to_json()).unwrap(), manifest);
    }

    #[test]
    fn a_folder_is_held_against_its_manifest() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("sub")).unwrap();
        std::fs::write(folder.path().join("sub/a"), b"").unwrap();
        std::fs::write(folder.path().join("b"), b"").unwrap();
        let manifest = Manifest::from_json(&json!({ "sub/a": EMPTY, "b": EMPTY })).unwrap();
        manifest.verify_folder(folder.path()).unwrap();

        std::fs::write(folder.path().join("sub/a"), b"x").unwrap();
        let damaged = manifest.verify_folder(folder.path()).unwrap_err();
        assert!(matches!(damaged.defect, FileDefect::Hash { bytes: 1, .. }), "{damaged}");
        assert_eq!(damaged.path, "sub/a");

        std::fs::remove_file(folder.path().join("b")).unwrap();
        let missing = manifest.verify_folder(folder.path()).unwrap_err();
        assert_eq!(missing.to_string(), "b differs from its manifest");
        assert!(matches!(missing.defect, FileDefect::Missing));
    }
}
