//! The journal: one JSON line for each thing that an operator, or a test, may ask about later.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use grail_protocol::ids::{BlockNumber, CheckpointWindow, GroupIndex, WeightsHash, WindowStart};
use serde::{Deserialize, Serialize};

use crate::clock::Clock;
use crate::progress::{LastUpload, Progress};

/// Name of the journal in the state directory.
pub const FILE: &str = "journal.jsonl";

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Event {
    Started {
        pid: u32,
        build: String,
    },
    WorkerReady {
        slot: u32,
        pid: u32,
        epoch: u64,
    },
    /// Its process took other weights, proven by their checksum.
    WorkerRolled {
        slot: u32,
        epoch: u64,
        weights: WeightsHash,
        /// Microseconds in which it could not prove.
        stall_us: u64,
        /// Whether only what changed was applied, instead of reading the checkpoint's folder.
        from_changes: bool,
        in_shadow: bool,
    },
    WorkerLost {
        slot: u32,
        epoch: u64,
        cause: String,
    },
    /// The slot stays empty until an operator or its timer releases it.
    WorkerGivenUp {
        slot: u32,
        reason: String,
    },
    ServerReady {
        url: String,
        incarnation: u64,
    },
    ServerLost {
        cause: String,
    },
    /// Its canary shows other weights than it says it has.
    ServerRefuted {
        weights: WeightsHash,
        reason: String,
    },
    /// The checkpoint lies verified on this host, before a window needs it or when it does.
    CheckpointInstalled {
        checkpoint: CheckpointWindow,
        weights: WeightsHash,
    },
    CheckpointActive {
        checkpoint: CheckpointWindow,
        weights: WeightsHash,
    },
    WindowStarted {
        window: WindowStart,
        block: BlockNumber,
        checkpoint: CheckpointWindow,
        recovered_groups: usize,
    },
    WindowSkipped {
        window: WindowStart,
        reason: String,
    },
    /// Another checkpoint turned out to be the window's: what was made with the first one is set aside.
    WindowRestarted {
        window: WindowStart,
        checkpoint: CheckpointWindow,
        groups: usize,
    },
    /// The group is on disk: from here on it must reach the window file.
    GroupSpooled {
        window: WindowStart,
        group: GroupIndex,
        slot: u32,
        successes: usize,
    },
    GroupDropped {
        window: WindowStart,
        group: GroupIndex,
        reason: String,
    },
    WindowSealed {
        window: WindowStart,
        groups: usize,
        rollouts: usize,
        bytes: usize,
        sha256: String,
    },
    WindowUploaded {
        window: WindowStart,
        key: String,
        bytes: usize,
        /// From the last group to the confirmed file; unset if a crash lay between.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        took_ms: Option<u64>,
    },
    /// Its file was taken out of the store again: another checkpoint turned out to be the window's.
    WindowWithdrawn {
        window: WindowStart,
        key: String,
    },
    WindowLost {
        window: WindowStart,
        reason: String,
    },
    Stopped {
        reason: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    unix_ms: u64,
    event: Event,
}

/// Append-only writer of the journal.
#[derive(Debug)]
pub struct Journal {
    file: File,
    clock: Clock,
    /// The file ends inside a line.
    torn: bool,
    /// Who follows what is recorded.
    follower: Option<Arc<Progress>>,
}

fn ends_inside_a_line(file: &mut File) -> io::Result<bool> {
    if file.metadata()?.len() == 0 {
        return Ok(false);
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last != *b"\n")
}

impl Journal {
    /// Opens or creates the journal of a state directory.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(state_dir: &Path, clock: Clock) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(state_dir.join(FILE))?;
        // A line that a crash or a full disk cut short must not swallow the next one.
        let torn = ends_inside_a_line(&mut file)?;
        Ok(Self { file, clock, torn, follower: None })
    }

    /// Has `progress` hear of every event from now on.
    #[must_use]
    pub fn followed_by(self, progress: Arc<Progress>) -> Self {
        Self { follower: Some(progress), ..self }
    }

    /// Appends one event, in one write, so that lines of a crash are whole or absent.
    pub fn record(&mut self, event: Event) {
        let since = self.clock.now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let line = Line { unix_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX), event };
        if let Some(progress) = &self.follower {
            progress.note(&line.event, line.unix_ms);
        }
        let written = serde_json::to_vec(&line).map_err(io::Error::from).and_then(|mut text| {
            text.push(b'\n');
            // Children's events are written through a file of their own: its half line must not swallow an upload.
            let is_of_the_store = matches!(line.event, Event::WindowUploaded { .. } | Event::WindowWithdrawn { .. });
            if self.torn || is_of_the_store && ends_inside_a_line(&mut self.file)? {
                text.insert(0, b'\n');
            }
            self.torn = true;
            self.file.write_all(&text)?;
            self.torn = false;
            // A confirmed upload must be known after a power loss: the window must not be put again.
            if is_of_the_store { self.file.sync_data() } else { Ok(()) }
        });
        // The journal informs; the spool is the truth. A full disk must not stop the window over it.
        if let Err(error) = written {
            tracing::warn!(%error, event = ?line.event, "The journal could not be written.");
        }
    }
}

