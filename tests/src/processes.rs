//! Which processes are still there.

use std::path::Path;

/// A process whose command line names a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub pid: u32,
    pub command: String,
}

/// Processes whose command line mentions `folder`, without this one.
#[must_use]
pub fn mentioning(folder: &Path) -> Vec<Found> {
    let needle = folder.to_string_lossy().into_owned();
    let entries = std::fs::read_dir("/proc").map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
    entries
        .iter()
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let command = std::fs::read(entry.path().join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            (pid != std::process::id() && command.contains(&needle)).then_some(Found { pid, command })
        })
        .collect()
}
