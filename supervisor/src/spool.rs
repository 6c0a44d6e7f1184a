//! The spool: every group that is proved, scored and signed, on disk before it counts.
//!
//! One file a window. Each record is `u32` length, eight bytes of the payload's SHA-256, payload (MessagePack), all
//! little-endian; the first record describes the window. [`Spool::append`] returns after `fdatasync`, so a group whose append
//! has returned survives the death of any process and a power loss. A torn tail, which a crash in mid-append leaves, is cut
//! off at the next opening; what was cut is kept beside the file for inspection.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use grail_protocol::ids::{
    BlockHash, BlockNumber, CheckpointWindow, EnvironmentSeed, GroupIndex, Hotkey, WeightsHash, WindowStart,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::durable;
use crate::plan::WindowPlan;

const MAGIC: &[u8; 8] = b"GRAILSP1";
const CHECKSUM_BYTES: usize = 8;
/// A group of 16 × (8,192 + prompt) tokens with sketches and logprobs stays far below this.
const MAX_RECORD_BYTES: u32 = 64 << 20;

/// A spool that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpoolError {
    #[error("{action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("no space left for {}: free space and start again; the {groups} groups that are spooled are safe", path.display())]
    Full { path: PathBuf, groups: usize, source: io::Error },
    #[error("{} is no spool of this version; move it away", path.display())]
    NotASpool { path: PathBuf },
    #[error("{} belongs to other facts ({what}: {found}, expected {expected}); move it away", path.display())]
    OtherWindow { path: PathBuf, what: &'static str, found: String, expected: String },
    #[error("encode a record for {}", path.display())]
    Encode { path: PathBuf, source: rmp_serde::encode::Error },
}

/// Facts that all groups of a spool share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpoolHeader {
    pub window: WindowStart,
    pub window_hash: BlockHash,
    pub hotkey: Hotkey,
    pub checkpoint: CheckpointWindow,
    pub weights: WeightsHash,
    /// `R_m`, lower-case hex.
    pub randomness: String,
    pub use_drand: bool,
    pub model_name: String,
    /// How the checkpoint's metadata wanted it to be mined, see [`crate::plan::WindowPlan::policy`]; empty in a spool of an earlier
    /// version, which did not say.
    #[serde(default)]
    pub policy: String,
}

impl SpoolHeader {
    /// The facts of a window's plan.
    #[must_use]
    pub fn of(plan: &WindowPlan) -> Self {
        Self {
            window: plan.window,
            window_hash: plan.window_hash.clone(),
            hotkey: plan.hotkey.clone(),
            checkpoint: plan.checkpoint,
            weights: plan.weights,
            randomness: plan.randomness.as_hex().to_owned(),
            use_drand: plan.use_drand,
            model_name: plan.model_name.clone(),
            policy: plan.policy(),
        }
    }

    /// Whether both are of one window and hotkey, but groups of one must not be in a file with groups of the other.
    pub fn is_superseded_by(&self, other: &Self) -> bool {
        let is_same_window = (&self.window_hash, &self.hotkey) == (&other.window_hash, &other.hotkey);
        let of = |header: &Self| (header.checkpoint, header.weights, header.model_name.clone());
        is_same_window && (of(self) != of(other) || self.differs_in_policy(other))
    }

    fn differs_in_policy(&self, other: &Self) -> bool {
        !self.policy.is_empty() && self.policy != other.policy
    }
}

/// One group, complete.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SpooledGroup {
    pub group: GroupIndex,
    pub seed: EnvironmentSeed,
    pub task: String,
    /// Chain block when the group was admitted.
    pub block: BlockNumber,
    /// Slot that proved it.
    pub slot: u32,
    /// Prompt ids, `u32` little-endian.
    #[serde(with = "serde_bytes")]
    pub prompt: Vec<u8>,
    /// Sketches of the prompt positions, `u32` little-endian.
    #[serde(with = "serde_bytes")]
    pub prompt_sketches: Vec<u8>,
    pub rollouts: Vec<SpooledRollout>,
}

/// One signed rollout of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SpooledRollout {
    /// Completion ids, `u32` little-endian.
    #[serde(with = "serde_bytes")]
    pub completion: Vec<u8>,
    /// Sketches of the completion positions, `u32` little-endian.
    #[serde(with = "serde_bytes")]
    pub sketches: Vec<u8>,
    /// Logprobs of the completion tokens, `f32` little-endian.
    #[serde(with = "serde_bytes")]
    pub logprobs: Vec<u8>,
    pub eos_probability: f32,
    pub reward: f64,
    pub success: bool,
    pub advantage: f64,
    /// Signature over the commit binding, 64 bytes.
    #[serde(with = "serde_bytes")]
    pub commit_signature: Vec<u8>,
    /// Signature over the row's challenge text, 64 bytes.
    #[serde(with = "serde_bytes")]
    pub row_signature: Vec<u8>,
}

