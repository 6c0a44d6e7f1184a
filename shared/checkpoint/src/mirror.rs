//! A checkpoint made on this host from another one and the deltas since: a folder of its own, written in one pass.
//!
//! The mirror is that folder. Nobody holds the weights in memory: blocks of 4 MiB stream from the base through the deltas to
//! the disk, and are hashed, checksummed and compared with the base on the way. What later needs the weights reads or maps the file, so that
//! all processes of the host share the system's page cache. The weights come out as one file whatever the base has; every
//! other file of the base is linked.

mod carry;
mod change_set;
mod checksum;
mod pipeline;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use serde_json::{Map, json};

pub(crate) use carry::belongs_to_weights;
pub use carry::carry_files;
pub use change_set::{CHANGES_FOLDER, ChangeSet};
pub use checksum::{Checksum, checksums_from_json, checksums_to_json};

use change_set::{ChangeError, ChangeWriter, TensorChanges};
use pipeline::{Feed, Part, Stopped, Written};

use crate::delta::{Delta, DeltaError};
use crate::manifest::{Sha256Digest, hash_file_while};
use crate::weights::{SINGLE_FILE, TensorPlace, WeightsError, WeightsFiles};

/// Key of a local metadata document under which [`checksums_to_json`] goes.
pub const CHECKSUMS_KEY: &str = "tensor_checksums";
/// Key of a local metadata document under which [`ChangeSet::to_json`] goes.
pub const CHANGES_KEY: &str = "change_set";

/// Why no mirror was made. The target may hold parts of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MirrorError {
    #[error("{} could not be written", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the weights of the base cannot be read")]
    Weights(#[from] WeightsError),
    #[error("a delta cannot be read")]
    Delta(#[from] DeltaError),
    #[error(
        "tensor {tensor} of a delta is not the one of the base: decode the delta for the base that it is applied to"
    )]
    OtherBase { tensor: String },
}

impl MirrorError {
    /// Whether the local disk is full.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::Io { source, .. } | Self::Delta(DeltaError::Io { source, .. }) => {
                crate::store::is_storage_full(source)
            }
            Self::Weights(_) | Self::Delta(_) | Self::OtherBase { .. } => false,
        }
    }

    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }
}

/// What a mirror is made from.
#[derive(Debug, Clone, Copy)]
pub struct MirrorPlan<'a> {
    pub base: &'a WeightsFiles,
    pub base_window: CheckpointWindow,
    /// Hash of the base's weights, which the change set names.
    pub base_hash: WeightsHash,
    /// Oldest first, all decoded for this base.
    pub deltas: &'a [Delta],
    /// A folder that nobody reads yet, without weights. Making the names in it durable is up to the caller.
    pub target: &'a Path,
}

/// The weights of a new folder; the files are complete and durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// Over the tensors of the file.
    pub weights_hash: WeightsHash,
    /// [`Checksum`] of every tensor, by name.
    pub checksums: BTreeMap<String, u64>,
    pub changes: ChangeSet,
    /// The written files for the manifest: the weights and the change set.
    pub files: Vec<(String, Sha256Digest)>,
}

/// Makes the weights of a mirror and its change set. Blocking; uses up to three threads and 50 MB, and while a tensor passes by
/// its changes: at most its own size in BF16.
///
/// The hash is not compared with anything: [`WeightsFiles::agreement`] does that. Hashes in the middle of a chain are not
/// computed, because the blocks of all links pass by at once.
///
/// # Errors
/// [`MirrorError`]; the caller removes the folder.
pub fn build(plan: &MirrorPlan<'_>) -> Result<Mirror, MirrorError> {
    plan.check()?;
    let interest = plan.base.interest();
    let path = plan.target.join(SINGLE_FILE);
    let changes_name = ChangeSet::file_name(plan.base_window);
    let changes_path = plan.target.join(&changes_name);
    let changes_folder = plan.target.join(CHANGES_FOLDER);
    std::fs::create_dir_all(&changes_folder).map_err(MirrorError::io(&changes_folder))?;
    let mut changes = ChangeWriter::create(&changes_path, plan.base).map_err(MirrorError::io(&changes_path))?;

    let mut file = File::create_new(&path).map_err(MirrorError::io(&path))?;
    let made = pipeline::write(&mut file, |feed| Pass { plan, feed, changes_path: &changes_path }.run(&mut changes));
    let (checksums, Written { sha256, weights }) = match made.map_err(MirrorError::io(&path))? {
        Ok(made) => made,
        Err(Halt::Failed(error)) => return Err(error),
        Err(Halt::Stopped) => return Err(MirrorError::io(&path)(io::ErrorKind::BrokenPipe.into())),
    };

    let changed =
        changes.finish(&WeightsFiles::open_file(&path)?.read_while(interest)).map_err(|error| match error {
            ChangeError::File(source) => MirrorError::io(&changes_path)(source),
            ChangeError::Weights(source) => MirrorError::Weights(source),
        })?;
    let (_, changes_sha256) = hash_file_while(&changes_path, interest).map_err(MirrorError::io(&changes_path))?;
    Ok(Mirror {
        weights_hash: weights,
        checksums,
        changes: ChangeSet {
            base: plan.base_hash,
            base_window: plan.base_window,
            file: changes_path,
            changed,
            elements: plan.base.tensors().values().map(TensorPlace::elements).sum(),
        },
        files: vec![(SINGLE_FILE.to_owned(), sha256), (changes_name, changes_sha256)],
    })
}