/// All events of a journal, oldest first; lines that are torn or of a newer version are left out.
///
/// # Errors
/// If the file cannot be read.
pub fn read(state_dir: &Path) -> io::Result<Vec<Event>> {
    let bytes = std::fs::read(state_dir.join(FILE))?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok()).map(|line| line.event).collect())
}

/// Every window whose upload was confirmed. Reads line by line: a journal of weeks is long.
///
/// # Errors
/// If the file is there and cannot be read.
pub fn uploads(state_dir: &Path) -> io::Result<BTreeMap<WindowStart, LastUpload>> {
    let file = match File::open(state_dir.join(FILE)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(error),
    };
    let mut uploads = BTreeMap::new();
    let mut reader = BufReader::new(file);
    let mut text = Vec::new();
    while reader.read_until(b'\n', &mut text)? > 0 {
        // Most lines are of groups; they are not worth parsing here.
        if (contains(&text, b"window_uploaded") || contains(&text, b"window_withdrawn"))
            && let Ok(line) = serde_json::from_slice::<Line>(&text)
        {
            match line.event {
                Event::WindowUploaded { window, bytes, took_ms, .. } => {
                    let window_start = window.block().0;
                    uploads.insert(window, LastUpload { window: window_start, bytes, unix_ms: line.unix_ms, took_ms });
                }
                Event::WindowWithdrawn { window, .. } => drop(uploads.remove(&window)),
                _ => {}
            }
        }
        text.clear();
    }
    Ok(uploads)
}

fn contains(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|part| part == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_back_in_order_and_torn_lines_are_left_out() {
        let state = tempfile::tempdir().unwrap();
        let started = Event::Started { pid: 1, build: "0".into() };
        let stopped = Event::Stopped { reason: "done".into() };
        let mut journal = Journal::open(state.path(), Clock::system()).unwrap();
        journal.record(started.clone());
        journal.file.write_all(b"{\"unix_ms\": 1, \"ev").unwrap();
        let mut journal = Journal::open(state.path(), Clock::system()).unwrap();
        journal.record(stopped.clone());
        assert_eq!(read(state.path()).unwrap(), vec![started, stopped]);
    }

    #[test]
    fn uploads_are_found_among_everything_else() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(uploads(state.path()).unwrap(), BTreeMap::new());
        let progress = Arc::new(Progress::default());
        let mut journal = Journal::open(state.path(), Clock::system()).unwrap().followed_by(progress.clone());
        let window = |block| WindowStart::try_from(block).unwrap();
        journal.record(Event::WindowUploaded { window: window(3_000), key: "k".into(), bytes: 7, took_ms: Some(9) });
        journal.record(Event::WindowUploaded { window: window(3_060), key: "k".into(), bytes: 8, took_ms: None });
        journal.record(Event::WindowWithdrawn { window: window(3_060), key: "k".into() });
        journal.record(Event::WindowLost { window: window(3_030), reason: "window_uploaded".into() });
        journal.file.write_all(b"{\"unix_ms\": 1, \"window_uploaded").unwrap();
        let found = uploads(state.path()).unwrap();
        let last = LastUpload { window: 3_000, bytes: 7, unix_ms: found[&window(3_000)].unix_ms, took_ms: Some(9) };
        assert_eq!(found, BTreeMap::from([(window(3_000), last)]), "the other one was withdrawn");
        assert_eq!(progress.last_upload().unwrap().window, 3_060);
    }
}
