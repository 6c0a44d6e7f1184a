//! Which checkpoint a window must be mined with, brought into a local folder with everything the supervisor reads from it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use grail_checkpoint::install::Wanted;
use grail_checkpoint::retention::RetentionLimits;
use grail_checkpoint::{
    CacheError, CheckpointCache, CheckpointStore, ChooseError, FailureClass, Hold, InstallError, Installed, Listing,
    MiningPolicy, StoreError,
};
use grail_ipc::messages::ChangeSet;
use grail_process::with_causes;
use grail_protocol::ids::{CheckpointWindow, TokenId, WindowStart};
use grail_text::{ChatTemplate, Tokenizer};
use serde::Deserialize;
use tokio::sync::watch;

/// Limit that the reference assumes when a model's config has none.
const DEFAULT_MAX_POSITIONS: usize = 16_384;

/// A checkpoint that cannot be mined with; the window is skipped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    #[error(transparent)]
    Choose(#[from] ChooseError),
    #[error("read the metadata of checkpoint {checkpoint}")]
    Metadata { checkpoint: CheckpointWindow, source: StoreError },
    #[error("metadata of checkpoint {checkpoint} does not say how to mine")]
    Policy { checkpoint: CheckpointWindow, source: grail_checkpoint::metadata::PolicyError },
    #[error("install checkpoint {checkpoint}")]
    Install { checkpoint: CheckpointWindow, source: Box<InstallError> },
    #[error("use the files of checkpoint {checkpoint}")]
    Files { checkpoint: CheckpointWindow, source: FilesError },
}

impl CheckpointError {
    /// Whether the trainer's store gave no answer that speaks against `known`, which it named before.
    #[must_use]
    pub fn leaves_open(&self, known: CheckpointWindow) -> bool {
        match self {
            Self::Choose(ChooseError::Store(_)) => true,
            Self::Metadata { checkpoint, .. } => *checkpoint == known,
            _ => false,
        }
    }

    /// Whether what was published is at fault: the next checkpoint may be whole again, so a miner waits for it.
    #[must_use]
    pub fn is_of_the_trainer(&self) -> bool {
        match self {
            Self::Policy { .. } => true,
            Self::Install { source, .. } => {
                use FailureClass::{Denied, Local, NoSpace, Weights};
                !matches!(source.class(), Denied | Local | NoSpace | Weights)
            }
            Self::Choose(_) | Self::Metadata { .. } | Self::Files { .. } => false,
        }
    }
}

