//! From the store into the cache: the cheapest way is taken, what it brings is verified, and only then it gets its name.

mod build;
mod error;
mod preview;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use grail_protocol::ids::CheckpointWindow;
use nix::sys::statvfs::statvfs;

use crate::blocking::blocking;
use crate::cache::{
    CacheError, CheckpointCache, Entry, Installed, MadeFrom, Notice, PartialFolder, Record, published_hash,
};
use crate::durable;
use crate::fetch::Fetcher;
use crate::layout::{METADATA_FILE, SIGNATURE_FILE, Tree, object_key};
use crate::manifest::Manifest;
use crate::metadata::{Metadata, Published, PublishedHash};
use crate::progress::{Meter, ProgressFn};
use crate::routes::{Base, Route, Routes};
use crate::signature::SignatureCheck;
use crate::store::{CheckpointStore, Listing};
use crate::weights::HashAgreement;

pub use error::{ChainError, FailureClass, InstallError, MetadataErrorOfTrees};
pub use preview::{KnownRoutes, RouteBase, RouteSummary};

/// What the caller wants beside the checkpoint.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The checkpoint in use: [`Installed::changes`] relative to it are worth a few bytes more.
    pub prefer_base: Option<CheckpointWindow>,
    /// Whether windows are mined with the cached folder of this very checkpoint, so that it stays even if the trainer has
    /// published something else under its window since.
    pub in_use: bool,
    pub progress: Option<ProgressFn>,
    /// Verifies the trainer's signature, where its key is known.
    pub signature: Option<SignatureCheck>,
}

/// A checkpoint that is complete but has no name yet.
#[derive(Debug)]
struct Made {
    partial: PartialFolder,
    metadata: Metadata,
    record: Record,
}

impl Made {
    /// Whether nothing about the weights is left to doubt. Files with the right sha256 are what validators run too, so a full
    /// tree without a hash is certain; deltas without one are not, because their base may be another.
    fn is_certain(&self) -> bool {
        match self.record.agreement {
            HashAgreement::Equal | HashAgreement::EqualWithTiedHead => true,
            HashAgreement::NotPublished => self.record.made_from == MadeFrom::Full,
            HashAgreement::Different => false,
        }
    }
}

/// One installation.
#[derive(Debug)]
struct Job<'a> {
    cache: &'a CheckpointCache,
    store: &'a CheckpointStore,
    listing: &'a Listing,
    window: CheckpointWindow,
    wanted: &'a Wanted,
}

impl CheckpointCache {
    /// Brings a checkpoint into the cache and returns its folder. A folder that is there and verifies is used as it is,
    /// unless the trainer has published something else under the same window since. Otherwise the cheapest way is taken, by
    /// the bytes of one listing: deltas on top of a cached checkpoint, the nearest complete full tree with deltas, the full
    /// tree of the checkpoint itself; if one fails, the next. What was downloaded stays for the next call if the store was
    /// the reason, so that it goes on where it was.
    ///
    /// Call it once per change of checkpoint: it reads all files of a cached folder. Nothing is held for the caller:
    /// [`Self::hold`] keeps other processes from pruning the folder.
    ///
    /// # Errors
    /// [`InstallError`]; the cache then has no folder of this checkpoint, or the one it had.
    pub async fn install(
        &self,
        store: &CheckpointStore,
        published: &Published,
        wanted: &Wanted,
    ) -> Result<Installed, InstallError> {
        let window = published.window;
        let _lock = self.lock().await?;
        for path in self.sweep_partials()? {
            tracing::info!(path = %path.display(), "Removed an unfinished checkpoint folder.");
        }
        let mut notices = Vec::new();
        if let Some(mut installed) = self.cached(published, wanted, &mut notices).await? {
            tracing::info!(checkpoint = %window, weights = %installed.weights_hash, "Checkpoint is in the cache.");
            installed.notices = report(window, notices);
            return Ok(installed);
        }
        let started = Instant::now();
        let listing = store.list().await.map_err(|source| InstallError::List { window, source })?;
        let job = Job { cache: self, store, listing: &listing, window, wanted };
        let mut fetched = BTreeSet::new();
        let made = job.make(published, &mut fetched).await;
        // What came from a store that failed may be gone on with; what came from a defective checkpoint may not.
        let keep = made.as_ref().is_err_and(|error| error.class().is_transient());
        if !keep {
            self.remove_downloads(|window| fetched.contains(&window))?;
        }
        self.sweep_downloads()?;
        let made = made?;
        notices.extend(job.check_signatures(published).await);
        let mut installed = self.finish(made)?;
        match installed.agreement {
            HashAgreement::Different => notices.push(Notice::HashDiffers),
            HashAgreement::NotPublished => notices.push(Notice::HashNotPublished),
            HashAgreement::Equal | HashAgreement::EqualWithTiedHead => {}
        }
        installed.notices = report(window, notices);
        tracing::info!(checkpoint = %window, weights = %installed.weights_hash, made_from = ?installed.made_from,
            seconds = started.elapsed().as_secs_f64(), folder = %installed.folder.display(), "Checkpoint installed.");
        Ok(installed)
    }