/// What was found when a spool was opened.
#[derive(Debug, Default)]
pub struct Recovered {
    pub groups: Vec<SpooledGroup>,
    /// Bytes of a torn tail that were cut off, and where they are kept.
    pub torn: Option<(u64, PathBuf)>,
}

/// The open spool of one window; the only writer.
#[derive(Debug)]
pub struct Spool {
    path: PathBuf,
    file: File,
    groups: usize,
    /// Length up to which the file holds whole records.
    whole_bytes: u64,
}

impl Spool {
    /// Opens the spool of a window in `folder`, creating it if it is new, and reads back what it holds.
    ///
    /// # Errors
    /// If it cannot be read or written, or was begun with other facts than `header`.
    pub fn open(folder: &Path, header: &SpoolHeader) -> Result<(Self, Recovered), SpoolError> {
        let path = path_of(folder, header.window);
        let io = |action| {
            let path = path.clone();
            move |source| SpoolError::Io { action, path, source }
        };
        std::fs::create_dir_all(folder).map_err(io("create the folder of"))?;
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(&path).map_err(io("open"))?;
        let mut content = Vec::new();
        file.read_to_end(&mut content).map_err(io("read"))?;

        let parsed = parse(&content, &path)?;
        let mut spool = Self { path: path.clone(), file, groups: 0, whole_bytes: parsed.whole_bytes };
        let torn = spool.cut_torn_tail(&content)?;
        match parsed.header {
            Some(found) => check_same(&path, &found, header)?,
            None => {
                spool.truncate(0)?;
                spool.write_start(header)?;
                durable::sync_folder(folder).map_err(io("sync the folder of"))?;
            }
        }
        spool.groups = parsed.groups.len();
        Ok((spool, Recovered { groups: parsed.groups, torn }))
    }

    /// Appends one group and returns when it is on disk.
    ///
    /// # Errors
    /// If it could not be written; then the file is cut back to the groups before.
    pub fn append(&mut self, group: &SpooledGroup) -> Result<(), SpoolError> {
        self.append_record(group)?;
        self.groups += 1;
        Ok(())
    }

    /// Where the spool lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Closes the spool before its window's file is put, by a rename, which needs no space on a disk: a spool under its own name was
    /// never put, and nothing is added to one that is closed. Returns where it lies then.
    ///
    /// # Errors
    /// If it cannot be renamed.
    pub fn close(self) -> Result<PathBuf, SpoolError> {
        let closed = self.path.with_extension("sent");
        let io = |source| SpoolError::Io { action: "close", path: self.path.clone(), source };
        std::fs::rename(&self.path, &closed).map_err(io)?;
        durable::sync_folder(closed.parent().unwrap_or(&closed)).map_err(io)?;
        Ok(closed)
    }

    fn write_start(&mut self, header: &SpoolHeader) -> Result<(), SpoolError> {
        self.write_synced(MAGIC)?;
        self.append_record(header)
    }

    fn append_record(&mut self, record: &impl Serialize) -> Result<(), SpoolError> {
        let payload =
            rmp_serde::to_vec_named(record).map_err(|source| SpoolError::Encode { path: self.path.clone(), source })?;
        let length =
            u32::try_from(payload.len()).ok().filter(|length| *length <= MAX_RECORD_BYTES).ok_or_else(|| {
                SpoolError::Io {
                    action: "append a record of more than 64 MiB to",
                    path: self.path.clone(),
                    source: io::Error::from(io::ErrorKind::InvalidInput),
                }
            })?;
        let mut record = Vec::with_capacity(payload.len() + 4 + CHECKSUM_BYTES);
        record.extend_from_slice(&length.to_le_bytes());
        record.extend_from_slice(&checksum(&payload));
        record.extend_from_slice(&payload);
        self.write_synced(&record)
    }

    fn write_synced(&mut self, bytes: &[u8]) -> Result<(), SpoolError> {
        let written = self.file.write_all(bytes).and_then(|()| self.file.sync_data());
        if let Err(source) = written {
            // Half a record must not stay in front of the next one.
            self.truncate(self.whole_bytes)?;
            return Err(if durable::is_full(&source) {
                SpoolError::Full { path: self.path.clone(), groups: self.groups, source }
            } else {
                SpoolError::Io { action: "append to", path: self.path.clone(), source }
            });
        }
        self.whole_bytes += bytes.len() as u64;
        Ok(())
    }

