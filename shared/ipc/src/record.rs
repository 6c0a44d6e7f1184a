//! Recorded groups: a file of the jobs that workers were given, to give them again.
//!
//! Eight bytes of magic, then records: `u32` little-endian length, eight bytes of the body's SHA-256, body. The first body is
//! the header, each other one a prove request as it travels to a worker. Records are appended in one write each; a file whose
//! last one was cut short by a crash is read up to there. Nothing is synced: a recording is no record of work.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use grail_protocol::hash::sha256;
use grail_protocol::ids::GroupIndex;
use serde::{Deserialize, Serialize};

use crate::codec::{self, CodecError};
use crate::framing::{self, FrameError, HEADER_BYTES, MAX_FRAME_BYTES};
use crate::jobs::{ProveJob, ShapeError};
use crate::messages::{Epoch, RequestId, ToWorker};

/// Version of the records behind the magic.
pub const VERSION: u32 = 1;

const MAGIC: &[u8; 8] = b"GRAILREC";
const CHECKSUM_BYTES: usize = 8;

/// A recording that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    #[error("{action} recorded groups {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} holds no recorded groups: name a file that `mine --record` wrote", path.display())]
    NotARecording { path: PathBuf },
    #[error("{} has version {found}, this build reads {VERSION}: record again with this build", path.display())]
    Version { path: PathBuf, found: u32 },
    #[error("{} was recorded with model {found}, not {expected}: move it away", path.display())]
    OtherModel { path: PathBuf, found: String, expected: String },
    #[error("record group {group}")]
    Encode {
        group: GroupIndex,
        #[source]
        source: CodecError,
    },
    #[error("record group {group}")]
    Shape {
        group: GroupIndex,
        #[source]
        source: ShapeError,
    },
    #[error("record the header")]
    Header(#[source] rmp_serde::encode::Error),
    #[error("record the header")]
    HeaderTooLong(#[from] FrameError),
}

/// What was recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recording {
    /// Name of the model that the groups are of.
    pub model: String,
    pub groups: Vec<ProveJob>,
    /// Bytes at the end that are no whole record.
    pub torn_bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    version: u32,
    model: String,
}

/// Reads a recording up to its first record that is torn or damaged.
///
/// # Errors
/// [`RecordError`] if it cannot be read, or is none of this version.
pub fn read(path: &Path) -> Result<Recording, RecordError> {
    let content =
        std::fs::read(path).map_err(|source| RecordError::Io { action: "read", path: path.to_owned(), source })?;
    let parsed = parse(&content, path)?;
    match parsed.model {
        Some(model) => {
            Ok(Recording { model, groups: parsed.groups, torn_bytes: (content.len() - parsed.whole_bytes) as u64 })
        }
        None => Err(RecordError::NotARecording { path: path.to_owned() }),
    }
}

/// Appends groups to a recording; the only writer of its file.
#[derive(Debug)]
pub struct RecordWriter {
    path: PathBuf,
    file: File,
}

impl RecordWriter {
    /// Opens or begins the recording of groups of `model`. Gives the groups that it holds already; a torn tail is cut off.
    ///
    /// # Errors
    /// [`RecordError`] if it cannot be read or written, or is another file or of another model.
    pub fn open(path: &Path, model: &str) -> Result<(Self, Vec<GroupIndex>), RecordError> {
        let io = |action| move |source| RecordError::Io { action, path: path.to_owned(), source };
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(io("open"))?;
        let mut content = Vec::new();
        file.read_to_end(&mut content).map_err(io("read"))?;
        let parsed = parse(&content, path)?;
        if parsed.whole_bytes < content.len() {
            file.set_len(parsed.whole_bytes as u64).map_err(io("cut the torn tail of"))?;
        }
        match parsed.model {
            Some(found) if found != model => {
                let expected = model.to_owned();
                return Err(RecordError::OtherModel { path: path.to_owned(), found, expected });
            }
            Some(_) => {}
            None => {
                let header = Header { version: VERSION, model: model.to_owned() };
                let body = rmp_serde::to_vec_named(&header).map_err(RecordError::Header)?;
                let start = [MAGIC.as_slice(), &record(&body)?].concat();
                file.write_all(&start).map_err(io("begin"))?;
            }
        }
        let held = parsed.groups.iter().map(|job| job.group).collect();
        Ok((Self { path: path.to_owned(), file }, held))
    }

