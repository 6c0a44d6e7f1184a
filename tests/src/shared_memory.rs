//! Shared-memory segments that nobody uses any more.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const POSIX: &str = "/dev/shm";
const SYSV: &str = "/proc/sysvipc/shm";

/// Names of the segments, POSIX and System V, that no living process has mapped or opened.
#[must_use]
pub fn unused_segments() -> BTreeSet<String> {
    // Segments are files; what others keep there in folders is none.
    let names: Vec<PathBuf> = entries(Path::new(POSIX)).into_iter().filter(|path| path.is_file()).collect();
    let used = if names.is_empty() { BTreeSet::new() } else { used_files() };
    let posix = names.into_iter().filter(|name| !used.contains(name)).map(|name| name.display().to_string());
    posix.chain(unattached()).collect()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Files under [`POSIX`] that some process has mapped or opened.
fn used_files() -> BTreeSet<PathBuf> {
    let mut used = BTreeSet::new();
    for process in entries(Path::new("/proc")) {
        let maps = fs::read_to_string(process.join("maps")).unwrap_or_default();
        let mapped = maps.lines().filter_map(|line| Some(PathBuf::from(&line[line.find(POSIX)?..])));
        let opened = entries(&process.join("fd")).into_iter().filter_map(|link| fs::read_link(link).ok());
        used.extend(mapped.chain(opened.filter(|target| target.starts_with(POSIX))));
    }
    used
}

/// System V segments with no process attached, by their number.
fn unattached() -> Vec<String> {
    let table = fs::read_to_string(SYSV).unwrap_or_default();
    let mut lines = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let Some(header) = lines.next() else { return Vec::new() };
    let column = |name| header.iter().position(|title| *title == name);
    let (Some(number), Some(attached)) = (column("shmid"), column("nattch")) else { return Vec::new() };
    lines.filter(|row| row.get(attached) == Some(&"0")).map(|row| format!("shmid {}", row[number])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_that_nobody_has_open_is_found() {
        let Ok(file) = tempfile::Builder::new().prefix("grail-test-").tempfile_in(POSIX) else {
            println!("skipped: {POSIX} cannot be written");
            return;
        };
        let name = file.path().display().to_string();
        assert!(!unused_segments().contains(&name), "this process has it open");
        let path = file.into_temp_path();
        assert!(unused_segments().contains(&name));
        drop(path);
        assert!(!unused_segments().contains(&name));
    }
}