    fn truncate(&mut self, length: u64) -> Result<(), SpoolError> {
        self.whole_bytes = length;
        self.file
            .set_len(length)
            .and_then(|()| self.file.seek(SeekFrom::End(0)).map(drop))
            .map_err(|source| SpoolError::Io { action: "cut back", path: self.path.clone(), source })
    }

    fn cut_torn_tail(&mut self, content: &[u8]) -> Result<Option<(u64, PathBuf)>, SpoolError> {
        let whole = usize::try_from(self.whole_bytes).unwrap_or(usize::MAX).min(content.len());
        let tail = &content[whole..];
        if tail.is_empty() {
            return Ok(None);
        }
        let kept = self.path.with_extension("torn");
        // The copy is for inspection only; a disk that is full must not keep the whole groups from their window.
        if let Err(error) = durable::write(&kept, tail) {
            tracing::warn!(%error, kept = %kept.display(), "The torn tail of a spool could not be kept.");
        }
        self.truncate(self.whole_bytes)?;
        Ok(Some((tail.len() as u64, kept)))
    }
}

/// Reads a spool without changing it, for instance of a window that is over.
///
/// # Errors
/// If it cannot be read or is no spool.
pub fn read(path: &Path) -> Result<(Option<SpoolHeader>, Vec<SpooledGroup>), SpoolError> {
    let content =
        std::fs::read(path).map_err(|source| SpoolError::Io { action: "read", path: path.to_owned(), source })?;
    let parsed = parse(&content, path)?;
    Ok((parsed.header, parsed.groups))
}

/// What a closed spool holds; `None` if there is none.
///
/// # Errors
/// If it cannot be read, is no spool, or was begun with other facts than `header`, apart from those that
/// [`SpoolHeader::is_superseded_by`] compares.
pub fn read_sent(folder: &Path, header: &SpoolHeader) -> Result<Option<(SpoolHeader, Vec<SpooledGroup>)>, SpoolError> {
    let path = sent_path_of(folder, header.window);
    if !path.try_exists().unwrap_or(true) {
        return Ok(None);
    }
    let (found, groups) = read(&path)?;
    // Whoever closed it had a group in it.
    let found = found.ok_or_else(|| not_a_spool(&path))?;
    if !found.is_superseded_by(header) {
        check_same(&path, &found, header)?;
    }
    Ok(Some((found, groups)))
}

/// How many groups a spool holds, by the lengths of its records alone: cheap, and unaware of damage.
///
/// # Errors
/// If it cannot be read.
pub fn count_groups(path: &Path) -> io::Result<usize> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut place = MAGIC.len() as u64;
    let mut records: usize = 0;
    loop {
        file.seek(SeekFrom::Start(place))?;
        let mut prefix = [0; 4];
        if let Err(error) = file.read_exact(&mut prefix) {
            // The first record describes the window.
            let end = error.kind() == io::ErrorKind::UnexpectedEof;
            return if end { Ok(records.saturating_sub(1)) } else { Err(error) };
        }
        place += (4 + CHECKSUM_BYTES) as u64 + u64::from(u32::from_le_bytes(prefix));
        if place > length {
            return Ok(records.saturating_sub(1));
        }
        records += 1;
    }
}

/// File of a window's spool.
#[must_use]
pub fn path_of(folder: &Path, window: WindowStart) -> PathBuf {
    folder.join(format!("window-{window}.spool"))
}

/// File of a window's spool that is closed: see [`Spool::close`].
#[must_use]
pub fn sent_path_of(folder: &Path, window: WindowStart) -> PathBuf {
    path_of(folder, window).with_extension("sent")
}

/// Gives a spool a name under which nobody takes it for the window's, and returns it: its groups were made with a checkpoint
/// or by a policy that is not the window's. It is kept for inspection and cleaned by age; the newest of a window stays.
///
/// # Errors
/// If it cannot be renamed.
pub fn set_aside(path: &Path) -> Result<PathBuf, SpoolError> {
    let kept = path.with_extension("aside");
    let io = |source| SpoolError::Io { action: "set aside", path: path.to_owned(), source };
    std::fs::rename(path, &kept).map_err(io)?;
    durable::sync_folder(path.parent().unwrap_or(path)).map_err(io)?;
    Ok(kept)
}

#[derive(Debug, Default)]
struct Parsed {
    header: Option<SpoolHeader>,
    groups: Vec<SpooledGroup>,
    whole_bytes: u64,
}

