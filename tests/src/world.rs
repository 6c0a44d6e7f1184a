//! A state directory, the miner that works in it, and the commands on it.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise, also in its helpers")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use grail_protocol::window_file;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::binaries::{Finished, Run};
use crate::waiting::wait_until;
use crate::{processes, shared_memory};

/// Rollouts of a group.
const GROUP_ROWS: usize = 16;

/// A state directory, and the commands on it.
#[derive(Debug)]
pub struct World {
    pub folder: TempDir,
    pub state: PathBuf,
    variables: Vec<(String, String)>,
    /// Options of `mine` that every run gets.
    chain: Vec<&'static str>,
    segments_before: BTreeSet<String>,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// A world with windows of 45 seconds; the first begins a third of that after the first start.
    ///
    /// # Panics
    /// As all helpers here, at the first surprise.
    #[must_use]
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let segments_before = shared_memory::unused_segments();
        Self { folder, state, variables: Vec::new(), chain: vec!["--block-ms", "1500"], segments_before }
    }

    /// A world with windows of 18 seconds.
    #[must_use]
    pub fn with_short_windows() -> Self {
        Self { chain: vec!["--block-ms", "600"], ..Self::new() }
    }

    /// A world in a window that began one block ago and is longer than any test.
    #[must_use]
    pub fn in_a_window() -> Self {
        let world = Self { chain: Vec::new(), ..Self::new() };
        world.write_chain(2_999, Duration::from_secs(20), Duration::from_secs(20));
        world
    }

    /// A world whose first window comes later than any test ends.
    #[must_use]
    pub fn before_a_window() -> Self {
        let world = Self { chain: Vec::new(), ..Self::new() };
        world.write_chain(2_990, Duration::from_secs(600), Duration::ZERO);
        world
    }

    fn write_chain(&self, genesis_block: u64, block: Duration, age: Duration) {
        std::fs::create_dir_all(&self.state).unwrap();
        let genesis = SystemTime::now() - age;
        let chain = json!({
            "schema": 1,
            "seed": "grail-demo",
            "genesis_unix_ms": u64::try_from(genesis.duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap(),
            "genesis_block": genesis_block,
            "block_ms": u64::try_from(block.as_millis()).unwrap(),
        });
        std::fs::write(self.state.join("chain.json"), chain.to_string()).unwrap();
    }

    /// Waits until the chain of a miner that was started has made `block`.
    pub fn wait_for_block(&self, block: u64) {
        let chain = std::fs::read(self.state.join("chain.json")).unwrap();
        let chain: Value = serde_json::from_slice(&chain).unwrap();
        let number = |name: &str| chain[name].as_u64().unwrap();
        let since_genesis = (block - number("genesis_block")) * number("block_ms");
        let due = UNIX_EPOCH + Duration::from_millis(number("genesis_unix_ms") + since_genesis);
        wait_until("a block is made", || SystemTime::now() >= due);
    }

    /// Sets a variable for miners that are started from here on.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.set(name, value);
        self
    }

    /// As [`World::with`], between two runs.
    pub fn set(&mut self, name: &str, value: impl Into<String>) {
        self.variables.retain(|(known, _)| known != name);
        self.variables.push((name.to_owned(), value.into()));
    }

    /// A miner with these options.
    #[must_use]
    pub fn mine(&self, options: &[&str]) -> Run {
        let state = ["--state-dir", self.state.to_str().unwrap()];
        let arguments = [&["mine", "--local"], &self.chain[..], &state, options].concat();
        let variables: Vec<(&str, &str)> =
            self.variables.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        Run::start("grail-supervisor", &arguments, self.folder.path(), &variables)
    }

    /// Another command on the state directory, to its end.
    #[must_use]
    pub fn ask(&self, words: &[&str]) -> Finished {
        let arguments = [words, &["--state-dir", self.state.to_str().unwrap()]].concat();
        Run::start("grail-supervisor", &arguments, self.folder.path(), &[]).wait()
    }

    /// The JSON document that a command prints.
    pub fn ask_json(&self, words: &[&str]) -> Value {
        let finished = self.ask(&[words, &["--json"]].concat());
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        let document: Value = serde_json::from_str(&finished.stdout).unwrap();
        assert_eq!(document["schema"], 1, "{document:#}");
        document
    }

    /// Events of the journal; its last line may be half there while a miner writes.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.state.join("journal.jsonl")).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["event"].clone()).collect()
    }

    /// Events of one kind.
    #[must_use]
    pub fn of_kind(&self, kind: &str) -> Vec<Value> {
        self.events().into_iter().filter(|event| event["kind"] == kind).collect()
    }

    /// How many events of a kind there are.
    #[must_use]
    pub fn count(&self, kind: &str) -> usize {
        self.of_kind(kind).len()
    }

    /// Waits until there are `groups` events `group_spooled`.
    pub fn wait_for_groups(&self, groups: usize) {
        wait_until("groups are spooled", || self.count("group_spooled") >= groups);
    }

    /// Waits for `groups` more events `group_spooled` than there are.
    pub fn wait_for_more_groups(&self, groups: usize) {
        self.wait_for_groups(self.count("group_spooled") + groups);
    }

    /// Path of the control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.state.join("control.sock")
    }

    /// Every group with an event is in the file of the only window, once and whole, and that file is accepted.
    pub fn assert_uploaded_whole(&self) {
        let events = self.events();
        let uploaded = self.of_kind("window_uploaded");
        assert_eq!(uploaded.len(), 1, "{events:#?}");
        let window = &uploaded[0]["window"];
        let spooled: Vec<i64> = self
            .of_kind("group_spooled")
            .iter()
            .filter(|event| event["window"] == *window)
            .map(|event| event["group"].as_i64().unwrap())
            .collect();
        let distinct: BTreeSet<i64> = spooled.iter().copied().collect();
        assert_eq!(distinct.len(), spooled.len(), "no index is used twice: {spooled:?}");

        let file = self.uploaded_file(uploaded[0]["key"].as_str().unwrap());
        let mut rows: BTreeMap<i64, BTreeSet<i64>> = BTreeMap::new();
        let file = window_file::read_bytes(file).unwrap();
        for row in &file.rows {
            rows.entry(row.rollout_group.unwrap()).or_default().insert(row.rollout_index.unwrap());
        }
        assert_eq!(file.rows.len(), rows.len() * GROUP_ROWS, "no row is there twice");
        assert!(rows.values().all(|rollouts| rollouts.len() == GROUP_ROWS), "no group is half there: {rows:?}");
        let missing: Vec<&i64> = distinct.iter().filter(|group| !rows.contains_key(group)).collect();
        assert!(missing.is_empty(), "spooled, but not uploaded: {missing:?}");
        assert_eq!(self.of_kind("window_sealed").last().unwrap()["groups"], rows.len());

        let verified = self.ask(&["verify", "--local"]);
        assert_eq!(verified.code, Some(0), "{verified:#?}");
    }

    fn uploaded_file(&self, key: &str) -> Vec<u8> {
        std::fs::read(self.state.join("store").join(key)).unwrap()
    }

    /// No process, socket or shared-memory segment of a miner that has ended is left.
    pub fn assert_nothing_left(&self) {
        self.wait_for_the_end_of_all();
        assert!(!self.socket().exists(), "the control socket is removed");
        let left: Vec<_> = std::fs::read_dir(self.state.join("run")).into_iter().flatten().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
    }

    /// Waits until no process of this world lives, and sees that none has left a listening socket or a segment.
    pub fn wait_for_the_end_of_all(&self) {
        wait_until("its processes are gone", || processes::of(self.folder.path()).is_empty());
        let bound = bound_sockets(self.folder.path());
        assert!(bound.is_empty(), "{bound:?}");
        wait_until("no shared-memory segment is left", || {
            shared_memory::unused_segments().is_subset(&self.segments_before)
        });
    }
}

/// Sockets under `folder` on which some process still listens or speaks.
fn bound_sockets(folder: &Path) -> Vec<String> {
    let folder = folder.to_str().unwrap();
    let table = std::fs::read_to_string("/proc/net/unix").unwrap();
    table.lines().filter(|line| line.contains(folder)).map(str::to_owned).collect()
}
