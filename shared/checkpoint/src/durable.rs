//! Folders whose content survives a power loss once their name is visible.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Makes names that were created in or removed from `folder` survive a power loss.
///
/// # Errors
/// What the file system says.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Makes the entries of `folder` and of every folder below it durable.
pub(crate) fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        }
    }
    sync_folder(folder)
}

/// Regular files below `folder` as paths relative to it, with `/`, in ascending order. Names that are no UTF-8 are an error.
pub(crate) fn files_below(folder: &Path) -> io::Result<Vec<String>> {
    let mut files = Vec::new();
    let mut pending = vec![(folder.to_path_buf(), String::new())];
    while let Some((path, prefix)) = pending.pop() {
        for entry in std::fs::read_dir(&path)? {
            let entry = entry?;
            let name = entry.file_name().into_string().map_err(|name| {
                io::Error::new(
                    io::ErrorKind::InvalidFilename,
                    format!("the name {} is no UTF-8", PathBuf::from(name).display()),
                )
            })?;
            let relative = format!("{prefix}{name}");
            if std::fs::metadata(entry.path())?.is_dir() {
                pending.push((entry.path(), format!("{relative}/")));
            } else {
                files.push(relative);
            }
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// Makes the content of a file durable.
pub(crate) fn sync_file(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
