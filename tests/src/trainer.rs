//! The trainer of a world: it publishes into the local store what a test wants, whole or not.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise, also in its helpers")]

use std::collections::BTreeSet;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use grail_checkpoint::layout::{METADATA_FILE, ROOT, Tree, object_key, ready_key};
use grail_checkpoint::{CheckpointStore, DeltaFormat, DeltaInput, publish_delta, publish_full};
use grail_protocol::ids::CheckpointWindow;
use grail_protocol::window_file;
use grail_supervisor::demo::Demo;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use object_store::local::LocalFileSystem;
use serde_json::Value;

use crate::binaries::Run;
use crate::waiting::wait_until;
use crate::world::World;

/// The checkpoint of [`Trainer::first`].
pub const FIRST: CheckpointWindow = CheckpointWindow(2_940);
/// Ready before the first window begins.
pub const BEFORE: u64 = 2_970;
/// Ready in the first window.
pub const DURING: u64 = 3_000;

/// The store of a world, and its trainer.
#[derive(Debug)]
pub struct Trainer {
    pub folder: PathBuf,
    pub store: CheckpointStore,
    pub demo: Demo,
    runtime: tokio::runtime::Runtime,
}

impl Trainer {
    /// The trainer of `world`, whose miner is to be started with `--no-trainer`.
    #[must_use]
    pub fn of(world: &World) -> Self {
        let folder = world.state.join("store");
        std::fs::create_dir_all(&folder).unwrap();
        let objects = LocalFileSystem::new_with_prefix(&folder).unwrap();
        let store = CheckpointStore::new(Arc::new(objects));
        let demo = Demo::unpack(&world.folder.path().join("demo")).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { folder, store, demo, runtime }
    }

    /// A FULL of the files in `folder`, ready in window `ready`.
    pub fn full(&self, window: CheckpointWindow, folder: &Path, ready: u64) {
        self.runtime.block_on(publish_full(&self.store, window, folder, &self.demo.metadata_input(), ready)).unwrap();
    }

    /// The checkpoint that the first window is mined with.
    pub fn first(&self) {
        self.full(FIRST, &self.demo.first, BEFORE);
    }

    /// From the first demo checkpoint to the second, or back. Without `ready` it has no marker yet: see [`Self::ready`].
    pub fn delta(&self, window: CheckpointWindow, base_window: CheckpointWindow, ready: impl Into<Option<u64>>) {
        let (first, second) = (&*self.demo.first, &*self.demo.second);
        let (base_folder, folder) = if base_window == FIRST { (first, second) } else { (second, first) };
        let delta = DeltaInput {
            window,
            folder,
            base_window,
            base_folder,
            anchor: None,
            format: DeltaFormat::V31,
            ready: ready.into(),
        };
        self.runtime.block_on(publish_delta(&self.store, &delta, &self.demo.metadata_input())).unwrap();
    }

    /// The marker of a checkpoint.
    pub fn ready(&self, window: CheckpointWindow, ready: u64) {
        self.runtime.block_on(self.store.put_bytes(&ready_key(window, ready), Vec::new())).unwrap();
    }

    /// Where an object of the local store lies.
    #[must_use]
    pub fn object(&self, window: CheckpointWindow, tree: Tree, name: &str) -> PathBuf {
        self.folder.join(object_key(window, tree, name))
    }

    /// Changes the metadata of a tree.
    pub fn edit(&self, window: CheckpointWindow, tree: Tree, edit: impl FnOnce(&mut Value)) {
        let path = self.object(window, tree, METADATA_FILE);
        let mut document: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        edit(&mut document);
        std::fs::write(&path, document.to_string()).unwrap();
    }

    /// Cuts an object in half.
    pub fn truncate(&self, window: CheckpointWindow, tree: Tree, name: &str) {
        let file = std::fs::File::options().write(true).open(self.object(window, tree, name)).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    }

    /// Whoever asks for the object gets no answer: before each object its compressed twin is looked for, and here that is a pipe
    /// into which nobody writes. No listing shows it.
    #[must_use]
    pub fn hold_back(&self, window: CheckpointWindow, tree: Tree, name: &str) -> HeldBack {
        let pipe = self.object(window, tree, &format!("{name}.gz"));
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        HeldBack { pipe }
    }

    /// Every listing of the checkpoints fails from here on.
    #[must_use]
    pub fn break_listings(&self) -> BrokenListings {
        let loop_ = self.checkpoints().join("checkpoint-0");
        std::os::unix::fs::symlink(&loop_, &loop_).unwrap();
        BrokenListings { loop_ }
    }

    /// All checkpoints are gone; the rest of the store is not.
    #[must_use]
    pub fn take_bucket_away(&self) -> GoneBucket {
        let (place, kept) = (self.checkpoints(), self.folder.join("kept"));
        std::fs::rename(&place, &kept).unwrap();
        GoneBucket { place, kept }
    }

    fn checkpoints(&self) -> PathBuf {
        self.folder.join(ROOT)
    }
}

/// See [`Trainer::hold_back`].
#[derive(Debug)]
pub struct HeldBack {
    pipe: PathBuf,
}

impl HeldBack {
    /// The object is given to those who ask from here on.
    pub fn heal(self) {
        std::fs::remove_file(self.pipe).unwrap();
    }
}

/// See [`Trainer::break_listings`].
#[derive(Debug)]
pub struct BrokenListings {
    loop_: PathBuf,
}

impl BrokenListings {
    /// Listings succeed again.
    pub fn heal(self) {
        std::fs::remove_file(self.loop_).unwrap();
    }
}

/// See [`Trainer::take_bucket_away`].
#[derive(Debug)]
pub struct GoneBucket {
    place: PathBuf,
    kept: PathBuf,
}

impl GoneBucket {
    /// Who still waits for an object that was held back hears that it is gone.
    pub fn answer(&self, held_back: HeldBack) {
        let moved = self.kept.join(held_back.pipe.strip_prefix(&self.place).unwrap());
        // Can be opened as soon as somebody wants to read at the other end.
        let mut writer = std::fs::File::options();
        let writer = writer.write(true).custom_flags(OFlag::O_NONBLOCK.bits());
        wait_until("somebody waits for the object", || writer.open(&moved).is_ok());
        std::fs::remove_file(moved).unwrap();
    }

    /// Everything is there again.
    pub fn bring_back(self) {
        std::fs::rename(self.kept, self.place).unwrap();
    }
}

/// The checkpoints named in the window files of a world's store, in the order of the uploads.
#[must_use]
pub fn uploaded_with(world: &World) -> Vec<BTreeSet<u64>> {
    let read = |event: &Value| {
        let file = std::fs::read(world.state.join("store").join(event["key"].as_str().unwrap())).unwrap();
        let file = window_file::read_bytes(file).unwrap();
        file.rows.iter().map(|row| u64::try_from(row.checkpoint_window.unwrap()).unwrap()).collect()
    };
    world.of_kind("window_uploaded").iter().map(read).collect()
}

/// Waits for a good end, at which every window is accepted and nothing is left; gives the log.
pub fn finish(world: &World, run: Run) -> String {
    let mined = run.wait();
    assert_eq!(mined.code, Some(0), "{mined:#?}");
    let verified = world.ask(&["verify", "--local"]);
    assert_eq!(verified.code, Some(0), "{verified:#?}");
    world.assert_nothing_left();
    mined.stderr
}
