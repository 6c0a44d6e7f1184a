//! The safetensors format: eight bytes of header length, a JSON header, then the tensors' little-endian bytes.
//!
//! Files are mapped, not read: a checkpoint of 15 GB costs no second copy in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::Deserialize;

/// Longest header that is read, in bytes, as in the format's own library.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Why a file is not usable as safetensors.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SafetensorsError {
    /// The file cannot be opened or mapped.
    #[error("open {path}")]
    Open {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The file cannot be written.
    #[error("write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The file ends before its header or its tensors do.
    #[error("{path} is truncated: {needed_bytes} bytes are needed for {what}, the file has {file_bytes}")]
    Truncated { path: PathBuf, what: String, needed_bytes: u64, file_bytes: u64 },
    /// The header is no header of this format.
    #[error("{path} has a damaged header: {detail}")]
    Header { path: PathBuf, detail: String },
    /// A tensor's entry contradicts itself.
    #[error("{path}: tensor {tensor}: {detail}")]
    Entry { path: PathBuf, tensor: String, detail: String },
}

/// Element type of a tensor in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileDtype {
    F32,
    F16,
    Bf16,
    /// A type that no decoder weight has; its name is kept for errors.
    Other {
        name: &'static str,
        element_bytes: usize,
    },
}

impl FileDtype {
    fn parse(name: &str) -> Option<Self> {
        const OTHERS: [(&str, usize); 12] = [
            ("F64", 8),
            ("I64", 8),
            ("U64", 8),
            ("I32", 4),
            ("U32", 4),
            ("I16", 2),
            ("U16", 2),
            ("I8", 1),
            ("U8", 1),
            ("BOOL", 1),
            ("F8_E4M3", 1),
            ("F8_E5M2", 1),
        ];
        match name {
            "F32" => Some(Self::F32),
            "F16" => Some(Self::F16),
            "BF16" => Some(Self::Bf16),
            other => OTHERS
                .iter()
                .find(|(known, _)| *known == other)
                .map(|&(name, element_bytes)| Self::Other { name, element_bytes }),
        }
    }

    /// Bytes of one element.
    #[must_use]
    pub const fn element_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Other { element_bytes, .. } => element_bytes,
        }
    }

    /// The name that files use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Other { name, .. } => name,
        }
    }
}

/// One tensor of a mapped file.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    pub dtype: FileDtype,
    pub shape: &'a [usize],
    /// Little-endian elements in C order.
    pub bytes: &'a [u8],
}

/// A mapped file whose header was checked: every range lies inside the file and fits its shape.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    dtype: FileDtype,
    shape: Vec<usize>,
    /// Absolute, in the file.
    range: Range<usize>,
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

impl SafetensorsFile {
    /// Maps `path` and checks its header.
    ///
    /// # Errors
    /// [`SafetensorsError`] with the path, and the tensor where one is the cause.
    pub fn open(path: &Path) -> Result<Self, SafetensorsError> {
        let open_error = |source| SafetensorsError::Open { path: path.to_owned(), source };
        let file = File::open(path).map_err(open_error)?;
        let file_bytes = file.metadata().map_err(open_error)?.len();
        let truncated = |what: &str, needed_bytes| SafetensorsError::Truncated {
            path: path.to_owned(),
            what: what.to_owned(),
            needed_bytes,
            file_bytes,
        };
        if file_bytes < 8 {
            return Err(truncated("the header's length", 8));
        }
        let map = crate::ffi::map_file(&file).map_err(open_error)?;
        let (length, rest) = map.split_first_chunk::<8>().ok_or_else(|| truncated("the header's length", 8))?;
        let header_bytes = u64::from_le_bytes(*length);
        let header_error = |detail: String| SafetensorsError::Header { path: path.to_owned(), detail };
        if header_bytes > MAX_HEADER_BYTES {
            return Err(header_error(format!("its length {header_bytes} exceeds {MAX_HEADER_BYTES} bytes")));
        }
        let header = usize::try_from(header_bytes)
            .ok()
            .and_then(|length| rest.get(..length))
            .ok_or_else(|| truncated("the header", 8 + header_bytes))?;
        let entries: BTreeMap<String, serde_json::Value> =
            serde_json::from_slice(header).map_err(|error| header_error(error.to_string()))?;
        let reader = HeaderReader { path, file_bytes, first_byte: 8 + header_bytes };
        let tensors = entries
            .into_iter()
            .filter(|(name, _)| name != "__metadata__")
            .map(|(name, value)| reader.entry(&name, value).map(|entry| (name, entry)))
            .collect::<Result<_, _>>()?;
        Ok(Self { path: path.to_owned(), map, tensors })
    }

