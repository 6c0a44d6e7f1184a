//! A checkpoint folder as a server needs it: complete weight files, the shape in `config.json`, the tokens that end a text.
//!
//! Without libtorch, so that the launcher can judge a folder before a server touches it: a GPU server that is told to load
//! a truncated file dies of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use grail_protocol::ids::TokenId;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Longest header of a weight file, as in the format's own library.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Longest `config.json`, `generation_config.json` or index.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// A folder that no server should load.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FolderError {
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is no valid JSON")]
    Json {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{folder} holds neither model.safetensors nor model.safetensors.index.json")]
    NoWeights { folder: PathBuf },
    #[error("{path}: {detail}")]
    Damaged { path: PathBuf, detail: String },
}

/// Fields of `config.json` that fix the shape of the weights or what is computed with them.
const SHAPE_FIELDS: [&str; 21] = [
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "max_position_embeddings",
    "use_sliding_window",
    "sliding_window",
    "layer_types",
];

/// Files that a server reads once, at its start.
const START_FILES: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"];

/// Why a running server cannot simply take the weights of another folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// A field of `config.json`.
    Shape { field: &'static str, old: String, new: String },
    /// A file that is read only at the start.
    StartFile { name: &'static str },
    /// The tokens that end a text.
    EosTokens { old: BTreeSet<TokenId>, new: BTreeSet<TokenId> },
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shape { field, old, new } => write!(f, "{field} of config.json is {new}, the server has {old}"),
            Self::StartFile { name } => write!(f, "{name} differs, and a server reads it only at its start"),
            Self::EosTokens { old, new } => {
                let list = |ids: &BTreeSet<TokenId>| ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                write!(f, "the end tokens are {}, the server has {}", list(new), list(old))
            }
        }
    }
}

/// A folder whose weight files are complete. The files stay open: what is read later is what was checked.
#[derive(Debug)]
pub struct CheckpointFolder {
    path: PathBuf,
    config: Value,
    eos_tokens: BTreeSet<TokenId>,
    files: Vec<WeightFile>,
}

impl CheckpointFolder {
    /// Reads `config.json` and the headers of all weight files.
    ///
    /// # Errors
    /// [`FolderError`], with the file and what is wrong with it.
    pub fn open(path: &Path) -> Result<Self, FolderError> {
        let config = read_json(&path.join("config.json"))?;
        let mut eos_tokens = eos_of(&config);
        let generation_config = path.join("generation_config.json");
        if generation_config.exists() {
            eos_tokens.extend(eos_of(&read_json(&generation_config)?));
        }
        let files = weight_paths(path)?.iter().map(|path| WeightFile::open(path)).collect::<Result<Vec<_>, _>>()?;
        let mut seen = BTreeSet::new();
        for file in &files {
            if let Some(tensor) = file.tensors.keys().find(|name| !seen.insert(name.as_str())) {
                return Err(damaged(&file.path, format!("tensor {tensor} is in another file too")));
            }
        }
        Ok(Self { path: path.to_owned(), config, eos_tokens, files })
    }

    /// The folder itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// End tokens of `config.json` and `generation_config.json` together.
    #[must_use]
    pub const fn eos_tokens(&self) -> &BTreeSet<TokenId> {
        &self.eos_tokens
    }

    /// A field of `config.json` as a count.
    #[must_use]
    pub fn count(&self, field: &str) -> Option<usize> {
        self.config.get(field)?.as_u64().and_then(|count| usize::try_from(count).ok())
    }

    /// A field of `config.json`, null if it is absent.
    #[must_use]
    pub fn field(&self, field: &str) -> &Value {
        self.config.get(field).unwrap_or(&Value::Null)
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.files.iter().flat_map(|file| file.tensors.values()).map(|range| range.1 - range.0).sum()
    }

