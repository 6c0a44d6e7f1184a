//! Which ranges of a large download are on the disk, so that a process that was killed goes on where it was.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

const SUFFIX: &str = ".ranges";

/// What identifies a stored object between two requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ObjectVersion {
    pub(super) key: String,
    pub(super) size: u64,
    pub(super) e_tag: Option<String>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    object: ObjectVersion,
    range_bytes: u64,
    /// Numbers of the ranges whose bytes were all written.
    done: BTreeSet<u64>,
}

/// The ranges of one download, with the sidecar file that remembers them.
///
/// The sidecar promises what the page cache has, not what survived a power loss: the hash over the whole file decides at the
/// end, so that no write waits for the disk.
#[derive(Debug)]
pub(super) struct Ledger {
    path: PathBuf,
    record: Record,
}

impl Ledger {
    /// The ledger for a download into `target`, with what an earlier process got of the very same object.
    pub(super) fn open(target: &Path, object: ObjectVersion, range_bytes: u64) -> Self {
        let path = sidecar(target);
        let fresh = Record { object, range_bytes: range_bytes.max(1), done: BTreeSet::new() };
        let ledger = Self { path, record: fresh };
        match ledger.earlier() {
            Some(done) if target.metadata().is_ok_and(|file| file.len() == ledger.record.object.size) => {
                Self { record: Record { done, ..ledger.record }, ..ledger }
            }
            _ => ledger,
        }
    }

    fn earlier(&self) -> Option<BTreeSet<u64>> {
        let text = std::fs::read(&self.path).ok()?;
        let earlier: Record = serde_json::from_slice(&text).ok()?;
        let same = earlier.object == self.record.object && earlier.range_bytes == self.record.range_bytes;
        (same && earlier.done.iter().all(|number| *number < self.ranges())).then_some(earlier.done)
    }

    /// Number of ranges.
    pub(super) const fn ranges(&self) -> u64 {
        self.record.object.size.div_ceil(self.record.range_bytes)
    }

    /// Bytes of a range within the object.
    pub(super) fn range(&self, number: u64) -> Range<u64> {
        let start = number.saturating_mul(self.record.range_bytes);
        start..start.saturating_add(self.record.range_bytes).min(self.record.object.size)
    }

    pub(super) fn missing(&self) -> Vec<u64> {
        (0..self.ranges()).filter(|number| !self.record.done.contains(number)).collect()
    }

    pub(super) const fn done(&self) -> &BTreeSet<u64> {
        &self.record.done
    }

    pub(super) fn done_bytes(&self) -> u64 {
        self.record.done.iter().map(|number| self.range(*number)).map(|range| range.end - range.start).sum()
    }

    /// Remembers that a range is written. The last one is not recorded: the file is whole and speaks for itself.
    pub(super) fn mark(&mut self, number: u64) -> io::Result<()> {
        self.record.done.insert(number);
        if self.is_complete() {
            return Ok(());
        }
        let mut fresh = self.path.clone().into_os_string();
        fresh.push(".new");
        std::fs::write(&fresh, serde_json::to_vec(&self.record)?)?;
        std::fs::rename(&fresh, &self.path)
    }

    pub(super) fn is_complete(&self) -> bool {
        self.record.done.len() as u64 == self.ranges()
    }

    /// Removes the sidecar, which is absent if there was only one range.
    pub(super) fn close(self) -> io::Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Whether a download into `target` was begun and not finished.
pub(crate) fn is_unfinished(target: &Path) -> bool {
    sidecar(target).exists()
}

/// Removes what there is of a download into `target`.
pub(crate) fn discard(target: &Path) -> io::Result<()> {
    for path in [sidecar(target), target.to_path_buf()] {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn sidecar(target: &Path) -> PathBuf {
    let mut path = target.as_os_str().to_owned();
    path.push(SUFFIX);
    PathBuf::from(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(e_tag: &str) -> ObjectVersion {
        ObjectVersion { key: "k".to_owned(), size: 10, e_tag: Some(e_tag.to_owned()) }
    }

    fn file(folder: &tempfile::TempDir, bytes: usize) -> PathBuf {
        let target = folder.path().join("file");
        std::fs::write(&target, vec![0; bytes]).unwrap();
        target
    }

    #[test]
    fn what_was_done_is_found_again_for_the_same_object_only() {
        let folder = tempfile::tempdir().unwrap();
        let target = file(&folder, 10);
        let mut ledger = Ledger::open(&target, object("a"), 4);
        assert_eq!((ledger.ranges(), ledger.range(2), ledger.missing()), (3, 8..10, vec![0, 1, 2]));
        ledger.mark(2).unwrap();
        assert!(is_unfinished(&target));

        let again = Ledger::open(&target, object("a"), 4);
        assert_eq!((again.missing(), again.done_bytes()), (vec![0, 1], 2));
        for (other, range_bytes) in [(object("b"), 4), (object("a"), 5), (ObjectVersion { size: 11, ..object("a") }, 4)]
        {
            assert!(Ledger::open(&target, other, range_bytes).done().is_empty());
        }
        file(&folder, 9);
        assert!(Ledger::open(&target, object("a"), 4).done().is_empty());
    }

    #[test]
    fn a_damaged_sidecar_is_as_good_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let target = file(&folder, 10);
        for text in ["", "{", "{\"object\":{\"key\":\"k\",\"size\":10,\"e_tag\":\"a\"},\"range_bytes\":4,\"done\":[3]}"]
        {
            std::fs::write(sidecar(&target), text).unwrap();
            assert!(Ledger::open(&target, object("a"), 4).done().is_empty(), "{text}");
        }
        discard(&target).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        discard(&target).unwrap();
    }

    #[test]
    fn a_whole_file_needs_no_sidecar() {
        let folder = tempfile::tempdir().unwrap();
        let target = file(&folder, 10);
        let mut one = Ledger::open(&target, object("a"), 64);
        one.mark(0).unwrap();
        assert!(one.is_complete() && !is_unfinished(&target));
        one.close().unwrap();
        let empty = Ledger::open(&target, ObjectVersion { size: 0, ..object("a") }, 64);
        assert!(empty.is_complete() && empty.missing().is_empty());
    }
}
