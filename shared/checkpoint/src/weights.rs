//! The weights of a checkpoint folder as safetensors files: bounded reading of their headers, and the hash over all tensors.
//!
//! The hash is xxh3-128, seed 0, over the raw bytes of every tensor in ascending code-point order of its name. Names, shapes
//! and separators are not hashed. For tied embeddings the files have no `lm_head.weight`; some publishers hash a model's
//! state instead, in which the head is there as a copy of the embedding.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use grail_protocol::ids::WeightsHash;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use xxhash_rust::xxh3::Xxh3;

use crate::blocking::Interest;
use crate::metadata::PublishedHash;
use crate::mirror::Checksum;

/// Weights in one file.
pub const SINGLE_FILE: &str = "model.safetensors";
/// Which tensor lies in which shard.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Longest header that is read; the format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Longest index that is read.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Bytes read at once; a multiple of every element's size.
const READ_BYTES: u64 = 4 << 20;
const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// Why a folder's weights cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    #[error("{} has neither {SINGLE_FILE} nor {INDEX_FILE}", folder.display())]
    None { folder: PathBuf },
    #[error("{} has both {SINGLE_FILE} and {INDEX_FILE}: loaders disagree on which of them counts", folder.display())]
    Ambiguous { folder: PathBuf },
    #[error("{} could not be read", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is no valid safetensors file or index: {what}", path.display())]
    Format { path: PathBuf, what: String },
    #[error("tensor {name} is in {} and in {}", first.display(), second.display())]
    Twice { name: String, first: PathBuf, second: PathBuf },
    #[error("{} says that tensor {name} is in {shard}, which does not have it", index.display())]
    NotInShard { index: PathBuf, name: String, shard: String },
}

/// How the weights that were installed agree with the hash that was published for them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HashAgreement {
    Equal,
    /// Equal once the output head is counted as a copy of the embedding.
    EqualWithTiedHead,
    /// No hash was published; the files rest on their sha256 alone.
    NotPublished,
    /// Another hash was published. The files are those that validators run, so they are used all the same, and reported.
    Different,
}

/// What the tensors of a checkpoint are known by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    pub weights_hash: WeightsHash,
    /// [`Checksum`] of every tensor, by name.
    pub checksums: BTreeMap<String, u64>,
}

/// Where one tensor's bytes lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorPlace {
    /// Index into the list of files.
    file: usize,
    offset: u64,
    bytes: u64,
    /// As the header spells it, for instance `BF16`.
    pub dtype: String,
    pub shape: Vec<u64>,
}

impl TensorPlace {
    /// Bytes of the tensor.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of one element.
    #[must_use]
    pub fn width(&self) -> usize {
        // Only known dtypes get past the header.
        element_bytes(&self.dtype).and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(1)
    }

    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.bytes / self.width() as u64
    }
}

/// The weights files of a folder with their tensor tables.
#[derive(Debug)]
pub struct WeightsFiles {
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, TensorPlace>,
    interest: Interest,
}

impl WeightsFiles {
    /// Opens the weights of `folder` and reads their headers, no tensor.
    ///
    /// # Errors
    /// [`WeightsError`], naming the file and what is wrong with it.
    pub fn open(folder: &Path) -> Result<Self, WeightsError> {
        let (single, index) = (folder.join(SINGLE_FILE), folder.join(INDEX_FILE));
        match (single.exists(), index.exists()) {
            (false, false) => Err(WeightsError::None { folder: folder.to_path_buf() }),
            (true, true) => Err(WeightsError::Ambiguous { folder: folder.to_path_buf() }),
            (true, false) => Self::open_files(vec![single]),
            (false, true) => Self::open_sharded(folder, &index),
        }
    }