impl MirrorPlan<'_> {
    fn check(&self) -> Result<(), MirrorError> {
        for (name, tensor) in self.deltas.iter().flat_map(Delta::tensors) {
            let place = self.base.tensors().get(name);
            if !place.is_some_and(|place| place.width() == tensor.width && place.elements() == tensor.elements) {
                return Err(MirrorError::OtherBase { tensor: name.clone() });
            }
        }
        Ok(())
    }
}

/// Why no more blocks are made.
enum Halt {
    /// Writing ended first.
    Stopped,
    Failed(MirrorError),
}

impl From<Stopped> for Halt {
    fn from(_: Stopped) -> Self {
        Self::Stopped
    }
}

impl<E: Into<MirrorError>> From<E> for Halt {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

struct Pass<'a> {
    plan: &'a MirrorPlan<'a>,
    feed: &'a Feed,
    changes_path: &'a Path,
}

impl Pass<'_> {
    fn run(&self, changes: &mut ChangeWriter) -> Result<BTreeMap<String, u64>, Halt> {
        let mut block = self.feed.buffer()?;
        block.clear();
        block.extend_from_slice(&file_start(self.plan.base));
        self.feed.push(block, Part::Header)?;
        let mut checksums = BTreeMap::new();
        let mut old = Vec::new();
        for (name, place) in self.plan.base.tensors() {
            let (checksum, tensor) = self.tensor(name, place, &mut old)?;
            changes.tensor(name, place, &tensor).map_err(MirrorError::io(self.changes_path))?;
            checksums.insert(name.clone(), checksum);
        }
        Ok(checksums)
    }

    /// Passes one tensor on; `old` is scratch space.
    fn tensor(&self, name: &str, place: &TensorPlace, old: &mut Vec<u8>) -> Result<(u64, TensorChanges), Halt> {
        let width = place.width();
        let mut cursors: Vec<_> = self.plan.deltas.iter().filter_map(|delta| delta.cursor(name)).collect();
        let mut changes = TensorChanges::new(width, place.bytes());
        let mut checksum = Checksum::new(width);
        for piece in self.plan.base.pieces(place) {
            let first = piece.start / width as u64;
            let mut block = self.feed.buffer()?;
            self.plan.base.read_piece(place, piece, &mut block)?;
            if !cursors.is_empty() {
                old.clear();
                old.extend_from_slice(&block);
                for cursor in &mut cursors {
                    cursor.apply(first, &mut block)?;
                }
                changes.record(first, old, &block);
            }
            checksum.update(&block);
            self.feed.push(block, Part::Tensor)?;
        }
        Ok((checksum.finish(), changes))
    }
}

/// Length and header of a safetensors file with the tensors in the order in which they are hashed.
fn file_start(weights: &WeightsFiles) -> Vec<u8> {
    let mut header = Map::new();
    // Loaders refuse files that do not say which framework's layout they have.
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut end = 0;
    for (name, place) in weights.tensors() {
        let start = end;
        end += place.bytes();
        let entry = json!({"dtype": place.dtype, "shape": place.shape, "data_offsets": [start, end]});
        header.insert(name.clone(), entry);
    }
    let mut text = serde_json::Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    [(text.len() as u64).to_le_bytes().as_slice(), &text].concat()
}
