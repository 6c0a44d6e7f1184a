//! A trainer in virtual time: it publishes whole and damaged checkpoints, marks them early, late and again, and its store goes away.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use futures::stream::{self, BoxStream, StreamExt};
use grail_checkpoint::layout::{METADATA_FILE, Tree, object_key, ready_key};
use grail_checkpoint::{
    CheckpointStore, DeltaFormat, DeltaInput, MetadataInput, WeightsFiles, publish_delta, publish_full,
};
use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use grail_supervisor::clock::Clock;
use object_store::memory::InMemory;
use object_store::path::Path as Key;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use crate::schedule::{Random, derived};
use crate::store::{Log, Seen, failure};
use crate::world::fixtures;

/// Windows in which something may happen.
pub const WINDOWS: u64 = 4;
const FIRST_WINDOW: u64 = 3_000;
const WINDOW_SECONDS: u64 = 360;
/// Checkpoints that a world can have.
const VERSIONS: u64 = 8;

/// What the trainer does at some time after the first window's begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    Full {
        checkpoint: u64,
    },
    Delta {
        checkpoint: u64,
        base: u64,
    },
    /// Half of its payload is missing.
    DamagedDelta {
        checkpoint: u64,
        base: u64,
    },
    Mark {
        checkpoint: u64,
        ready: u64,
    },
    GoAway,
    ComeBack,
}

/// Everything that the trainer does, in the order of time.
#[derive(Debug, Clone)]
pub struct Plan {
    pub acts: Vec<(Duration, Act)>,
}

/// Number of the `version`-th checkpoint.
fn number(version: u64) -> u64 {
    FIRST_WINDOW - 60 + 30 * version
}

impl Plan {
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(derived(&[seed, 77]));
        // The miner starts with a whole one.
        let before = |act| (Duration::ZERO, act);
        let first = number(0);
        let mut acts =
            vec![before(Act::Full { checkpoint: first }), before(Act::Mark { checkpoint: first, ready: first })];
        for version in 1..3 + random.below(VERSIONS - 3) {
            let (checkpoint, base) = (number(version), number(version - 1));
            let published = random.milliseconds(0..WINDOWS * WINDOW_SECONDS * 1_000);
            match random.below(10) {
                0..6 => acts.push((published, Act::Delta { checkpoint, base })),
                6..8 => acts.push((published, Act::Full { checkpoint })),
                8 => acts.push((published, Act::DamagedDelta { checkpoint, base })),
                // A marker without files.
                _ => {}
            }
            acts.push(mark(&mut random, checkpoint, published));
            if random.chance(20) {
                let again = published + random.milliseconds(1_000..WINDOW_SECONDS * 1_000);
                acts.push(mark(&mut random, number(version - 1), again));
            }
        }
        for _ in 0..random.below(3) {
            let from = random.milliseconds(0..WINDOWS * WINDOW_SECONDS * 1_000);
            acts.push((from, Act::GoAway));
            acts.push((from + random.milliseconds(2_000..200_000), Act::ComeBack));
        }
        acts.sort_by_key(|(when, _)| *when);
        Self { acts }
    }
}

/// Marks a checkpoint, now and then after the window that the marker names has ended.
fn mark(random: &mut Random, checkpoint: u64, published: Duration) -> (Duration, Act) {
    let when = published + random.milliseconds(500..20_000);
    let window = FIRST_WINDOW + when.as_secs() / WINDOW_SECONDS * 30;
    let ready = if random.chance(50) { window - 30 } else { window };
    (when, Act::Mark { checkpoint, ready })
}

/// Model folders of all versions, which differ in a few elements.
struct Models {
    _folder: tempfile::TempDir,
    versions: Vec<(PathBuf, WeightsHash)>,
}