    /// Opens one weights file and reads its header.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_file(path: &Path) -> Result<Self, WeightsError> {
        Self::open_files(vec![path.to_path_buf()])
    }

    fn open_sharded(folder: &Path, index: &Path) -> Result<Self, WeightsError> {
        let map = read_index(index)?;
        let shards: BTreeSet<&String> = map.values().collect();
        let weights = Self::open_files(shards.into_iter().map(|shard| folder.join(shard)).collect())?;
        for (name, shard) in &map {
            let found =
                weights.tensors.get(name).is_some_and(|place| weights.files[place.file].0 == folder.join(shard));
            if !found {
                let (name, shard) = (name.clone(), shard.clone());
                return Err(WeightsError::NotInShard { index: index.to_path_buf(), name, shard });
            }
        }
        Ok(weights)
    }

    fn open_files(paths: Vec<PathBuf>) -> Result<Self, WeightsError> {
        let mut files: Vec<(PathBuf, File)> = Vec::with_capacity(paths.len());
        let mut tensors: BTreeMap<String, TensorPlace> = BTreeMap::new();
        for path in paths {
            let file = File::open(&path).map_err(|source| WeightsError::Io { path: path.clone(), source })?;
            for (name, place) in read_header(&path, &file, files.len())? {
                if let Some(first) = tensors.get(&name) {
                    let first = files[first.file].0.clone();
                    return Err(WeightsError::Twice { name, first, second: path });
                }
                tensors.insert(name, place);
            }
            files.push((path, file));
        }
        Ok(Self { files, tensors, interest: Interest::default() })
    }

    /// The same, read only as long as somebody waits for what is read.
    pub(crate) fn read_while(self, interest: &Interest) -> Self {
        Self { interest: interest.clone(), ..self }
    }

    pub(crate) const fn interest(&self) -> &Interest {
        &self.interest
    }

    /// The tensors by name, in the order in which they are hashed.
    #[must_use]
    pub const fn tensors(&self) -> &BTreeMap<String, TensorPlace> {
        &self.tensors
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|place| place.bytes).sum()
    }

    /// Hash over the tensors of the files. Serial: about 0.2 s per GB from memory.
    ///
    /// # Errors
    /// [`WeightsError::Io`].
    pub fn hash(&self) -> Result<WeightsHash, WeightsError> {
        self.hash_of(self.tensors.values())
    }

    /// Hash with `lm_head.weight` counted as a copy of the embedding; `None` if the files have a head or no embedding.
    ///
    /// # Errors
    /// [`WeightsError::Io`].
    pub fn hash_with_tied_head(&self) -> Result<Option<WeightsHash>, WeightsError> {
        let Some(embedding) = self.tensors.get(EMBEDDING).filter(|_| !self.tensors.contains_key(HEAD)) else {
            return Ok(None);
        };
        let head_goes = self.tensors.keys().take_while(|name| name.as_str() < HEAD).count();
        let mut order: Vec<&TensorPlace> = self.tensors.values().collect();
        order.insert(head_goes, embedding);
        self.hash_of(order.into_iter()).map(Some)
    }

    /// Holds the files' `hash` against the published one; the tied form is only computed where it decides.
    ///
    /// # Errors
    /// [`WeightsError::Io`].
    pub fn agreement(&self, hash: WeightsHash, published: &PublishedHash) -> Result<HashAgreement, WeightsError> {
        match published {
            PublishedHash::None => Ok(HashAgreement::NotPublished),
            PublishedHash::Malformed(_) => Ok(HashAgreement::Different),
            PublishedHash::Stated(stated) if *stated == hash => Ok(HashAgreement::Equal),
            PublishedHash::Stated(stated) if self.hash_with_tied_head()? == Some(*stated) => {
                Ok(HashAgreement::EqualWithTiedHead)
            }
            PublishedHash::Stated(_) => Ok(HashAgreement::Different),
        }
    }

    /// Hash and checksums of the tensors, from one reading.
    ///
    /// # Errors
    /// [`WeightsError::Io`].
    pub fn fingerprint(&self) -> Result<Fingerprint, WeightsError> {
        let mut hash = Xxh3::new();
        let mut checksums = BTreeMap::new();
        let mut buffer = Vec::new();
        for (name, place) in &self.tensors {
            let mut checksum = Checksum::new(place.width());
            for piece in self.pieces(place) {
                self.read_piece(place, piece, &mut buffer)?;
                hash.update(&buffer);
                checksum.update(&buffer);
            }
            checksums.insert(name.clone(), checksum.finish());
        }
        Ok(Fingerprint { weights_hash: WeightsHash(hash.digest128()), checksums })
    }

    /// One tensor's bytes; `None` if there is no such tensor. Takes the memory of the tensor.
    ///
    /// # Errors
    /// [`WeightsError::Io`].
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, WeightsError> {
        let Some(place) = self.tensors.get(name) else { return Ok(None) };
        let mut bytes = Vec::new();
        self.read_piece(place, 0..place.bytes, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// The tensor in pieces of whole elements, as byte ranges.
    pub(crate) fn pieces(&self, place: &TensorPlace) -> impl Iterator<Item = Range<u64>> + use<> {
        let bytes = place.bytes;
        (0..bytes.div_ceil(READ_BYTES)).map(move |piece| {
            let start = piece * READ_BYTES;
            start..bytes.min(start + READ_BYTES)
        })
    }

    /// Reads a byte range of a tensor; the buffer has its length afterwards.
    pub(crate) fn read_piece(
        &self,
        place: &TensorPlace,
        piece: Range<u64>,
        buffer: &mut Vec<u8>,
    ) -> Result<(), WeightsError> {
        let (path, file) = &self.files[place.file];
        let io = |source| WeightsError::Io { path: path.clone(), source };
        let length = usize::try_from(piece.end - piece.start).map_err(|error| io(io::Error::other(error)))?;
        self.interest.check().map_err(io)?;
        buffer.resize(length, 0);
        file.read_exact_at(buffer, place.offset + piece.start).map_err(io)
    }

    fn hash_of<'a>(&self, tensors: impl Iterator<Item = &'a TensorPlace>) -> Result<WeightsHash, WeightsError> {
        let mut hash = Xxh3::new();
        let mut buffer = Vec::new();
        for place in tensors {
            for piece in self.pieces(place) {
                self.read_piece(place, piece, &mut buffer)?;
                hash.update(&buffer);
            }
        }
        Ok(WeightsHash(hash.digest128()))
    }
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>, WeightsError> {
    let io = |source| WeightsError::Io { path: path.to_path_buf(), source };
    let format = |what: String| WeightsError::Format { path: path.to_path_buf(), what };
    let bytes = std::fs::metadata(path).map_err(io)?.len();
    if bytes > MAX_INDEX_BYTES {
        return Err(format(format!("it has {bytes} bytes, accepted are {MAX_INDEX_BYTES}")));
    }
    let document: Value =
        serde_json::from_slice(&std::fs::read(path).map_err(io)?).map_err(|error| format(error.to_string()))?;
    let map = document.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| format("weight_map is missing".to_owned()))?;
    map.iter()
        .map(|(name, shard)| match shard.as_str() {
            Some(shard) if is_plain_name(shard) => Ok((name.clone(), shard.to_owned())),
            _ => Err(format(format!("weight_map gives {shard} for {name}: a file name is expected"))),
        })
        .collect()
}