    /// Appends one group.
    ///
    /// # Errors
    /// [`RecordError`]; the tail may be torn then, so nothing more must be appended before the recording is opened again.
    pub fn append(&mut self, job: &ProveJob) -> Result<(), RecordError> {
        let group = job.group;
        // Number and incarnation are those of no request: whoever replays the group gives it its own.
        let request = job.to_request(RequestId(0), Epoch(0)).map_err(|source| RecordError::Shape { group, source })?;
        let frame = codec::encode(&ToWorker::Prove(request)).map_err(|source| RecordError::Encode { group, source })?;
        let bytes = record(&frame[HEADER_BYTES..])?;
        let io = |source| RecordError::Io { action: "append to", path: self.path.clone(), source };
        self.file.write_all(&bytes).map_err(io)
    }
}

fn record(body: &[u8]) -> Result<Vec<u8>, FrameError> {
    Ok([framing::header(body.len())?.as_slice(), &checksum(body), body].concat())
}

#[derive(Debug, Default)]
struct Parsed {
    model: Option<String>,
    groups: Vec<ProveJob>,
    whole_bytes: usize,
}

/// Whole records from the start; the first that is torn, damaged or no group ends it.
fn parse(content: &[u8], path: &Path) -> Result<Parsed, RecordError> {
    let mut parsed = Parsed::default();
    if content.len() < MAGIC.len() && MAGIC.starts_with(content) {
        return Ok(parsed);
    }
    if !content.starts_with(MAGIC) {
        return Err(RecordError::NotARecording { path: path.to_owned() });
    }
    let mut offset = MAGIC.len();
    while let Some(body) = next_body(&content[offset..]) {
        if parsed.model.is_none() {
            let Ok(header) = rmp_serde::decode::from_read::<_, Header>(body) else { break };
            if header.version != VERSION {
                return Err(RecordError::Version { path: path.to_owned(), found: header.version });
            }
            parsed.model = Some(header.model);
        } else {
            let Some(job) = decode(body) else { break };
            parsed.groups.push(job);
        }
        offset += HEADER_BYTES + CHECKSUM_BYTES + body.len();
        parsed.whole_bytes = offset;
    }
    Ok(parsed)
}

fn next_body(rest: &[u8]) -> Option<&[u8]> {
    let (length, rest) = rest.split_first_chunk::<HEADER_BYTES>()?;
    let (expected, rest) = rest.split_first_chunk::<CHECKSUM_BYTES>()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok().filter(|length| *length <= MAX_FRAME_BYTES)?;
    rest.get(..length).filter(|body| checksum(body) == *expected)
}

fn decode(body: &[u8]) -> Option<ProveJob> {
    match codec::decode(body) {
        Ok(ToWorker::Prove(request)) => ProveJob::from_request(&request).ok(),
        _ => None,
    }
}

fn checksum(body: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let digest = sha256(body);
    std::array::from_fn(|place| digest[place])
}

#[cfg(test)]
mod tests {
    use grail_protocol::ids::{TokenId, WeightsHash};
    use proptest::prelude::*;

    use super::*;