fn models() -> &'static Models {
    static MODELS: OnceLock<Models> = OnceLock::new();
    MODELS.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let version = |version: u64| {
            let path = folder.path().join(version.to_string());
            std::fs::create_dir(&path).unwrap();
            for entry in std::fs::read_dir(&fixtures().demo.first).unwrap() {
                let entry = entry.unwrap();
                if entry.file_name() != "model.safetensors" {
                    std::fs::copy(entry.path(), path.join(entry.file_name())).unwrap();
                }
            }
            write_weights(&path.join("model.safetensors"), version);
            let hash = WeightsFiles::open(&path).unwrap().hash().unwrap();
            (path, hash)
        };
        let versions = (0..VERSIONS).map(version).collect();
        Models { _folder: folder, versions }
    })
}

fn write_weights(path: &Path, version: u64) {
    const ELEMENTS: usize = 64;
    let mut values = [0x3f80_u16; ELEMENTS];
    for step in 0..version {
        values[usize::try_from(step).unwrap() * 7] = 0x4000 + u16::try_from(step).unwrap();
    }
    let values: Vec<u8> = values.into_iter().flat_map(u16::to_le_bytes).collect();
    let entry = serde_json::json!({"dtype": "BF16", "shape": [ELEMENTS], "data_offsets": [0, 2 * ELEMENTS]});
    let header = serde_json::json!({"model.norm.weight": entry}).to_string();
    let length = u64::try_from(header.len()).unwrap().to_le_bytes();
    std::fs::write(path, [length.as_slice(), header.as_bytes(), &values].concat()).unwrap();
}

/// Weights of a checkpoint, if the trainer has such a one.
pub fn weights_of(checkpoint: CheckpointWindow) -> Option<WeightsHash> {
    let version = usize::try_from((checkpoint.0.checked_sub(number(0))?) / 30).unwrap();
    models().versions.get(version).map(|(_, weights)| *weights)
}

fn folder_of(checkpoint: u64) -> &'static Path {
    &models().versions[usize::try_from((checkpoint - number(0)) / 30).unwrap()].0
}

fn input() -> MetadataInput {
    let demo = &fixtures().demo;
    MetadataInput {
        model_name: demo.metadata.model_name.clone(),
        env_id: demo.metadata.env_id.clone(),
        env_params: demo.metadata.env_params.clone(),
        generation: demo.generation,
        thinking_mode: demo.metadata.thinking_mode,
        parent_window: None,
        training_config: serde_json::Map::new(),
        git_commit: "simulated".to_owned(),
        created_at: 0.0,
    }
}

/// The trainer's store, over all lives of the supervisor.
#[derive(Debug)]
pub struct TrainerStore {
    objects: Arc<InMemory>,
    log: Arc<Log>,
    /// Nothing can be listed or read.
    is_away: AtomicBool,
    requests: AtomicU64,
    /// Acts that are done.
    done: Mutex<usize>,
}

impl TrainerStore {
    /// A store whose listings go into `log`.
    pub fn new(log: Arc<Log>) -> Arc<Self> {
        let (is_away, requests, done) = (AtomicBool::new(false), AtomicU64::new(0), Mutex::new(0));
        Arc::new(Self { objects: Arc::default(), log, is_away, requests, done })
    }

    /// Does what `plan` says when its time comes, from where the last life ended. Ends with the plan.
    pub async fn follow(&self, plan: &Plan, clock: &Clock, begin: std::time::SystemTime) {
        loop {
            let next = *self.done.lock().unwrap();
            let Some((when, act)) = plan.acts.get(next) else { return };
            tokio::time::sleep_until(clock.instant_of(begin + *when)).await;
            // Without a pause, so that a crash leaves no act half done.
            futures::executor::block_on(self.act(act));
            *self.done.lock().unwrap() += 1;
        }
    }