    /// The cached folder, if it is sound and still what is published, or if it has to stay all the same.
    async fn cached(
        &self,
        published: &Published,
        wanted: &Wanted,
        notices: &mut Vec<Notice>,
    ) -> Result<Option<Installed>, CacheError> {
        let window = published.window;
        let cache = self.clone();
        let installed = match blocking(move |interest| cache.inspect_while(window, interest)).await? {
            Entry::Absent => return Ok(None),
            Entry::Damaged(damage) => {
                tracing::warn!(checkpoint = %window, error = &damage as &dyn std::error::Error,
                    "Cached checkpoint is not used and will be fetched again.");
                return Ok(None);
            }
            Entry::Installed(installed) => *installed,
        };
        let Some((was, now)) = republished(&installed, published) else { return Ok(Some(installed)) };
        if wanted.in_use || self.is_held(window) {
            notices.push(Notice::RepublishedKept { was, now });
            return Ok(Some(installed));
        }
        notices.push(Notice::RepublishedTaken { was, now });
        Ok(None)
    }

    fn finish(&self, made: Made) -> Result<Installed, InstallError> {
        let folder = self.place(made.partial, made.metadata.window)?;
        Ok(made.record.installed(&folder, made.metadata))
    }

    fn require_space(&self, window: CheckpointWindow, needed: u64) -> Result<(), InstallError> {
        let space = statvfs(self.root()).map_err(|errno| CacheError::io(self.root(), errno.into()))?;
        let free = space.blocks_available().saturating_mul(space.fragment_size());
        if needed > free {
            return Err(InstallError::NoSpace { window, needed, free, folder: self.root().to_path_buf() });
        }
        Ok(())
    }
}

