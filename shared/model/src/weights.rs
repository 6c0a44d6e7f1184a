//! The tensors of a Hugging Face folder: which there must be, where they lie, and their hash.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use grail_protocol::ids::WeightsHash;
use serde::Deserialize;
use tch::Kind;
use xxhash_rust::xxh3::Xxh3Default;

use crate::checksum::{Checksums, Encoding, HostTensor, host_checksums};
use crate::config::{Architecture, ModelConfig};
use crate::error::LoadError;
use crate::safetensors::{FileDtype, SafetensorsFile, TensorView};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
/// Output matrix; absent in most files of tied models.
pub(crate) const HEAD: &str = "lm_head.weight";
/// Token embedding.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";

/// Hash of a checkpoint folder's weights as the protocol defines it: xxh3-128 over the bytes of every tensor in the files'
/// dtype, in code-point order of their names. Nothing is loaded into libtorch.
///
/// # Errors
/// [`LoadError`] if the files are missing or damaged. Names and shapes are not compared with a configuration.
pub fn weights_hash_of_dir(folder: &Path) -> Result<WeightsHash, LoadError> {
    Ok(WeightFiles::open(folder)?.hash())
}

/// The mapped weight files of one folder.
#[derive(Debug)]
pub struct WeightFiles {
    folder: PathBuf,
    files: Vec<SafetensorsFile>,
    /// Name to index into `files`; ordered as the hash wants it.
    tensors: BTreeMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl WeightFiles {
    /// Maps the single file, or the shards that the index names.
    ///
    /// # Errors
    /// [`LoadError`]: no or two sets of files, a broken index, a damaged file, a tensor in two files.
    pub fn open(folder: &Path) -> Result<Self, LoadError> {
        let (single, index) = (folder.join(SINGLE_FILE), folder.join(INDEX_FILE));
        match (single.exists(), index.exists()) {
            (false, false) => Err(LoadError::NoWeights { folder: folder.to_owned() }),
            (true, true) => Err(LoadError::Ambiguous { folder: folder.to_owned() }),
            (true, false) => Self::from_files(folder, vec![SafetensorsFile::open(&single)?]),
            (false, true) => Self::from_index(folder, &index),
        }
    }

    fn from_index(folder: &Path, path: &Path) -> Result<Self, LoadError> {
        let broken = |detail: String| LoadError::BrokenIndex { path: path.to_owned(), detail };
        let text = std::fs::read(path).map_err(|error| broken(error.to_string()))?;
        let index: Index = serde_json::from_slice(&text).map_err(|error| broken(error.to_string()))?;
        let names: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
        let mut files = Vec::with_capacity(names.len());
        for name in names {
            // A shard lies beside its index; a path would let an index reach outside the checkpoint.
            if Path::new(name).file_name().is_none_or(|file| file != name) {
                return Err(broken(format!("{name:?} is no file name")));
            }
            let shard = folder.join(name);
            if !shard.exists() {
                return Err(broken(format!("shard {name} does not exist")));
            }
            files.push(SafetensorsFile::open(&shard)?);
        }
        let found = Self::from_files(folder, files)?;
        for (tensor, shard) in &index.weight_map {
            let holder = found.tensors.get(tensor).and_then(|at| found.files.get(*at));
            if holder.is_none_or(|file| file.path() != folder.join(shard)) {
                return Err(broken(format!("tensor {tensor} is not in {shard}")));
            }
        }
        match found.tensors.keys().find(|name| !index.weight_map.contains_key(*name)) {
            Some(name) => Err(broken(format!("tensor {name} is in a shard but not in the index"))),
            None => Ok(found),
        }
    }

    fn from_files(folder: &Path, files: Vec<SafetensorsFile>) -> Result<Self, LoadError> {
        let mut tensors = BTreeMap::new();
        for (at, file) in files.iter().enumerate() {
            for name in file.names() {
                if let Some(earlier) = tensors.insert(name.to_owned(), at) {
                    return Err(LoadError::DuplicateTensor {
                        tensor: name.to_owned(),
                        first: files.get(earlier).map(|file| file.path().to_owned()).unwrap_or_default(),
                        second: file.path().to_owned(),
                    });
                }
            }
        }
        Ok(Self { folder: folder.to_owned(), files, tensors })
    }

    /// Hash over all tensors; see [`weights_hash_of_dir`].
    #[must_use]
    pub fn hash(&self) -> WeightsHash {
        let mut hasher = Xxh3Default::new();
        for (_, view) in self.iter() {
            hasher.update(view.bytes);
        }
        WeightsHash(hasher.digest128())
    }

    /// All tensors in code-point order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, TensorView<'_>)> {
        self.tensors.iter().filter_map(|(name, at)| Some((name.as_str(), self.files.get(*at)?.tensor(name)?)))
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn total_bytes(&self) -> usize {
        self.iter().map(|(_, view)| view.bytes.len()).sum()
    }

    /// Compares names, shapes and dtypes with what `config` describes.
    ///
    /// # Errors
    /// [`LoadError`] naming the first missing, extra, wrong-shaped or wrong-typed tensor.
    pub fn check(&self, config: &ModelConfig) -> Result<(), LoadError> {
        let mut expected: BTreeMap<String, Vec<usize>> = expected_tensors(config).into_iter().collect();
        if config.tie_word_embeddings && self.tensors.contains_key(HEAD) {
            expected.insert(HEAD.to_owned(), vec![config.vocab_size, config.hidden_size]);
        }
        for (name, shape) in &expected {
            let (file, view) = self.find(name)?;
            if view.shape != shape.as_slice() {
                return Err(LoadError::WrongShape {
                    tensor: name.clone(),
                    file: file.to_owned(),
                    found: view.shape.to_vec(),
                    expected: shape.clone(),
                });
            }
            file_kind(name, file, view.dtype)?;
        }
        for (name, at) in &self.tensors {
            if !expected.contains_key(name) {
                let file = self.files.get(*at).map(|file| file.path().to_owned()).unwrap_or_default();
                return Err(LoadError::ExtraTensor { tensor: name.clone(), file });
            }
        }
        if config.tie_word_embeddings && self.tensors.contains_key(HEAD) {
            let (file, head) = self.find(HEAD)?;
            let (_, embedding) = self.find(EMBEDDING)?;
            if head.dtype != embedding.dtype || head.bytes != embedding.bytes {
                return Err(LoadError::TiedHeadDiffers { file: file.to_owned() });
            }
        }
        Ok(())
    }

    /// Bytes of one tensor and what they are.
    ///
    /// # Errors
    /// [`LoadError`] if it is missing or of an unsupported dtype.
    pub(crate) fn elements(&self, name: &str) -> Result<(&[u8], Kind), LoadError> {
        let (file, view) = self.find(name)?;
        Ok((view.bytes, file_kind(name, file, view.dtype)?))
    }

    /// Dtype of every tensor.
    pub(crate) fn dtypes(&self) -> BTreeMap<String, FileDtype> {
        self.iter().map(|(name, view)| (name.to_owned(), view.dtype)).collect()
    }

    /// Checksum of every tensor, read once; see [`crate::checksum`].
    #[must_use]
    pub fn checksums(&self) -> Checksums {
        let tensors: Vec<HostTensor<'_>> = self
            .iter()
            .map(|(_, view)| HostTensor { bytes: view.bytes, encoding: Encoding::of_file(view.dtype) })
            .collect();
        self.iter().map(|(name, _)| name.to_owned()).zip(host_checksums(&tensors)).collect()
    }

    pub(crate) fn find(&self, name: &str) -> Result<(&Path, TensorView<'_>), LoadError> {
        self.tensors
            .get(name)
            .and_then(|at| self.files.get(*at))
            .and_then(|file| Some((file.path(), file.tensor(name)?)))
            .ok_or_else(|| LoadError::MissingTensor { tensor: name.to_owned(), folder: self.folder.clone() })
    }
}

fn file_kind(name: &str, file: &Path, dtype: FileDtype) -> Result<Kind, LoadError> {
    match dtype {
        FileDtype::F32 => Ok(Kind::Float),
        FileDtype::F16 => Ok(Kind::Half),
        FileDtype::Bf16 => Ok(Kind::BFloat16),
        FileDtype::Other { name: found, .. } => {
            Err(LoadError::WrongDtype { tensor: name.to_owned(), file: file.to_owned(), found })
        }
    }
}

/// Names and shapes of a model's tensors; the output matrix only if it is a tensor of its own.
#[must_use]
pub fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let hidden = config.hidden_size;
    let mut tensors = vec![(EMBEDDING.to_owned(), vec![config.vocab_size, hidden])];
    for layer in 0..config.layers {
        let mut add = |suffix: &str, shape: &[usize]| {
            tensors.push((format!("model.layers.{layer}.{suffix}"), shape.to_vec()));
        };
        for (name, rows, columns, bias) in projections(config) {
            add(&format!("{name}.weight"), &[rows, columns]);
            if bias {
                add(&format!("{name}.bias"), &[rows]);
            }
        }
        if config.architecture == Architecture::Qwen3 {
            add("self_attn.q_norm.weight", &[config.head_dim]);
            add("self_attn.k_norm.weight", &[config.head_dim]);
        }
        add("input_layernorm.weight", &[hidden]);
        add("post_attention_layernorm.weight", &[hidden]);
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
    if !config.tie_word_embeddings {
        tensors.push((HEAD.to_owned(), vec![config.vocab_size, hidden]));
    }
    tensors
}

/// Name, rows, columns and whether there is a bias, of the projections of one layer.
fn projections(config: &ModelConfig) -> [(&'static str, usize, usize, bool); 7] {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (query, kv) = (config.query_size(), config.kv_size());
    [
        ("self_attn.q_proj", query, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, query, config.output_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    ]
}
