//! A configured file or folder.

use std::path::Path;

use super::located::{Layout, Located};
use super::published::{self, Part};
use super::snapshot;
use crate::id::EnvironmentId;

/// Endings of files, the one that is preferred first.
const ENDINGS: [&str; 3] = ["parquet", "jsonl", "jsonl.gz"];

/// The files of `parts` at `path`, which exists: a file with the rows of all of them, or a folder that is laid out like a
/// snapshot, has one file per split, or the authors' own file.
///
/// # Errors
/// Why they are not there, in words.
pub(super) fn find(path: &Path, environment: EnvironmentId, parts: &[Part]) -> Result<Located, String> {
    let located = |layout| Located { place: path.display().to_string(), commit: None, layout };
    if path.is_file() {
        return Ok(located(Layout::Whole(path.to_owned())));
    }
    let names = snapshot::list(path);
    let readme = std::fs::read_to_string(path.join("README.md")).ok();
    let has = |name: String| names.contains(&name).then_some(name);
    let of_part = |part: &Part| {
        snapshot::files_of(&names, readme.as_deref(), part).or_else(|reason| {
            let nested = ENDINGS.into_iter().find_map(|ending| has(format!("{part}.{ending}")));
            // The subsets of MATH would all share such a file.
            let is_alone = environment != EnvironmentId::Math;
            let plain =
                || ENDINGS.into_iter().filter(|_| is_alone).find_map(|end| has(format!("{}.{end}", part.split)));
            nested.or_else(plain).map(|name| vec![name]).ok_or(reason)
        })
    };
    let by_part: Result<Vec<_>, String> = parts.iter().map(of_part).collect();
    match by_part {
        Ok(files) => {
            let paths = |names: Vec<String>| names.into_iter().map(|name| path.join(name)).collect();
            Ok(located(Layout::PerPart(files.into_iter().map(paths).collect())))
        }
        Err(reason) => published::whole_file(environment)
            .and_then(|stem| ENDINGS.into_iter().find_map(|ending| has(format!("{stem}.{ending}"))))
            .map(|name| located(Layout::Whole(path.join(name))))
            .ok_or(reason),
    }
}