/// Files of a checkpoint folder that the supervisor cannot use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilesError {
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} is no model configuration: {detail}", path.display())]
    Config { path: PathBuf, detail: String },
    #[error(transparent)]
    Text(#[from] grail_text::LoadError),
    #[error("the tokenizer in {} names no eos_token", folder.display())]
    NoEos { folder: PathBuf },
    #[error("loading task failed")]
    Task(#[from] tokio::task::JoinError),
}

/// What the supervisor reads from a checkpoint folder: everything but the weights.
#[derive(Debug, Clone)]
pub struct CheckpointFiles {
    pub tokenizer: Arc<Tokenizer>,
    pub template: Arc<ChatTemplate>,
    /// The tokenizer's EOS: the only token in which a completion may end early.
    pub eos_token: TokenId,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
}

#[derive(Debug, Deserialize)]
struct ModelFacts {
    vocab_size: usize,
    max_position_embeddings: Option<usize>,
}

impl CheckpointFiles {
    /// Reads `config.json`, the tokenizer and its chat template.
    ///
    /// # Errors
    /// [`FilesError`] names the file.
    pub fn read(folder: &Path) -> Result<Self, FilesError> {
        let path = folder.join("config.json");
        let text = std::fs::read(&path).map_err(|source| FilesError::Read { path: path.clone(), source })?;
        let facts: ModelFacts =
            serde_json::from_slice(&text).map_err(|error| FilesError::Config { path, detail: error.to_string() })?;
        let tokenizer = Tokenizer::from_dir(folder)?;
        let template = ChatTemplate::from_dir(folder)?;
        let eos_token = tokenizer.eos_token_id().ok_or_else(|| FilesError::NoEos { folder: folder.to_owned() })?;
        Ok(Self {
            tokenizer: Arc::new(tokenizer),
            template: Arc::new(template),
            eos_token,
            vocab_size: facts.vocab_size,
            max_position_embeddings: facts.max_position_embeddings.unwrap_or(DEFAULT_MAX_POSITIONS),
        })
    }
}

/// A checkpoint ready to mine with.
#[derive(Debug, Clone)]
pub struct ReadyCheckpoint {
    pub installed: Installed,
    pub policy: MiningPolicy,
    /// Goes into every commit: the metadata's model name, or the folder.
    pub model_name: String,
    pub files: CheckpointFiles,
    /// The ways to its weights from those of earlier checkpoints, oldest first.
    pub changes: Vec<ChangeSet>,
}

/// Longest time in which the metadata of a checkpoint that is here is read again: nothing waits for more.
const REREAD_LIMIT: Duration = Duration::from_secs(5);

/// Checkpoints that are remembered with all that was read of them.
const REMEMBERED: usize = 4;

/// Resolves and installs checkpoints, ahead of their windows where it can. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Checkpoints(Arc<Service>);

#[derive(Debug)]
struct Service {
    store: CheckpointStore,
    cache: CheckpointCache,
    retention: RetentionLimits,
    /// One installation at a time: they share disk and network, and one is often the base of the next.
    turn: tokio::sync::Mutex<()>,
    known: Mutex<Known>,
    /// What a window waits for.
    demanded: watch::Sender<Option<CheckpointWindow>>,
    /// The last complete listing, by when it was begun.
    listing: watch::Sender<Option<(u64, Arc<Listing>)>>,
    listings: AtomicU64,
}

#[derive(Debug, Default)]
struct Known {
    ready: BTreeMap<CheckpointWindow, Arc<ReadyCheckpoint>>,
    /// The one that is mined with.
    active: Option<CheckpointWindow>,
    /// What keeps operators' commands and other processes from removing folders that are in use.
    held: BTreeMap<CheckpointWindow, Hold>,
}

impl Checkpoints {
    /// From the trainer's `store` into `cache`, which keeps as much as `retention` says.
    #[must_use]
    pub fn new(store: CheckpointStore, cache: CheckpointCache, retention: RetentionLimits) -> Self {
        let (demanded, _) = watch::channel(None);
        let (listing, _) = watch::channel(None);
        let (turn, known, listings) = (tokio::sync::Mutex::default(), Mutex::default(), AtomicU64::new(0));
        Self(Arc::new(Service { store, cache, retention, turn, known, demanded, listing, listings }))
    }

    /// The checkpoint that `window` must be mined with, by a fresh and complete listing.
    ///
    /// # Errors
    /// [`CheckpointError`]: the window must not be mined.
    pub async fn for_window(&self, window: WindowStart) -> Result<Arc<ReadyCheckpoint>, CheckpointError> {
        let listing = self.list().await?;
        let checkpoint = self.0.store.choose_from(&listing, window)?.checkpoint;
        // What is fetched ahead of its time makes room.
        self.0.demanded.send_replace(Some(checkpoint));
        self.obtain(checkpoint).await
    }

    /// A fresh listing, which whoever looks out for another answer of the rule gets too.
    ///
    /// # Errors
    /// [`CheckpointError::Choose`]: nothing is known of what the store holds.
    pub async fn list(&self) -> Result<Arc<Listing>, CheckpointError> {
        let number = self.0.listings.fetch_add(1, Ordering::Relaxed);
        let listing = Arc::new(self.0.store.list().await.map_err(ChooseError::from)?);
        self.0.listing.send_if_modified(|last| {
            // One that was begun before may end after, and knows less.
            let is_newer = last.as_ref().is_none_or(|(before, _)| *before < number);
            if is_newer {
                *last = Some((number, listing.clone()));
            }
            is_newer
        });
        Ok(listing)
    }

    /// Installs a checkpoint, unless it is there, and reads its files.
    ///
    /// # Errors
    /// [`CheckpointError`].
    pub async fn obtain(&self, checkpoint: CheckpointWindow) -> Result<Arc<ReadyCheckpoint>, CheckpointError> {
        let _turn = self.0.turn.lock().await;
        let ready = self.known().ready.get(&checkpoint).cloned();
        // One that nobody needed for a while may have left the cache.
        if let Some(ready) = ready
            && self.hold(checkpoint).await
            && self.is_kept(&ready).await
        {
            return Ok(ready);
        }
        let ready = Arc::new(self.prepare(checkpoint).await?);
        let mut known = self.known();
        known.ready.insert(checkpoint, ready.clone());
        while known.ready.len() > REMEMBERED {
            let active = known.active;
            let oldest = known.ready.keys().copied().find(|window| Some(*window) != active && *window != checkpoint);
            let Some(oldest) = oldest else { break };
            known.ready.remove(&oldest);
        }
        Ok(ready)
    }

    /// A checkpoint as it lies in the cache, every file verified, without a word of the trainer's store; `None` if it is not whole.
    pub async fn cached(&self, checkpoint: CheckpointWindow) -> Option<Arc<ReadyCheckpoint>> {
        let _turn = self.0.turn.lock().await;
        if let Some(ready) = self.known().ready.get(&checkpoint) {
            return Some(ready.clone());
        }
        self.hold(checkpoint).await;
        let cache = self.0.cache.clone();
        let entry = tokio::task::spawn_blocking(move || cache.inspect(checkpoint)).await.ok()?;
        let grail_checkpoint::cache::Entry::Installed(installed) = entry else { return None };
        let policy = installed.metadata.policy().ok()?.clone();
        let ready = Arc::new(self.read(*installed, policy).await.ok()?);
        self.known().ready.insert(checkpoint, ready.clone());
        Some(ready)
    }

    /// Whether a checkpoint that is here is still what the trainer publishes, or has to stay because it is mined with: validators
    /// that run keep the version that they began with. One that was only fetched ahead is to be fetched anew.
    async fn is_kept(&self, ready: &ReadyCheckpoint) -> bool {
        let checkpoint = ready.installed.window;
        let published = match tokio::time::timeout(REREAD_LIMIT, self.0.store.published(checkpoint)).await {
            Ok(Ok(published)) => published,
            Ok(Err(error)) => {
                tracing::debug!(%checkpoint, error = with_causes(&error), "The metadata was not read again.");
                return true;
            }
            Err(_) => return true,
        };
        let files = ready.installed.republished(&published).map(|notice| notice.to_string());
        // Another policy is another way to mine, also with the same weights; one that is defective now is one not to mine by.
        let policy = || published.policy().ok() != Some(&ready.policy);
        let Some(notice) = files.or_else(|| policy().then(|| "its policy is another one".to_owned())) else {
            return true;
        };
        let mut known = self.known();
        if known.active == Some(checkpoint) {
            tracing::warn!(%checkpoint, notice, "The checkpoint in use is not what is published now.");
            return true;
        }
        // The installation says what it makes of that; a folder that is held would stay.
        known.held.remove(&checkpoint);
        known.ready.remove(&checkpoint);
        false
    }

    /// Ends when a window begins, from now on, to wait for another checkpoint than `checkpoint`.
    pub fn other_demanded(&self, checkpoint: CheckpointWindow) -> impl Future<Output = ()> + Send + use<> {
        let mut demanded = self.0.demanded.subscribe();
        async move {
            while demanded.changed().await.is_ok() {
                if demanded.borrow_and_update().is_some_and(|demanded| demanded != checkpoint) {
                    return;
                }
            }
            std::future::pending().await
        }
    }

    /// The checkpoint that is mined with.
    #[must_use]
    pub fn active(&self) -> Option<CheckpointWindow> {
        self.known().active
    }

    /// Notes what is mined with from now on. What was in use before stays held until [`Checkpoints::let_go`].
    pub async fn activate(&self, checkpoint: CheckpointWindow) {
        let in_use = {
            let mut known = self.known();
            known.active = Some(checkpoint);
            known.in_use()
        };
        for window in &in_use {
            self.hold(*window).await;
        }
    }

    /// Lets go of what nobody uses any more, and has the cache remove what the limits do not allow, in a task of its own: a window
    /// never waits for that.
    pub fn let_go(&self) {
        let in_use = {
            let mut known = self.known();
            let in_use = known.in_use();
            known.held.retain(|window, _| in_use.contains(window));
            in_use
        };
        let checkpoints = self.clone();
        tokio::spawn(async move { checkpoints.prune(&in_use, checkpoints.0.retention).await });
    }

    /// Removes what `limits` do not allow, unless another process or task is using the cache.
    async fn prune(&self, in_use: &BTreeSet<CheckpointWindow>, limits: RetentionLimits) {
        match self.0.cache.clone().with_lock_wait(Duration::ZERO).prune(in_use, &limits).await {
            Ok(pruned) if pruned.is_empty() => {}
            Ok(pruned) => {
                let windows: Vec<String> = pruned.iter().map(|pruned| pruned.window.to_string()).collect();
                tracing::info!(checkpoints = windows.join(", "), "Removed old checkpoints from the cache.");
            }
            // The next window's end tries again.
            Err(CacheError::Locked { .. }) => {
                tracing::debug!("The cache is being installed into; it is cleaned later.")
            }
            Err(error) => tracing::warn!(error = with_causes(&error), "Old checkpoints could not be removed."),
        }
    }

    /// Installs into the cache. A full disk gets all the room that checkpoints take which nobody uses.
    async fn install(&self, published: &grail_checkpoint::Published) -> Result<Installed, InstallError> {
        let active = self.known().active;
        let in_use = active == Some(published.window);
        // The trainer's key comes with the chain; until then its signatures are not checked, as no validator checks them.
        let wanted = Wanted { prefer_base: active, in_use, ..Wanted::default() };
        match self.0.cache.install(&self.0.store, published, &wanted).await {
            Err(error) if error.is_disk_full() => {
                tracing::warn!(checkpoint = %published.window, error = with_causes(&error),
                    "No room for a checkpoint; those that nobody uses make room.");
                let limits = RetentionLimits { checkpoints: 0, bytes: 0, max_age: None };
                self.prune(&self.in_use(), limits).await;
                self.0.cache.install(&self.0.store, published, &wanted).await
            }
            installed => installed,
        }
    }

    /// The checkpoint that is mined with, and the others whose folders must stay.
    #[must_use]
    pub fn in_use(&self) -> BTreeSet<CheckpointWindow> {
        self.known().in_use()
    }

    /// Looks out for another answer of the rule for `window`, which is mined with `checkpoint`.
    #[must_use]
    pub fn rule(&self, window: WindowStart, checkpoint: CheckpointWindow) -> Arc<dyn CheckpointRule> {
        Arc::new(Lookout { checkpoints: self.clone(), window, checkpoint })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the folder of a checkpoint, until others are in use. Whether there is one.
    async fn hold(&self, checkpoint: CheckpointWindow) -> bool {
        match self.0.cache.hold(checkpoint).await {
            Ok(Some(hold)) => {
                self.known().held.insert(checkpoint, hold);
                true
            }
            Ok(None) => false,
            Err(error) => {
                tracing::warn!(%checkpoint, error = with_causes(&error), "A checkpoint in use could not be held.");
                true
            }
        }
    }

    async fn prepare(&self, checkpoint: CheckpointWindow) -> Result<ReadyCheckpoint, CheckpointError> {
        let published = self
            .0
            .store
            .published(checkpoint)
            .await
            .map_err(|source| CheckpointError::Metadata { checkpoint, source })?;
        let policy = published.policy().map_err(|source| CheckpointError::Policy { checkpoint, source })?.clone();
        let installed = self
            .install(&published)
            .await
            .map_err(|source| CheckpointError::Install { checkpoint, source: Box::new(source) })?;
        self.hold(checkpoint).await;
        self.read(installed, policy).await
    }

    /// What the supervisor needs of an installed checkpoint beside its weights.
    async fn read(&self, installed: Installed, policy: MiningPolicy) -> Result<ReadyCheckpoint, CheckpointError> {
        let checkpoint = installed.window;
        let folder = installed.folder.clone();
        let files = tokio::task::spawn_blocking(move || CheckpointFiles::read(&folder))
            .await
            .unwrap_or_else(|error| Err(error.into()))
            .map_err(|source| CheckpointError::Files { checkpoint, source })?;
        let model_name =
            installed.metadata.model_name.clone().unwrap_or_else(|| installed.folder.to_string_lossy().into_owned());
        let changes = self.known().ways_to(&installed);
        Ok(ReadyCheckpoint { installed, policy, model_name, files, changes })
    }
}

impl Known {
    /// The active checkpoint, what it was made from, and what was fetched ahead.
    fn in_use(&self) -> BTreeSet<CheckpointWindow> {
        let active = self.active.and_then(|active| self.ready.get(&active));
        let base = active.and_then(|active| active.installed.changes.as_ref()).map(|changes| changes.base_window);
        let ahead = self.ready.keys().copied().filter(|window| Some(*window) > self.active);
        ahead.chain(self.active).chain(base).collect()
    }

    /// The change sets that lead to `installed`, through the checkpoints that are remembered.
    fn ways_to(&self, installed: &Installed) -> Vec<ChangeSet> {
        let mut ways: Vec<ChangeSet> = Vec::new();
        let mut step = installed.changes.as_ref().map(|changes| (changes, installed.weights_hash));
        while let Some((changes, weights)) = step {
            let file = changes.file.to_string_lossy().into_owned();
            ways.push(ChangeSet { base: changes.base, weights, file });
            let before = self.ready.get(&changes.base_window).map(|before| &before.installed);
            let before = before.filter(|before| before.weights_hash == changes.base && ways.len() < REMEMBERED);
            step = before.and_then(|before| Some((before.changes.as_ref()?, before.weights_hash)));
        }
        ways.reverse();
        ways
    }
}

/// What becomes of a window's answer while the window is mined.
pub trait CheckpointRule: Send + Sync + std::fmt::Debug {
    /// Waits until the rule names another checkpoint.
    fn other(&self) -> BoxFuture<'_, CheckpointWindow>;

    /// The other checkpoint that the rule names now, if it does: the last look before an upload.
    fn look(&self) -> BoxFuture<'_, Option<CheckpointWindow>>;

    /// The other checkpoint that is known of without asking.
    fn known(&self) -> Option<CheckpointWindow>;
}

/// A READY marker may appear after its window has ended, and validators evaluate the rule later than we did.
#[derive(Debug)]
struct Lookout {
    checkpoints: Checkpoints,
    window: WindowStart,
    checkpoint: CheckpointWindow,
}

/// The upload does not wait longer for the last look.
const LAST_LOOK_LIMIT: Duration = Duration::from_secs(5);

impl Lookout {
    /// The answer of the last complete listing, if it is another one.
    fn other_known(&self) -> Option<CheckpointWindow> {
        let last = self.checkpoints.0.listing.borrow().as_ref().map(|(_, listing)| listing.clone());
        let choice = last?.resolve(self.window)?;
        (choice.checkpoint != self.checkpoint).then_some(choice.checkpoint)
    }
}

impl CheckpointRule for Lookout {
    fn other(&self) -> BoxFuture<'_, CheckpointWindow> {
        async move {
            let mut listings = self.checkpoints.0.listing.subscribe();
            loop {
                listings.borrow_and_update();
                if let Some(other) = self.other_known() {
                    return other;
                }
                if listings.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        }
        .boxed()
    }

    fn known(&self) -> Option<CheckpointWindow> {
        self.other_known()
    }

    fn look(&self) -> BoxFuture<'_, Option<CheckpointWindow>> {
        async move {
            match tokio::time::timeout(LAST_LOOK_LIMIT, self.checkpoints.list()).await {
                Ok(Ok(_)) => {}
                // The answer of the last complete listing stands, whoever asked for it.
                Ok(Err(error)) => {
                    tracing::warn!(window = %self.window, error = with_causes(&error), "No last look at the checkpoints.");
                }
                Err(_) => {
                    tracing::warn!(window = %self.window, limit = ?LAST_LOOK_LIMIT, "No last look at the checkpoints.");
                }
            }
            self.other_known()
        }
        .boxed()
    }
}