    /// The first thing for which a server of this folder must start anew to serve `other`.
    ///
    /// # Errors
    /// A start file cannot be read.
    pub fn difference(&self, other: &Self) -> Result<Option<Difference>, FolderError> {
        for field in SHAPE_FIELDS {
            let (old, new) = (self.field(field), other.field(field));
            if old != new {
                return Ok(Some(Difference::Shape { field, old: old.to_string(), new: new.to_string() }));
            }
        }
        if self.eos_tokens != other.eos_tokens {
            let (old, new) = (self.eos_tokens.clone(), other.eos_tokens.clone());
            return Ok(Some(Difference::EosTokens { old, new }));
        }
        for name in START_FILES {
            if read_if_present(&self.path.join(name))? != read_if_present(&other.path.join(name))? {
                return Ok(Some(Difference::StartFile { name }));
            }
        }
        Ok(None)
    }

    /// SHA-256 of every tensor's bytes, by name, in lower-case hexadecimal.
    ///
    /// # Errors
    /// [`FolderError::Read`]
    pub fn checksums(&self) -> Result<BTreeMap<String, String>, FolderError> {
        let mut checksums = BTreeMap::new();
        for file in &self.files {
            for (name, range) in &file.tensors {
                checksums.insert(name.clone(), file.checksum(*range)?);
            }
        }
        Ok(checksums)
    }
}

/// One safetensors file.
#[derive(Debug)]
struct WeightFile {
    path: PathBuf,
    file: File,
    /// Ranges of bytes in the file.
    tensors: BTreeMap<String, (u64, u64)>,
}

#[derive(Debug, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl WeightFile {
    fn open(path: &Path) -> Result<Self, FolderError> {
        let read = |source| FolderError::Read { path: path.to_owned(), source };
        let mut file = File::open(path).map_err(read)?;
        let file_bytes = file.metadata().map_err(read)?.len();
        let mut length = [0; 8];
        if file_bytes < 8 {
            return Err(damaged(path, format!("{file_bytes} bytes are too few for a header")));
        }
        file.read_exact(&mut length).map_err(read)?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES || header_bytes > file_bytes - 8 {
            return Err(damaged(path, format!("the header claims {header_bytes} bytes, the file has {file_bytes}")));
        }
        let mut header = Vec::new();
        (&mut file).take(header_bytes).read_to_end(&mut header).map_err(read)?;
        let entries: BTreeMap<String, Value> =
            serde_json::from_slice(&header).map_err(|source| FolderError::Json { path: path.to_owned(), source })?;
        let mut tensors = BTreeMap::new();
        for (name, entry) in entries.into_iter().filter(|(name, _)| name != "__metadata__") {
            let range = checked_range(&entry).map_err(|detail| damaged(path, format!("tensor {name}: {detail}")))?;
            tensors.insert(name, (8 + header_bytes + range.0, 8 + header_bytes + range.1));
        }
        let needed = check_cover(&tensors, 8 + header_bytes).map_err(|detail| damaged(path, detail))?;
        if needed != file_bytes {
            return Err(damaged(path, format!("the header describes {needed} bytes, the file has {file_bytes}")));
        }
        Ok(Self { path: path.to_owned(), file, tensors })
    }

    fn checksum(&self, (start, end): (u64, u64)) -> Result<String, FolderError> {
        let read = |source| FolderError::Read { path: self.path.clone(), source };
        let mut file = &self.file;
        file.seek(SeekFrom::Start(start)).map_err(read)?;
        let mut left = file.take(end - start);
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let length = left.read(&mut buffer).map_err(read)?;
            if length == 0 {
                break;
            }
            hasher.update(&buffer[..length]);
        }
        if left.limit() > 0 {
            return Err(damaged(&self.path, "became shorter while it was read".to_owned()));
        }
        Ok(hex::encode(hasher.finalize()))
    }
}