/// Whole records from the start; the first that is torn, damaged or unreadable ends it.
fn parse(content: &[u8], path: &Path) -> Result<Parsed, SpoolError> {
    let mut parsed = Parsed::default();
    if content.len() < MAGIC.len() {
        // A crash while the very first bytes were written.
        return if MAGIC.starts_with(content) { Ok(parsed) } else { Err(not_a_spool(path)) };
    }
    if !content.starts_with(MAGIC) {
        return Err(not_a_spool(path));
    }
    let mut offset = MAGIC.len();
    while let Some((payload, end)) = next_record(content, offset) {
        if parsed.header.is_none() {
            let Ok(header) = rmp_serde::decode::from_read(payload) else { break };
            parsed.header = Some(header);
        } else {
            let Ok(group) = rmp_serde::decode::from_read(payload) else { break };
            parsed.groups.push(group);
        }
        offset = end;
        parsed.whole_bytes = end as u64;
    }
    Ok(parsed)
}

fn not_a_spool(path: &Path) -> SpoolError {
    SpoolError::NotASpool { path: path.to_owned() }
}

fn next_record(content: &[u8], offset: usize) -> Option<(&[u8], usize)> {
    let rest = content.get(offset..)?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let (expected, rest) = rest.split_first_chunk::<CHECKSUM_BYTES>()?;
    let length = u32::from_le_bytes(*length);
    if length > MAX_RECORD_BYTES {
        return None;
    }
    let payload = rest.get(..length as usize)?;
    (checksum(payload) == *expected).then_some((payload, offset + 4 + CHECKSUM_BYTES + payload.len()))
}

fn checksum(payload: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let digest = Sha256::digest(payload);
    std::array::from_fn(|place| digest[place])
}