    /// Path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names in code-point order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor of that name, if the file has it.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let entry = self.tensors.get(name)?;
        Some(TensorView { dtype: entry.dtype, shape: &entry.shape, bytes: self.map.get(entry.range.clone())? })
    }
}

struct HeaderReader<'a> {
    path: &'a Path,
    file_bytes: u64,
    /// Where the tensors begin.
    first_byte: u64,
}

impl HeaderReader<'_> {
    fn entry(&self, name: &str, value: serde_json::Value) -> Result<Entry, SafetensorsError> {
        let error =
            |detail: String| SafetensorsError::Entry { path: self.path.to_owned(), tensor: name.to_owned(), detail };
        let raw: RawEntry = serde_json::from_value(value).map_err(|source| error(source.to_string()))?;
        let dtype = FileDtype::parse(&raw.dtype).ok_or_else(|| error(format!("unknown dtype {:?}", raw.dtype)))?;
        let [begin, end] = raw.data_offsets;
        let size = raw
            .shape
            .iter()
            .try_fold(dtype.element_bytes() as u64, |size, extent| size.checked_mul(*extent as u64))
            .ok_or_else(|| error(format!("the size of shape {:?} overflows", raw.shape)))?;
        if end.checked_sub(begin) != Some(size) {
            return Err(error(format!(
                "offsets {begin}..{end} do not hold shape {:?} of {}: {size} bytes are needed",
                raw.shape, raw.dtype
            )));
        }
        let needed_bytes = self.first_byte.saturating_add(end);
        if needed_bytes > self.file_bytes {
            return Err(SafetensorsError::Truncated {
                path: self.path.to_owned(),
                what: format!("tensor {name}"),
                needed_bytes,
                file_bytes: self.file_bytes,
            });
        }
        // Both fit: the file is mapped whole, so its length is a `usize`.
        let absolute = |offset: u64| {
            usize::try_from(self.first_byte + offset).map_err(|_| error("offset exceeds the address space".to_owned()))
        };
        Ok(Entry { dtype, shape: raw.shape, range: absolute(begin)?..absolute(end)? })
    }
}

/// A tensor to be written.
#[derive(Debug)]
pub struct OwnedTensor {
    pub name: String,
    pub dtype: FileDtype,
    pub shape: Vec<usize>,
    /// Little-endian elements in C order.
    pub bytes: Vec<u8>,
}

/// Writes one file, with the metadata `{"format": "pt"}` that transformers asks for. Tensors keep the given order.
///
/// # Errors
/// [`SafetensorsError::Write`].
pub fn write(path: &Path, tensors: &[OwnedTensor]) -> Result<(), SafetensorsError> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".to_owned(), serde_json::json!({"format": "pt"}));
    let mut offset = 0_usize;
    for tensor in tensors {
        let end = offset + tensor.bytes.len();
        header.insert(
            tensor.name.clone(),
            serde_json::json!({"dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut text = serde_json::Value::Object(header).to_string();
    // The format wants the tensors at a multiple of eight bytes; spaces pad the header.
    text.push_str(&" ".repeat((8 - text.len() % 8) % 8));
    let save = || {
        let mut file = std::io::BufWriter::new(File::create(path)?);
        file.write_all(&(text.len() as u64).to_le_bytes())?;
        file.write_all(text.as_bytes())?;
        for tensor in tensors {
            file.write_all(&tensor.bytes)?;
        }
        file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()
    };
    save().map_err(|source| SafetensorsError::Write { path: path.to_owned(), source })
}
