//! The cache of the Python library `datasets`: Arrow streams that it made from a snapshot.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::located::{Layout, Located};
use super::published::Part;

/// Version that the library gives to every data set without a script.
const VERSION: &str = "0.0.0";

/// The files of `parts` that the library made of `repository`, all from one commit: the pinned `revision`, else what was made
/// last.
///
/// # Errors
/// Why they are not there, in words.
pub(super) fn find(cache: &Path, repository: &str, revision: Option<&str>, parts: &[Part]) -> Result<Located, String> {
    let name = repository.rsplit('/').next().unwrap_or(repository);
    let folder = cache.join(repository.replace('/', "___"));
    let Some(first) = parts.first() else { return Err("nothing is asked for".to_owned()) };
    let mut builds = builds(&folder.join(first.config).join(VERSION));
    if let Some(revision) = revision {
        builds.retain(|(_, hash)| hash == revision);
    }
    builds.sort();
    let mut reason = match revision {
        Some(revision) => format!("{} has nothing of revision {revision}", folder.display()),
        None => format!("{} has no {}/{VERSION}", folder.display(), first.config),
    };
    for (_, hash) in builds.iter().rev() {
        let of_part = |part: &Part| streams(&folder.join(part.config).join(VERSION).join(hash), name, part);
        match parts.iter().map(of_part).collect::<Result<_, String>>() {
            Ok(files) => {
                let place = format!("{} ({hash})", folder.display());
                return Ok(Located { place, commit: Some(hash.clone()), layout: Layout::PerPart(files) });
            }
            Err(missing) => reason = missing,
        }
    }
    Err(reason)
}

/// Finished builds below `folder`, with the time at which each was made.
fn builds(folder: &Path) -> Vec<(SystemTime, String)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let build = |entry: std::fs::DirEntry| {
        // The library writes this file last.
        let made = std::fs::metadata(entry.path().join("dataset_info.json")).ok()?.modified().ok()?;
        Some((made, entry.file_name().into_string().ok()?))
    };
    entries.filter_map(build).collect()
}

/// The stream of `part` in `folder`, whole or in shards.
fn streams(folder: &Path, name: &str, part: &Part) -> Result<Vec<PathBuf>, String> {
    let whole = folder.join(format!("{name}-{}.arrow", part.split));
    if whole.is_file() {
        return Ok(vec![whole]);
    }
    let start = format!("{name}-{}-00000-of-", part.split);
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let counts = names.filter_map(|file| file.strip_prefix(&start)?.strip_suffix(".arrow")?.parse::<usize>().ok());
    let count = counts.max().ok_or_else(|| format!("no {}", whole.display()))?;
    let shards = (0..count).map(|place| folder.join(format!("{name}-{}-{place:05}-of-{count:05}.arrow", part.split)));
    let shards: Vec<PathBuf> = shards.collect();
    match shards.iter().find(|shard| !shard.is_file()) {
        None => Ok(shards),
        Some(missing) => Err(format!("no {}", missing.display())),
    }
}