impl Job<'_> {
    /// Takes way after way until one leads to weights that nothing speaks against; `fetched` collects the checkpoints of which
    /// something was downloaded.
    async fn make(
        &self,
        published: &Published,
        fetched: &mut BTreeSet<CheckpointWindow>,
    ) -> Result<Made, InstallError> {
        let cached = self.cache.windows()?;
        let mut routes = Routes::new(self.store, self.listing, published, cached, self.wanted.prefer_base);
        let mut doubtful: Option<Made> = None;
        while let Some(route) = routes.next().await {
            fetched.extend(route.fetched());
            tracing::info!(checkpoint = %self.window, route = %route, bytes = route.bytes, "Fetching a checkpoint.");
            match self.follow(&route).await {
                Ok(made) if made.is_certain() => return Ok(made),
                Ok(made) => {
                    tracing::warn!(checkpoint = %self.window, route = %route, weights = %made.record.weights_hash,
                        agreement = ?made.record.agreement, "No published hash confirms the weights; looking for another way.");
                    routes.doubted(&route);
                    doubtful.get_or_insert(made);
                }
                Err(error) => routes.failed(&route, error),
            }
        }
        doubtful.ok_or_else(|| routes.into_error())
    }

    async fn follow(&self, route: &Route) -> Result<Made, InstallError> {
        let started = Instant::now();
        self.require_space(route)?;
        let meter = Meter::new(self.window, route.bytes, self.wanted.progress.clone());
        let fetcher = Fetcher { store: self.store, cache: self.cache, meter };
        let made = match (&route.base, route.deltas.last()) {
            (Base::Full(full), None) => self.full(&fetcher, full).await?,
            (Base::Full(full), Some(target)) => {
                let base = self.full(&fetcher, full).await?;
                let base = self.cache.finish(base)?;
                self.mirror(&fetcher, &base, target, route).await?
            }
            (Base::Cached(window), target) => {
                let base = self.cached_base(*window).await?;
                let target = target.expect("a way from a cached checkpoint has deltas");
                self.mirror(&fetcher, &base, target, route).await?
            }
        };
        let (bytes, seconds) = (fetcher.meter.received(), started.elapsed().as_secs_f64());
        tracing::info!(checkpoint = %self.window, route = %route, bytes, seconds,
            bytes_per_second = bytes as f64 / seconds, "Checkpoint fetched.");
        Ok(made)
    }

    /// A full tree as it was published.
    async fn full(&self, fetcher: &Fetcher<'_>, full: &Metadata) -> Result<Made, InstallError> {
        let window = full.window;
        let folder = fetcher.tree(full).await?;
        let manifest: Manifest = required(full)?;
        let published = full.clone();
        let weights = folder.clone();
        let record = blocking(move |interest| Record::compute(&weights, &published, interest)).await?;
        let record = record.map_err(|source| InstallError::Weights { window, source })?;
        let record = Record { made_from: MadeFrom::Full, changes: None, ..record };
        let metadata = write_document(&folder, full, &record, &manifest)?;
        Ok(Made { partial: self.cache.adopt(&folder, window)?, metadata, record })
    }

    /// Room for what is still to be fetched, and for a second copy of the weights where deltas are applied.
    fn require_space(&self, route: &Route) -> Result<(), InstallError> {
        let copy = match (&route.base, route.deltas.is_empty()) {
            (_, true) => 0,
            (Base::Full(_), false) => route.bytes,
            (Base::Cached(window), false) => build::weights_bytes(&self.cache.folder(*window)),
        };
        let here: u64 = route.trees().map(|(window, tree)| self.cache.downloaded_bytes(window, tree)).sum();
        let needed = route.bytes.saturating_sub(here).saturating_add(copy);
        let fetched: BTreeSet<CheckpointWindow> = route.fetched().collect();
        match self.cache.require_space(self.window, needed) {
            Err(InstallError::NoSpace { .. }) => {
                // Downloads of other checkpoints that could have gone on have to give way.
                self.cache.remove_downloads(|window| !fetched.contains(&window))?;
                self.cache.require_space(self.window, needed)
            }
            other => other,
        }
    }

    /// Reports what is wrong with the signatures of the checkpoint's documents.
    async fn check_signatures(&self, published: &Published) -> Vec<Notice> {
        let mut notices = Vec::new();
        let Some(check) = &self.wanted.signature else { return notices };
        for metadata in [&published.full, &published.delta].into_iter().flatten() {
            let tree = metadata.tree;
            match self.store.read(&object_key(self.window, tree, SIGNATURE_FILE)).await {
                Ok(signature) => {
                    if let Err(defect) = check.check(metadata, signature.as_deref()) {
                        notices.push(Notice::Signature { tree, defect });
                    }
                }
                Err(error) => {
                    tracing::info!(checkpoint = %self.window, %tree, error = &error as &dyn std::error::Error,
                        "The signature of the metadata could not be read and is not checked.");
                }
            }
        }
        notices
    }
}