/// Range of a tensor behind the header, if it fits dtype and shape.
fn checked_range(entry: &Value) -> Result<(u64, u64), String> {
    let Entry { dtype, shape, data_offsets: (start, end) } =
        Entry::deserialize(entry).map_err(|error| error.to_string())?;
    let element_bytes = match dtype.as_str() {
        "F64" | "I64" | "U64" => 8,
        "F32" | "I32" | "U32" => 4,
        "BF16" | "F16" | "I16" | "U16" => 2,
        "I8" | "U8" | "BOOL" | "F8_E4M3" | "F8_E5M2" => 1,
        other => return Err(format!("dtype {other} is unknown")),
    };
    let bytes = shape.iter().try_fold(element_bytes, |bytes: u64, size| bytes.checked_mul(*size));
    if start > end || bytes != Some(end - start) {
        return Err(format!("bytes {start}..{end} do not fit {dtype} of shape {shape:?}"));
    }
    Ok((start, end))
}

/// Where the last tensor ends; ranges must follow one another without gap or overlap.
fn check_cover(tensors: &BTreeMap<String, (u64, u64)>, begin: u64) -> Result<u64, String> {
    let mut ranges: Vec<(u64, u64)> = tensors.values().copied().collect();
    ranges.sort_unstable();
    ranges.into_iter().try_fold(begin, |at, (start, end)| {
        if start == at { Ok(end) } else { Err(format!("byte {start} begins a tensor where byte {at} should")) }
    })
}

fn damaged(path: &Path, detail: String) -> FolderError {
    FolderError::Damaged { path: path.to_owned(), detail }
}

#[derive(Debug, Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn weight_paths(folder: &Path) -> Result<Vec<PathBuf>, FolderError> {
    let single = folder.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let index_path = folder.join("model.safetensors.index.json");
    if !index_path.exists() {
        return Err(FolderError::NoWeights { folder: folder.to_owned() });
    }
    let index: Index = serde_json::from_value(read_json(&index_path)?)
        .map_err(|source| FolderError::Json { path: index_path.clone(), source })?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    if let Some(name) = names.iter().find(|name| name.contains('/') || name.contains("..")) {
        return Err(damaged(&index_path, format!("names the file {name:?}, which is not in this folder")));
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

fn read_json(path: &Path) -> Result<Value, FolderError> {
    let read = |source| FolderError::Read { path: path.to_owned(), source };
    let mut text = Vec::new();
    File::open(path).map_err(read)?.take(MAX_JSON_BYTES).read_to_end(&mut text).map_err(read)?;
    serde_json::from_slice(&text).map_err(|source| FolderError::Json { path: path.to_owned(), source })
}

fn read_if_present(path: &Path) -> Result<Option<Vec<u8>>, FolderError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(FolderError::Read { path: path.to_owned(), source }),
    }
}

