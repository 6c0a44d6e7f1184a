//! A checkpoint from its base and deltas.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use grail_protocol::ids::CheckpointWindow;

use super::{Job, Made, required, write_document};
use crate::blocking::{Interest, blocking};
use crate::cache::{CacheError, CheckpointCache, Damage, Entry, Installed, MadeFrom, Record, read_document};
use crate::delta::{DELTA_METADATA_FILE, Delta, DeltaMetadata, PAYLOAD_FILE, Shapes};
use crate::fetch::Fetcher;
use crate::install::InstallError;
use crate::layout::Tree;
use crate::manifest::{FileDefect, FolderDefect, Manifest};
use crate::metadata::{Metadata, PublishedHash};
use crate::mirror::{self, Mirror, MirrorPlan, carry_files};
use crate::routes::Route;
use crate::weights::{HashAgreement, WeightsFiles};

/// A delta as it lies on the disk.
#[derive(Debug)]
struct FetchedDelta {
    window: CheckpointWindow,
    folder: PathBuf,
}

/// What the blocking part makes.
#[derive(Debug)]
struct Built {
    mirror: Mirror,
    agreement: HashAgreement,
    manifest: Manifest,
}

impl Job<'_> {
    /// The cached checkpoint that deltas are applied to. Its weights are not read for this: the hash over what is made from
    /// them tells whether they were sound.
    pub(super) async fn cached_base(&self, base: CheckpointWindow) -> Result<Installed, InstallError> {
        let cache = self.cache.clone();
        let sound = blocking(move |interest| sound_beside(&cache, base, interest)).await?;
        sound.map_err(|source| InstallError::Base { window: self.window, base, source })
    }

    /// Fetches the deltas of the way and applies them to the base. The last one's document is that of the checkpoint.
    pub(super) async fn mirror(
        &self,
        fetcher: &Fetcher<'_>,
        base: &Installed,
        target: &Metadata,
        route: &Route,
    ) -> Result<Made, InstallError> {
        let mut deltas = Vec::with_capacity(route.deltas.len());
        for delta in &route.deltas {
            deltas.push(FetchedDelta { window: delta.window, folder: fetcher.tree(delta).await? });
        }
        let partial = self.cache.new_partial(self.window)?;
        let (folder, stated) = (partial.path.clone(), target.weights_hash.clone());
        let (base_of, window) = (base.clone(), self.window);
        let built = blocking(move |interest| build(window, &base_of, (&deltas, &stated), &folder, interest)).await??;
        let is_confirmed = matches!(built.agreement, HashAgreement::Equal | HashAgreement::EqualWithTiedHead);
        if !is_confirmed {
            self.require_sound(base).await?;
        }
        if built.agreement == HashAgreement::Different {
            let published = target.weights_hash.to_string();
            return Err(InstallError::HashMismatch { window, published, found: built.mirror.weights_hash });
        }
        let record = Record {
            weights_hash: built.mirror.weights_hash,
            agreement: built.agreement,
            checksums: Arc::new(built.mirror.checksums),
            changes: Some(built.mirror.changes),
            made_from: MadeFrom::Deltas {
                base: route.base_window(),
                deltas: route.deltas.iter().map(|delta| delta.window).collect(),
            },
        };
        let metadata = write_document(&partial.path, target, &record, &built.manifest)?;
        Ok(Made { partial, metadata, record })
    }

    /// Reads a base to its end, once what was made from it has turned out wrong or nothing tells whether it is right.
    async fn require_sound(&self, base: &Installed) -> Result<(), InstallError> {
        let (cache, window) = (self.cache.clone(), base.window);
        match blocking(move |interest| cache.inspect_while(window, interest)).await? {
            Entry::Damaged(source) => Err(InstallError::Base { window: self.window, base: window, source }),
            Entry::Installed(_) | Entry::Absent => Ok(()),
        }
    }
}

/// A cached checkpoint whose files beside the weights are sound.
fn sound_beside(cache: &CheckpointCache, window: CheckpointWindow, interest: &Interest) -> Result<Installed, Damage> {
    let folder = cache.folder(window);
    let metadata = read_document(&folder, window)?;
    let beside: Manifest = (metadata.files()?.required())
        .filter(|(name, _)| !mirror::belongs_to_weights(name))
        .map(|(name, digest)| (name.to_owned(), digest))
        .collect();
    beside.verify_folder_while(&folder, interest)?;
    match Record::read(&folder, &metadata) {
        Some(record) => Ok(record.installed(&folder, metadata)),
        // Another program's folder: nothing says what its weights are until they were read.
        None => match cache.inspect_while(window, interest) {
            Entry::Installed(installed) => Ok(*installed),
            Entry::Damaged(damage) => Err(damage),
            Entry::Absent => Err(Damage::MetadataUnreadable(std::io::ErrorKind::NotFound.into())),
        },
    }
}

/// Bytes of a folder's weights; 0 if they cannot be read, which whoever needs them will find out.
pub(super) fn weights_bytes(folder: &Path) -> u64 {
    WeightsFiles::open(folder).map_or(0, |weights| weights.bytes())
}

fn build(
    window: CheckpointWindow,
    base: &Installed,
    (fetched, stated): (&[FetchedDelta], &PublishedHash),
    target: &Path,
    interest: &Interest,
) -> Result<Built, InstallError> {
    let base_error = |source| InstallError::Base { window, base: base.window, source: Damage::Weights(source) };
    let mirror_error = |source| InstallError::Mirror { window, source };
    let weights = WeightsFiles::open(&base.folder).map_err(base_error)?.read_while(interest);
    let shapes = Shapes::from(&weights);
    let mut deltas: Vec<Delta> = Vec::with_capacity(fetched.len());
    for delta in fetched {
        interest.check().map_err(|source| CacheError::io(target, source))?;
        deltas.push(delta.open(&shapes, target)?);
    }
    let mut files = carry_files(&base.folder, &required(&base.metadata)?, target).map_err(mirror_error)?;
    let plan =
        MirrorPlan { base: &weights, base_window: base.window, base_hash: base.weights_hash, deltas: &deltas, target };
    let made = mirror::build(&plan).map_err(mirror_error)?;
    files.extend(made.files.iter().cloned());
    let weights_error = |source| InstallError::Weights { window, source };
    let weights = WeightsFiles::open(target).map_err(weights_error)?.read_while(interest);
    let agreement = weights.agreement(made.weights_hash, stated).map_err(weights_error)?;
    Ok(Built { mirror: made, agreement, manifest: files.into_iter().collect() })
}

impl FetchedDelta {
    fn open(&self, shapes: &Shapes, scratch: &Path) -> Result<Delta, InstallError> {
        let window = self.window;
        let unreadable = |name: &str, source: std::io::Error| {
            let defect = match source.kind() {
                std::io::ErrorKind::NotFound => FileDefect::Missing,
                _ => FileDefect::Unreadable(source),
            };
            let source = FolderDefect { path: name.to_owned(), defect };
            InstallError::File { window, tree: Tree::Delta, source }
        };
        let text = std::fs::read(self.folder.join(DELTA_METADATA_FILE));
        let text = text.map_err(|source| unreadable(DELTA_METADATA_FILE, source))?;
        let format = DeltaMetadata::parse(&text).map_err(|source| InstallError::Format { window, source })?.format;
        let payload = self.folder.join(PAYLOAD_FILE);
        if !payload.exists() {
            return Err(unreadable(PAYLOAD_FILE, std::io::ErrorKind::NotFound.into()));
        }
        Delta::open(&payload, format, shapes, scratch).map_err(|source| InstallError::Delta { window, source })
    }
}