    async fn act(&self, act: &Act) {
        let store = CheckpointStore::new(self.objects.clone());
        match act {
            Act::Full { checkpoint } => self.full(*checkpoint).await,
            Act::Delta { checkpoint, base } => self.delta(*checkpoint, *base).await,
            Act::DamagedDelta { checkpoint, base } => {
                self.delta(*checkpoint, *base).await;
                let key = object_key(CheckpointWindow(*checkpoint), Tree::Delta, "delta_sparse.bin.zst");
                let whole = self.objects.get(&Key::from(key.as_str())).await.unwrap().bytes().await.unwrap();
                store.put_bytes(&key, whole[..whole.len() / 2].to_vec()).await.unwrap();
            }
            Act::Mark { checkpoint, ready } => {
                store.put_bytes(&ready_key(CheckpointWindow(*checkpoint), *ready), Vec::new()).await.unwrap();
            }
            Act::GoAway => self.is_away.store(true, Ordering::Relaxed),
            Act::ComeBack => self.is_away.store(false, Ordering::Relaxed),
        }
    }

    /// Copies what is published without a marker: markers are acts of their own.
    async fn full(&self, checkpoint: u64) {
        let staged = Arc::new(InMemory::new());
        let (store, window) = (CheckpointStore::new(staged.clone()), CheckpointWindow(checkpoint));
        publish_full(&store, window, folder_of(checkpoint), &input(), 0).await.unwrap();
        let marker = ready_key(window, 0);
        let objects: Vec<_> = staged.list(None).map(|object| object.unwrap().location).collect().await;
        for key in objects.into_iter().filter(|key| key.as_ref() != marker) {
            let content = staged.get(&key).await.unwrap().bytes().await.unwrap();
            self.objects.put(&key, content.into()).await.unwrap();
        }
    }

    async fn delta(&self, checkpoint: u64, base: u64) {
        let delta = DeltaInput {
            window: CheckpointWindow(checkpoint),
            folder: folder_of(checkpoint),
            base_window: CheckpointWindow(base),
            base_folder: folder_of(base),
            anchor: None,
            format: DeltaFormat::V31,
            ready: None,
        };
        publish_delta(&CheckpointStore::new(self.objects.clone()), &delta, &input()).await.unwrap();
    }

    /// A listing and a look at metadata take their time.
    async fn answer(&self) -> Result<()> {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(1 + derived(&[number]) % 300)).await;
        if self.is_away.load(Ordering::Relaxed) { Err(failure()) } else { Ok(()) }
    }
}

impl fmt::Display for TrainerStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated trainer's store")
    }
}

/// The miner's view: it reads.
#[derive(Debug, Clone)]
pub struct TrainerView(pub Arc<TrainerStore>);

impl fmt::Display for TrainerView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[async_trait::async_trait]
impl ObjectStore for TrainerView {
    async fn put_opts(&self, _: &Key, _: PutPayload, _: PutOptions) -> Result<PutResult> {
        Err(failure())
    }

    async fn put_multipart_opts(&self, _: &Key, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Err(failure())
    }

    async fn get_opts(&self, location: &Key, options: GetOptions) -> Result<GetResult> {
        // Threads wait for the bodies of files, and virtual time stands still as long as a thread works.
        if location.filename() == Some(METADATA_FILE) {
            self.0.answer().await?;
        }
        self.0.objects.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Key>>) -> BoxStream<'static, Result<Key>> {
        locations.map(|_| Err(failure())).boxed()
    }

    fn list(&self, prefix: Option<&Key>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (store, prefix) = (self.0.clone(), prefix.cloned());
        let page = async move {
            if let Err(error) = store.answer().await {
                return vec![Err(error)];
            }
            let objects: Vec<Result<ObjectMeta>> = store.objects.list(prefix.as_ref()).collect().await;
            let keys = objects.iter().flatten().map(|object| object.location.to_string()).collect();
            store.log.add(Seen::Listed(keys));
            objects
        };
        stream::once(page).flat_map(stream::iter).boxed()
    }

    async fn list_with_delimiter(&self, _: Option<&Key>) -> Result<ListResult> {
        Err(failure())
    }

    async fn copy_opts(&self, _: &Key, _: &Key, _: CopyOptions) -> Result<()> {
        Err(failure())
    }
}