fn check_same(path: &Path, found: &SpoolHeader, expected: &SpoolHeader) -> Result<(), SpoolError> {
    let facts = [
        ("window", found.window.to_string(), expected.window.to_string()),
        ("window hash", found.window_hash.to_string(), expected.window_hash.to_string()),
        ("hotkey", found.hotkey.to_string(), expected.hotkey.to_string()),
        ("checkpoint", found.checkpoint.to_string(), expected.checkpoint.to_string()),
        ("weights", found.weights.to_string(), expected.weights.to_string()),
        ("randomness", found.randomness.clone(), expected.randomness.clone()),
        ("model name", found.model_name.clone(), expected.model_name.clone()),
    ];
    let policy = found.differs_in_policy(expected).then(|| ("policy", found.policy.clone(), expected.policy.clone()));
    match facts.into_iter().chain(policy).find(|(_, found, expected)| found != expected) {
        Some((what, found, expected)) => Err(SpoolError::OtherWindow { path: path.to_owned(), what, found, expected }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> SpoolHeader {
        SpoolHeader {
            window: WindowStart::try_from(3_000).unwrap(),
            window_hash: BlockHash("0xab".into()),
            hotkey: Hotkey("5F".into()),
            checkpoint: CheckpointWindow(2_940),
            weights: WeightsHash(7),
            randomness: "ab".into(),
            use_drand: true,
            model_name: "m".into(),
            policy: "p".into(),
        }
    }

    fn group(index: i64) -> SpooledGroup {
        let rollout = SpooledRollout {
            completion: vec![1, 0, 0, 0],
            sketches: vec![2, 0, 0, 0],
            logprobs: vec![0; 4],
            eos_probability: 0.5,
            reward: 0.25,
            success: true,
            advantage: -1.0,
            commit_signature: vec![3; 64],
            row_signature: vec![4; 64],
        };
        SpooledGroup {
            group: GroupIndex(index),
            seed: EnvironmentSeed(9),
            task: "train_1".into(),
            block: BlockNumber(3_001),
            slot: 1,
            prompt: vec![5, 0, 0, 0],
            prompt_sketches: vec![6, 0, 0, 0],
            rollouts: vec![rollout; 16],
        }
    }

    fn filled(folder: &Path, groups: i64) -> PathBuf {
        let (mut spool, recovered) = Spool::open(folder, &header()).unwrap();
        assert!(recovered.groups.is_empty());
        for index in 0..groups {
            spool.append(&group(index)).unwrap();
        }
        spool.path().to_owned()
    }

    #[test]
    fn reads_back_what_was_appended() {
        let folder = tempfile::tempdir().unwrap();
        let path = filled(folder.path(), 3);
        let (found, groups) = read(&path).unwrap();
        assert_eq!(found, Some(header()));
        assert_eq!(groups, vec![group(0), group(1), group(2)]);
        let (mut spool, recovered) = Spool::open(folder.path(), &header()).unwrap();
        assert_eq!(recovered.groups.len(), 3);
        assert!(recovered.torn.is_none());
        spool.append(&group(3)).unwrap();
        assert_eq!(read(&path).unwrap().1.len(), 4);
        assert_eq!(count_groups(&path).unwrap(), 4);
        let content = std::fs::read(&path).unwrap();
        std::fs::write(&path, &content[..content.len() - 1]).unwrap();
        assert_eq!(count_groups(&path).unwrap(), 3, "a torn group does not count");
        std::fs::write(&path, b"").unwrap();
        assert_eq!(count_groups(&path).unwrap(), 0);
    }

    #[test]
    fn another_window_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        filled(folder.path(), 1);
        let other = SpoolHeader { randomness: "cd".into(), ..header() };
        let error = Spool::open(folder.path(), &other).unwrap_err().to_string();
        assert!(error.contains("randomness: ab, expected cd"), "{error}");
    }

    #[test]
    fn groups_of_another_policy_are_told_apart_and_those_of_a_version_without_it_are_kept() {
        let other = SpoolHeader { policy: "q".into(), ..header() };
        assert!(header().is_superseded_by(&other) && !header().is_superseded_by(&header()));
        assert!(header().is_superseded_by(&SpoolHeader { weights: WeightsHash(8), ..header() }));
        assert!(header().is_superseded_by(&SpoolHeader { model_name: "n".into(), ..header() }));
        let foreign = SpoolHeader { hotkey: Hotkey("5G".into()), ..other.clone() };
        assert!(!header().is_superseded_by(&foreign), "not ours to set aside");
        let folder = tempfile::tempdir().unwrap();
        filled(folder.path(), 1);
        let error = Spool::open(folder.path(), &other).unwrap_err().to_string();
        assert!(error.contains("policy: p, expected q"), "{error}");

        // As an earlier version wrote it.
        #[derive(Serialize)]
        struct Earlier {
            window: WindowStart,
            window_hash: BlockHash,
            hotkey: Hotkey,
            checkpoint: CheckpointWindow,
            weights: WeightsHash,
            randomness: String,
            use_drand: bool,
            model_name: String,
        }
        let SpoolHeader { window, window_hash, hotkey, checkpoint, weights, randomness, use_drand, model_name, .. } =
            header();
        let earlier = Earlier { window, window_hash, hotkey, checkpoint, weights, randomness, use_drand, model_name };
        let payload = rmp_serde::to_vec_named(&earlier).unwrap();
        let length = u32::try_from(payload.len()).unwrap().to_le_bytes();
        let content = [MAGIC.as_slice(), &length, &checksum(&payload), &payload].concat();
        std::fs::write(path_of(folder.path(), header().window), content).unwrap();
        let (mut spool, recovered) = Spool::open(folder.path(), &other).unwrap();
        assert!(recovered.groups.is_empty() && recovered.torn.is_none());
        spool.append(&group(0)).unwrap();
        let (found, groups) = read(spool.path()).unwrap();
        assert_eq!((found.unwrap().policy.as_str(), groups.len()), ("", 1));
    }

    #[test]
    fn a_foreign_file_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = path_of(folder.path(), header().window);
        std::fs::write(&path, b"precious notes").unwrap();
        assert!(matches!(Spool::open(folder.path(), &header()), Err(SpoolError::NotASpool { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious notes");
    }

    proptest! {
        #[test]
        fn any_cut_keeps_every_whole_group(cut in 0_usize..4_000) {
            let folder = tempfile::tempdir().unwrap();
            let path = filled(folder.path(), 2);
            let content = std::fs::read(&path).unwrap();
            let cut = cut.min(content.len());
            std::fs::write(&path, &content[..cut]).unwrap();
            let whole = parse(&content[..cut], &path).unwrap().groups.len();
            let (mut spool, recovered) = Spool::open(folder.path(), &header()).unwrap();
            prop_assert_eq!(recovered.groups.len(), whole);
            spool.append(&group(7)).unwrap();
            let (_, groups) = read(&path).unwrap();
            prop_assert_eq!(groups.len(), whole + 1);
            prop_assert_eq!(&groups[whole], &group(7));
        }

        #[test]
        fn any_flipped_byte_loses_at_most_the_groups_behind_it(place in 0_usize..4_000, mask in 1_u8..) {
            let folder = tempfile::tempdir().unwrap();
            let path = filled(folder.path(), 2);
            let mut content = std::fs::read(&path).unwrap();
            let place = place % content.len();
            content[place] ^= mask;
            if place < MAGIC.len() {
                prop_assert!(parse(&content, &path).is_err());
            } else {
                let parsed = parse(&content, &path).unwrap();
                prop_assert!(parsed.whole_bytes <= place as u64);
            }
        }
    }
}