    fn jobs() -> impl Strategy<Value = Vec<ProveJob>> {
        let tokens = || prop::collection::vec(any::<u32>().prop_map(TokenId), 1..20);
        let job = (
            any::<i64>(),
            any::<u128>(),
            any::<[u8; 32]>(),
            any::<u32>(),
            tokens(),
            prop::collection::vec(tokens(), 1..5),
        );
        let job = job.prop_map(|(group, weights, randomness, eos, prompt, completions)| ProveJob {
            group: GroupIndex(group),
            weights: WeightsHash(weights),
            randomness: randomness.to_vec(),
            eos_token: TokenId(eos),
            prompt,
            completions,
        });
        prop::collection::vec(job, 0..5)
    }

    fn write(path: &Path, jobs: &[ProveJob]) {
        let (mut writer, _) = RecordWriter::open(path, "m").unwrap();
        for job in jobs {
            writer.append(job).unwrap();
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(jobs in jobs()) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("groups");
            write(&path, &jobs);
            prop_assert_eq!(read(&path).unwrap(), Recording { model: "m".into(), groups: jobs, torn_bytes: 0 });
        }

        #[test]
        fn any_cut_keeps_every_whole_group_and_can_be_gone_on_with(jobs in jobs(), cut in any::<prop::sample::Index>()) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("groups");
            write(&path, &jobs);
            let content = std::fs::read(&path).unwrap();
            let cut = cut.index(content.len());
            std::fs::write(&path, &content[..cut]).unwrap();
            let kept = parse(&content[..cut], &path).unwrap();
            prop_assert!(kept.groups.iter().eq(&jobs[..kept.groups.len()]));
            if kept.model.is_some() {
                prop_assert_eq!(read(&path).unwrap().torn_bytes, (cut - kept.whole_bytes) as u64);
            }
            let rest = &jobs[kept.groups.len()..];
            write(&path, rest);
            prop_assert_eq!(read(&path).unwrap().groups, jobs);
        }

        #[test]
        fn any_flipped_byte_loses_at_most_the_groups_behind_it(jobs in jobs(), place in any::<prop::sample::Index>(), mask in 1_u8..) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("groups");
            write(&path, &jobs);
            let mut content = std::fs::read(&path).unwrap();
            let place = place.index(content.len());
            content[place] ^= mask;
            if let Ok(parsed) = parse(&content, &path) {
                prop_assert!(parsed.whole_bytes <= place);
                prop_assert!(parsed.groups.iter().eq(&jobs[..parsed.groups.len()]));
            } else {
                prop_assert!(place < MAGIC.len());
            }
        }
    }

    #[test]
    fn another_file_version_or_model_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("groups");
        let missing = read(&path).unwrap_err();
        assert!(matches!(missing, RecordError::Io { .. }), "{missing}");
        std::fs::write(&path, b"precious notes").unwrap();
        assert!(matches!(read(&path), Err(RecordError::NotARecording { .. })));
        assert!(matches!(RecordWriter::open(&path, "m"), Err(RecordError::NotARecording { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious notes");

        std::fs::write(&path, b"").unwrap();
        assert!(matches!(read(&path), Err(RecordError::NotARecording { .. })), "nothing was begun");
        write(&path, &[]);
        let other = RecordWriter::open(&path, "other").unwrap_err().to_string();
        assert!(other.contains("recorded with model m, not other"), "{other}");

        let newer = rmp_serde::to_vec_named(&Header { version: 2, model: "m".into() }).unwrap();
        std::fs::write(&path, [MAGIC.as_slice(), &record(&newer).unwrap()].concat()).unwrap();
        let refused = read(&path).unwrap_err().to_string();
        assert!(refused.contains("has version 2, this build reads 1"), "{refused}");
    }

    #[test]
    fn opening_again_tells_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("groups");
        let job = ProveJob {
            group: GroupIndex(7),
            weights: WeightsHash(1),
            randomness: vec![1; 32],
            eos_token: TokenId(2),
            prompt: vec![TokenId(3)],
            completions: vec![vec![TokenId(4)]],
        };
        write(&path, std::slice::from_ref(&job));
        assert_eq!(RecordWriter::open(&path, "m").unwrap().1, [GroupIndex(7)]);
    }
}