fn read_header(path: &Path, file: &File, number: usize) -> Result<Vec<(String, TensorPlace)>, WeightsError> {
    let io = |source| WeightsError::Io { path: path.to_path_buf(), source };
    let format = |what: String| WeightsError::Format { path: path.to_path_buf(), what };
    let size = file.metadata().map_err(io)?.len();
    if size < 8 {
        return Err(format(format!("it has {size} bytes, the length of the header takes 8")));
    }
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).map_err(io)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES || length > size - 8 {
        return Err(format(format!("its header claims {length} bytes, the file has {size}")));
    }
    let mut header = vec![0; usize::try_from(length).map_err(|error| format(error.to_string()))?];
    file.read_exact_at(&mut header, 8).map_err(io)?;
    let header: Map<String, Value> = serde_json::from_slice(&header).map_err(|error| format(error.to_string()))?;
    let base = 8 + length;
    header
        .into_iter()
        .filter(|(name, _)| name != "__metadata__")
        .map(|(name, value)| {
            let entry = HeaderEntry::deserialize(value).map_err(|error| format(format!("tensor {name}: {error}")))?;
            let bytes = entry.checked_bytes(size - base).map_err(|what| format(format!("tensor {name}: {what}")))?;
            let offset = base + entry.data_offsets.0;
            Ok((name, TensorPlace { file: number, offset, bytes, dtype: entry.dtype, shape: entry.shape }))
        })
        .collect()
}

#[derive(Deserialize)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl HeaderEntry {
    /// Bytes of the tensor, once its place lies inside the data and fits its shape.
    fn checked_bytes(&self, data: u64) -> Result<u64, String> {
        let (start, end) = self.data_offsets;
        if start > end || end > data {
            return Err(format!("bytes {start} to {end} are not inside the {data} bytes of data"));
        }
        let elements = self.shape.iter().try_fold(1_u64, |product, size| product.checked_mul(*size));
        let expected = element_bytes(&self.dtype).zip(elements).and_then(|(size, count)| size.checked_mul(count));
        match expected {
            Some(expected) if expected == end - start => Ok(expected),
            _ => Err(format!("{} bytes do not hold {} of shape {:?}", end - start, self.dtype, self.shape)),
        }
    }
}

fn element_bytes(dtype: &str) -> Option<u64> {
    match dtype {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" => Some(1),
        "BF16" | "F16" | "I16" | "U16" => Some(2),
        "F32" | "I32" | "U32" => Some(4),
        "F64" | "I64" | "U64" => Some(8),
        _ => None,
    }
}

fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != ".." && name != "." && !name.contains(['/', '\\', '\0'])
}
