//! Files that are either there whole or not at all: written beside, synced, renamed.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

pub use grail_checkpoint::durable::sync_folder;
use serde::Serialize;

/// Replaces `path` by `bytes` so that a crash at any instruction leaves the old or the new content.
///
/// # Errors
/// What the file system says, for instance that it is full; the old content stays.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut partial_name = name.to_owned();
    partial_name.push(format!(".{}.partial", std::process::id()));
    let partial = folder.join(partial_name);
    let written = write_synced(&partial, bytes).and_then(|()| std::fs::rename(&partial, path));
    if let Err(error) = written {
        // The partial file is of no use; that it may stay behind must not hide the first error.
        drop(std::fs::remove_file(&partial));
        return Err(error);
    }
    sync_folder(folder)
}

/// [`write`] of a JSON document, indented, with a final newline.
///
/// # Errors
/// As [`write`].
pub fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    write(path, &text)
}

/// Whether a write failed because there is no room: the disk, the quota or the limit on file sizes.
#[must_use]
pub fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_whole_files_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_json(&path, &[1, 2]).unwrap();
        write(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_keeps_the_old_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("missing").join("a");
        assert!(write(&path, b"x").is_err());
    }

    #[test]
    fn the_three_ways_of_being_full() {
        use nix::errno::Errno;
        for (errno, full) in [
            (Errno::ENOSPC, true),
            (Errno::EDQUOT, true),
            (Errno::EFBIG, true),
            (Errno::EIO, false),
            (Errno::EROFS, false),
        ] {
            assert_eq!(is_full(&io::Error::from_raw_os_error(errno as i32)), full, "{errno}");
        }
    }
}