/// `eos_token_id` is one id, a list of them, null or absent.
fn eos_of(config: &Value) -> BTreeSet<TokenId> {
    let ids = match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.as_slice(),
        Some(one) => std::slice::from_ref(one),
        None => &[],
    };
    ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).map(TokenId).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &str = "models/qwen2-tied";

    /// A copy of the golden checkpoint that a test may spoil.
    fn copy() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in
            ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
        {
            std::fs::copy(grail_golden::path(MODEL).join(name), folder.path().join(name)).unwrap();
        }
        folder
    }

    fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
        let mut value = read_json(path).unwrap();
        change(&mut value);
        std::fs::write(path, value.to_string()).unwrap();
    }

    #[test]
    fn a_sound_folder_is_open() {
        let folder = CheckpointFolder::open(&grail_golden::path(MODEL)).unwrap();
        assert_eq!(folder.eos_tokens(), &BTreeSet::from([TokenId(414)]));
        assert_eq!(folder.count("vocab_size"), Some(512));
        let checksums = folder.checksums().unwrap();
        assert!(checksums.contains_key("model.embed_tokens.weight"));
        assert!(checksums.values().all(|checksum| checksum.len() == 64));
        assert_eq!(folder.checksums().unwrap(), checksums, "reading twice gives the same");
        assert!(folder.weight_bytes() > 200_000);
    }

    #[test]
    fn a_truncated_or_padded_file_is_refused() {
        let folder = copy();
        let path = folder.path().join("model.safetensors");
        let whole = std::fs::read(&path).unwrap();
        for length in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).unwrap();
            let error = CheckpointFolder::open(folder.path()).unwrap_err();
            assert!(matches!(error, FolderError::Damaged { .. } | FolderError::Json { .. }), "{length}: {error}");
        }
        let mut longer = whole.clone();
        longer.push(0);
        std::fs::write(&path, &longer).unwrap();
        assert!(matches!(CheckpointFolder::open(folder.path()), Err(FolderError::Damaged { .. })));
        let mut huge = whole;
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        std::fs::write(&path, &huge).unwrap();
        assert!(matches!(CheckpointFolder::open(folder.path()), Err(FolderError::Damaged { .. })));
    }

    #[test]
    fn entries_must_fit_their_shape_and_follow_one_another() {
        let entry = |dtype: &str, shape: &[u64], start: u64, end: u64| {
            checked_range(&serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}))
        };
        assert_eq!(entry("BF16", &[2, 3], 4, 16), Ok((4, 16)));
        assert!(entry("BF16", &[2, 3], 4, 15).is_err());
        assert!(entry("F32", &[u64::MAX, 2], 0, 8).is_err());
        assert!(entry("F32", &[1], 8, 4).is_err());
        assert!(entry("X", &[1], 0, 1).is_err());
        let cover = |ranges: &[(u64, u64)]| {
            check_cover(&ranges.iter().enumerate().map(|(name, range)| (name.to_string(), *range)).collect(), 10)
        };
        assert_eq!(cover(&[(20, 30), (10, 20)]), Ok(30));
        assert!(cover(&[(10, 20), (21, 30)]).is_err());
        assert!(cover(&[(10, 20), (19, 30)]).is_err());
    }

    #[test]
    fn missing_files_are_named() {
        let folder = copy();
        std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
        assert!(matches!(CheckpointFolder::open(folder.path()), Err(FolderError::NoWeights { .. })));
        let index = |file: &str| serde_json::json!({"weight_map": {"a": file}}).to_string();
        let index_path = folder.path().join("model.safetensors.index.json");
        std::fs::write(&index_path, index("model-00001.safetensors")).unwrap();
        assert!(matches!(CheckpointFolder::open(folder.path()), Err(FolderError::Read { .. })));
        std::fs::write(&index_path, index("../other.safetensors")).unwrap();
        assert!(matches!(CheckpointFolder::open(folder.path()), Err(FolderError::Damaged { .. })));
        std::fs::remove_file(folder.path().join("config.json")).unwrap();
        let error = CheckpointFolder::open(folder.path()).unwrap_err();
        assert!(matches!(error, FolderError::Read { ref path, .. } if path.ends_with("config.json")));
    }

    #[test]
    fn what_a_running_server_cannot_take_over_is_told() {
        let old = CheckpointFolder::open(&grail_golden::path(MODEL)).unwrap();
        let difference =
            |folder: &tempfile::TempDir| old.difference(&CheckpointFolder::open(folder.path()).unwrap()).unwrap();
        let same = copy();
        assert_eq!(difference(&same), Some(Difference::StartFile { name: "special_tokens_map.json" }));
        let special = "special_tokens_map.json";
        std::fs::copy(grail_golden::path(MODEL).join(special), same.path().join(special)).unwrap();
        assert_eq!(difference(&same), None);
        edit(&same.path().join("config.json"), |config| config["transformers_version"] = "5".into());
        assert_eq!(difference(&same), None);
        edit(&same.path().join("generation_config.json"), |config| config["eos_token_id"] = vec![414, 412].into());
        assert!(matches!(difference(&same), Some(Difference::EosTokens { .. })));
        edit(&same.path().join("config.json"), |config| config["rope_theta"] = 10_000.0.into());
        assert!(matches!(difference(&same), Some(Difference::Shape { field: "rope_theta", .. })));
    }
}