impl Installed {
    /// What the trainer has published under this checkpoint since it was installed, if that is something else: the notice that
    /// the first version is kept.
    #[must_use]
    pub fn republished(&self, published: &Published) -> Option<Notice> {
        republished(self, published).map(|(was, now)| Notice::RepublishedKept { was, now })
    }
}

/// Says how what is published now differs from what the folder was made from; `None` if it does not.
fn republished(installed: &Installed, published: &Published) -> Option<(String, String)> {
    let trees = [(Tree::Full, &published.full), (Tree::Delta, &published.delta)];
    let now = |wanted: Tree| trees.iter().find(|(tree, _)| *tree == wanted).and_then(|(_, now)| now.as_ref().ok());
    let was = published_hash(&installed.metadata);
    let made_from = installed.made_from.tree();
    let same_hash = match (now(made_from), now(other(made_from))) {
        (Some(now), _) => now.weights_hash == was,
        // The tree itself is gone; the other one says what the weights are meant to be.
        (None, Some(now)) => match now.weights_hash {
            PublishedHash::Stated(hash) => hash == installed.weights_hash || now.weights_hash == was,
            PublishedHash::None | PublishedHash::Malformed(_) => true,
        },
        (None, None) => true,
    };
    let stated = |metadata: Option<&Metadata>| metadata.map_or(PublishedHash::None, |now| now.weights_hash.clone());
    if !same_hash {
        let now = stated(now(made_from).or_else(|| now(other(made_from))));
        return Some((format!("weights {was}"), format!("weights {now}")));
    }
    let files_now = now(Tree::Full).filter(|_| made_from == Tree::Full)?.files().ok()?;
    let files = installed.metadata.files().ok()?;
    if files.required().eq(files_now.required()) {
        return None;
    }
    Some((describe(files), describe(files_now)))
}

/// A manifest in a few words: enough to see that two are different.
fn describe(manifest: &Manifest) -> String {
    let files = manifest.required().count();
    let first = manifest.required().map(|(_, digest)| digest.to_string()).collect::<Vec<_>>().concat();
    format!("{files} files with manifest {:032x}", xxhash_rust::xxh3::xxh3_128(first.as_bytes()))
}

const fn other(tree: Tree) -> Tree {
    match tree {
        Tree::Full => Tree::Delta,
        Tree::Delta => Tree::Full,
    }
}

fn report(window: CheckpointWindow, notices: Vec<Notice>) -> Vec<Notice> {
    for notice in &notices {
        tracing::warn!(checkpoint = %window, error = notice as &dyn std::error::Error, "The checkpoint is used, but:");
    }
    notices
}

/// The files that a tree must have, without those that an upload rewrites.
fn required(metadata: &Metadata) -> Result<Manifest, InstallError> {
    let window = metadata.window;
    let manifest = metadata.files().map_err(|source| InstallError::Files { window, source })?;
    Ok(manifest.required().map(|(name, digest)| (name.to_owned(), digest)).collect())
}

/// Writes the local metadata document of a folder and returns it as it will be read.
fn write_document(
    folder: &Path,
    published: &Metadata,
    record: &Record,
    manifest: &Manifest,
) -> Result<Metadata, InstallError> {
    let window = published.window;
    let mut text = serde_json::to_vec_pretty(&record.document(published, manifest)).expect("a JSON value has a text");
    text.push(b'\n');
    let path = folder.join(METADATA_FILE);
    let written = std::fs::write(&path, &text).and_then(|()| durable::sync_file(&path));
    written.map_err(|source| CacheError::io(&path, source))?;
    Metadata::parse(&text, window, Tree::Full).map_err(|error| {
        let published =
            Published { window, full: Err(error), delta: Err(crate::metadata::MetadataError::NotPublished) };
        InstallError::metadata(&published)
    })
}
