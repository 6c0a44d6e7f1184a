//! What differs between a checkpoint and the one that it was made from, as a file beside the weights.
//!
//! The file has the safetensors form. A tensor is there as `index/NAME` (U32, ascending element positions) followed by
//! `value/NAME` (the elements now, in the dtype of the weights), or, if more than a third of it differs, as `whole/NAME`.
//! What did not change is absent. Positions are not aligned.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use serde_json::{Map, Value, json};

use crate::weights::{TensorPlace, WeightsFiles};

/// Folder inside a checkpoint's folder, out of the sight of what loads every weights file that it finds.
pub const CHANGES_FOLDER: &str = "changes";
/// Bytes compared at once.
const STRIDE: usize = 64;
/// Bytes of two entries of a header beside their names: keys, dtypes, numbers of at most 20 digits.
const ENTRY_BYTES: usize = 256;
/// Characters of a name grow at most this much in JSON.
const ESCAPED_BYTES: usize = 6;

/// Where the way from another checkpoint to this one lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeSet {
    /// The weights that it leads away from.
    pub base: WeightsHash,
    pub base_window: CheckpointWindow,
    pub file: PathBuf,
    /// Elements whose bits differ.
    pub changed: u64,
    /// Elements of the whole checkpoint.
    pub elements: u64,
}

impl ChangeSet {
    /// Path of the file below the checkpoint's folder.
    #[must_use]
    pub fn file_name(base_window: CheckpointWindow) -> String {
        format!("{CHANGES_FOLDER}/from-{base_window}.bin")
    }

    /// The facts for a local metadata document; the folder is not among them, because it gets its name later.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "base_window": self.base_window.0,
            "base_weights_hash": self.base.to_string(),
            "changed": self.changed,
            "elements": self.elements,
        })
    }

    /// Reads what [`Self::to_json`] wrote, for a checkpoint that lies in `folder`; `None` for anything else.
    #[must_use]
    pub fn from_json(value: &Value, folder: &Path) -> Option<Self> {
        let number = |key: &str| value.get(key).and_then(Value::as_u64);
        let base_window = CheckpointWindow(number("base_window")?);
        Some(Self {
            base: value.get("base_weights_hash")?.as_str()?.parse().ok()?,
            base_window,
            file: folder.join(Self::file_name(base_window)),
            changed: number("changed")?,
            elements: number("elements")?,
        })
    }
}

/// Writes the file of a change set while the tensors pass by.
#[derive(Debug)]
pub(super) struct ChangeWriter {
    file: BufWriter<File>,
    /// Bytes kept free for the header, whose length is only known at the end.
    header_room: usize,
    entries: Map<String, Value>,
    written: u64,
    changed: u64,
    /// Tensors that are copied from the finished weights.
    whole: Vec<String>,
}

/// Changes of the tensor that passes by.
#[derive(Debug)]
pub(super) struct TensorChanges {
    width: usize,
    elements: u64,
    changed: u64,
    positions: Vec<u8>,
    values: Vec<u8>,
}

impl ChangeWriter {
    pub(super) fn create(path: &Path, base: &WeightsFiles) -> io::Result<Self> {
        let names = base.tensors().keys();
        let room: usize = 64 + names.map(|name| 2 * (ENTRY_BYTES + ESCAPED_BYTES * name.len())).sum::<usize>();
        let header_room = room.next_multiple_of(8);
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        file.seek(SeekFrom::Start(8 + header_room as u64))?;
        Ok(Self { file, header_room, entries: Map::new(), written: 0, changed: 0, whole: Vec::new() })
    }

    /// Writes the changes of a tensor that has passed by.
    pub(super) fn tensor(&mut self, name: &str, place: &TensorPlace, changes: &TensorChanges) -> io::Result<()> {
        self.changed += changes.changed;
        if changes.is_whole() {
            self.whole.push(name.to_owned());
        } else if changes.changed > 0 {
            self.entry(format!("index/{name}"), "U32", &[changes.changed], changes.positions.len() as u64);
            self.entry(format!("value/{name}"), &place.dtype, &[changes.changed], changes.values.len() as u64);
            self.file.write_all(&changes.positions)?;
            self.file.write_all(&changes.values)?;
        }
        Ok(())
    }

    /// Adds the tensors that are there as a whole, then the header. Returns the number of elements that differ.
    pub(super) fn finish(mut self, weights: &WeightsFiles) -> Result<u64, ChangeError> {
        let mut buffer = Vec::new();
        for name in std::mem::take(&mut self.whole) {
            let Some(place) = weights.tensors().get(&name) else { continue };
            self.entry(format!("whole/{name}"), &place.dtype, &place.shape, place.bytes());
            for piece in weights.pieces(place) {
                weights.read_piece(place, piece, &mut buffer).map_err(ChangeError::Weights)?;
                self.file.write_all(&buffer)?;
            }
        }
        let mut header = serde_json::to_vec(&self.entries).map_err(io::Error::from)?;
        if header.len() > self.header_room {
            return Err(io::Error::other("the header outgrew the room that was kept for it").into());
        }
        header.resize(self.header_room, b' ');
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&(self.header_room as u64).to_le_bytes())?;
        self.file.write_all(&header)?;
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        Ok(self.changed)
    }

    fn entry(&mut self, name: String, dtype: &str, shape: &[u64], bytes: u64) {
        let offsets = [self.written, self.written + bytes];
        self.entries.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        self.written += bytes;
    }
}

/// Why the file of a change set is not finished.
#[derive(Debug)]
pub(super) enum ChangeError {
    File(io::Error),
    Weights(crate::weights::WeightsError),
}

impl From<io::Error> for ChangeError {
    fn from(error: io::Error) -> Self {
        Self::File(error)
    }
}

impl TensorChanges {
    pub(super) fn new(width: usize, bytes: u64) -> Self {
        let elements = bytes / width as u64;
        Self { width, elements, changed: 0, positions: Vec::new(), values: Vec::new() }
    }

    /// Notes where `new` differs from `old`, both beginning at element `first`.
    pub(super) fn record(&mut self, first: u64, old: &[u8], new: &[u8]) {
        match self.width {
            1 => self.compare::<1>(first, old, new),
            2 => self.compare::<2>(first, old, new),
            4 => self.compare::<4>(first, old, new),
            _ => self.compare::<8>(first, old, new),
        }
        if self.is_whole() {
            self.positions = Vec::new();
            self.values = Vec::new();
        }
    }

    /// Whether more than a third differs, or positions do not fit into 32 bits.
    fn is_whole(&self) -> bool {
        self.changed > 0 && (self.changed.saturating_mul(3) > self.elements || self.elements > 1 << 32)
    }

    fn compare<const WIDTH: usize>(&mut self, first: u64, old: &[u8], new: &[u8]) {
        let is_whole = self.is_whole();
        let mut element = first;
        for (old, new) in old.chunks(STRIDE).zip(new.chunks(STRIDE)) {
            if old != new {
                let pairs = old.as_chunks::<WIDTH>().0.iter().zip(new.as_chunks::<WIDTH>().0);
                for (position, (_, new)) in (element..).zip(pairs).filter(|(_, (old, new))| old != new) {
                    self.changed += 1;
                    if !is_whole {
                        // Positions that need more than 32 bits are in tensors that are written as a whole.
                        self.positions.extend_from_slice(&position.to_le_bytes()[..4]);
                        self.values.extend_from_slice(new);
                    }
                }
            }
            element += (STRIDE / WIDTH) as u64;
        }
    }
}
