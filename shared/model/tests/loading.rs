//! Folders that cannot be loaded: each names what is wrong, where, and nothing else happens.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use grail_model::config::{ConfigError, ModelConfig, RopeScaling};
use grail_model::safetensors::{FileDtype, OwnedTensor, SafetensorsError, SafetensorsFile, write};
use grail_model::{Device, LoadError, LoadOptions, Model, PackedBatch, weights_hash_of_dir};
use grail_protocol::ids::TokenId;
use proptest::prelude::*;
use serde_json::json;

const GOLDEN: &str = "models/qwen2-tied";

/// A copy of a golden model whose parts a test may spoil.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(grail_golden::path(&format!("{GOLDEN}/{name}")), folder.path().join(name)).unwrap();
        }
        folder
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn weights(&self) -> PathBuf {
        self.path().join("model.safetensors")
    }

    fn config(&self, change: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) {
        let path = self.path().join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(config.as_object_mut().unwrap());
        std::fs::write(&path, config.to_string()).unwrap();
    }

    fn tensors(&self) -> Vec<OwnedTensor> {
        let file = SafetensorsFile::open(&self.weights()).unwrap();
        file.names()
            .map(|name| {
                let view = file.tensor(name).unwrap();
                OwnedTensor {
                    name: name.to_owned(),
                    dtype: view.dtype,
                    shape: view.shape.to_vec(),
                    bytes: view.bytes.to_vec(),
                }
            })
            .collect()
    }

    /// Rewrites the weights.
    fn rewrite(&self, change: impl FnOnce(&mut Vec<OwnedTensor>)) {
        let mut tensors = self.tensors();
        change(&mut tensors);
        // Written beside and renamed: the old file may still be mapped.
        let beside = self.path().join("new");
        write(&beside, &tensors).unwrap();
        std::fs::rename(beside, self.weights()).unwrap();
    }

    /// Cuts the weights into two shards with an index, which `change` may spoil.
    fn shard(&self, change: impl FnOnce(&mut BTreeMap<String, String>)) {
        let mut first = self.tensors();
        let second = first.split_off(first.len() / 2);
        let mut map = BTreeMap::new();
        for (name, tensors) in
            [("model-00001-of-00002.safetensors", &first), ("model-00002-of-00002.safetensors", &second)]
        {
            write(&self.path().join(name), tensors).unwrap();
            map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), name.to_owned())));
        }
        std::fs::remove_file(self.weights()).unwrap();
        change(&mut map);
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        std::fs::write(self.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    }

    fn load(&self) -> Result<Model, LoadError> {
        Model::load(self.path(), &LoadOptions::on(Device::Cpu))
    }

    fn error(&self) -> LoadError {
        self.load().expect_err("the folder is spoiled")
    }
}

fn find<'a>(tensors: &'a mut [OwnedTensor], name: &str) -> &'a mut OwnedTensor {
    tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
}

const PROJECTION: &str = "model.layers.1.mlp.up_proj.weight";

#[test]
fn a_missing_tensor_is_named() {
    let folder = Folder::new();
    folder.rewrite(|tensors| tensors.retain(|tensor| tensor.name != PROJECTION));
    let error = folder.error();
    assert!(matches!(&error, LoadError::MissingTensor { tensor, .. } if tensor == PROJECTION), "{error}");
}

#[test]
fn an_extra_tensor_is_named() {
    let folder = Folder::new();
    folder.rewrite(|tensors| find(tensors, PROJECTION).name = "model.layers.7.mlp.up_proj.weight".to_owned());
    // The missing one is met first; with it present, the extra one is.
    assert!(matches!(folder.error(), LoadError::MissingTensor { .. }));
    let folder = Folder::new();
    folder.rewrite(|tensors| {
        tensors.push(OwnedTensor {
            name: "model.layers.0.self_attn.extra".to_owned(),
            dtype: FileDtype::Bf16,
            shape: vec![2],
            bytes: vec![0; 4],
        });
    });
    let error = folder.error();
    assert!(
        matches!(&error, LoadError::ExtraTensor { tensor, .. } if tensor == "model.layers.0.self_attn.extra"),
        "{error}"
    );
}

#[test]
fn a_wrong_shape_is_named_with_both_shapes() {
    let folder = Folder::new();
    folder.rewrite(|tensors| find(tensors, PROJECTION).shape.reverse());
    match folder.error() {
        LoadError::WrongShape { tensor, found, expected, .. } => {
            assert_eq!((tensor.as_str(), found, expected), (PROJECTION, vec![64, 160], vec![160, 64]));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_wrong_dtype_is_named() {
    let folder = Folder::new();
    folder.rewrite(|tensors| {
        let tensor = find(tensors, PROJECTION);
        tensor.dtype = FileDtype::Other { name: "I16", element_bytes: 2 };
    });
    match folder.error() {
        LoadError::WrongDtype { tensor, found, .. } => assert_eq!((tensor.as_str(), found), (PROJECTION, "I16")),
        other => panic!("{other}"),
    }
}

#[test]
fn a_truncated_file_is_named_with_both_sizes() {
    let folder = Folder::new();
    let whole = std::fs::read(folder.weights()).unwrap();
    for (length, expects_tensor) in
        [(whole.len() - 1, true), (whole.len() / 2, true), (100, false), (3, false), (0, false)]
    {
        let beside = folder.path().join("new");
        std::fs::write(&beside, &whole[..length]).unwrap();
        std::fs::rename(beside, folder.weights()).unwrap();
        match folder.error() {
            LoadError::Safetensors(SafetensorsError::Truncated { what, file_bytes, needed_bytes, .. }) => {
                assert_eq!(file_bytes, length as u64);
                assert!(needed_bytes > file_bytes);
                assert_eq!(what.starts_with("tensor "), expects_tensor, "{what}");
            }
            other => panic!("{length}: {other}"),
        }
    }
}

#[test]
fn a_damaged_header_is_refused() {
    let folder = Folder::new();
    let mut bytes = std::fs::read(folder.weights()).unwrap();
    bytes[8] = b'!';
    std::fs::write(folder.weights(), &bytes).unwrap();
    assert!(matches!(folder.error(), LoadError::Safetensors(SafetensorsError::Header { .. })));
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(folder.weights(), &bytes).unwrap();
    let error = folder.error().to_string();
    assert!(error.contains("exceeds"), "{error}");
}

/// A file of one entry under the name `x`, and eight bytes of data.
fn one_entry(entry: &serde_json::Value) -> Result<SafetensorsFile, SafetensorsError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let header = json!({"x": entry}).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.extend([0; 8]);
    std::fs::write(&path, bytes).unwrap();
    SafetensorsFile::open(&path)
}

#[test]
fn contradictory_entries_are_refused() {
    let entry = |dtype: &str, shape: &[u64], offsets: [u64; 2]| {
        one_entry(&json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}))
    };
    assert!(entry("F32", &[2], [0, 8]).is_ok());
    assert!(entry("F32", &[], [4, 8]).is_ok());
    for (dtype, shape, offsets) in [
        ("F32", &[3][..], [0, 8]),
        ("F32", &[1], [8, 4]),
        ("NEW", &[2], [0, 8]),
        ("F32", &[u64::MAX, u64::MAX], [0, 8]),
        ("BF16", &[1 << 63], [0, 8]),
    ] {
        let error = entry(dtype, shape, offsets).expect_err("the entry contradicts itself");
        assert!(matches!(&error, SafetensorsError::Entry { tensor, .. } if tensor == "x"), "{error}");
    }
    assert!(matches!(entry("F32", &[2], [4, 12]), Err(SafetensorsError::Truncated { .. })));
    assert!(matches!(one_entry(&json!(7)), Err(SafetensorsError::Entry { .. })));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), length in 0..120_u64) {
        if let Some(prefix) = bytes.first_chunk_mut::<8>() {
            *prefix = length.to_le_bytes();
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        std::fs::write(&path, bytes).unwrap();
        if let Ok(file) = SafetensorsFile::open(&path) {
            for name in file.names() {
                prop_assert!(file.tensor(name).is_some());
            }
        }
    }
}

fn hidden_and_logits(model: &Model) -> (Vec<f32>, Vec<f32>) {
    let mut batch = PackedBatch::new();
    batch.push_sequence(&[TokenId(5), TokenId(300), TokenId(17), TokenId(414)]);
    model.inspect(&batch, &[0, 3]).unwrap()
}

#[test]
fn shards_load_as_the_single_file_does() {
    let single = Folder::new();
    let sharded = Folder::new();
    sharded.shard(|_| ());
    let (left, right) = (single.load().unwrap(), sharded.load().unwrap());
    assert_eq!(hidden_and_logits(&left), hidden_and_logits(&right));
    assert_eq!(left.weights_hash(), right.weights_hash());
    assert_eq!(weights_hash_of_dir(sharded.path()).unwrap(), left.weights_hash());
}

#[test]
fn a_broken_index_is_refused() {
    let expect = |change: fn(&mut BTreeMap<String, String>), part: &str| {
        let folder = Folder::new();
        folder.shard(change);
        let error = folder.error();
        assert!(matches!(error, LoadError::BrokenIndex { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    };
    expect(|map| drop(map.insert(PROJECTION.to_owned(), "missing.safetensors".to_owned())), "missing.safetensors");
    expect(|map| drop(map.insert(PROJECTION.to_owned(), "../outside.safetensors".to_owned())), "no file name");
    expect(|map| drop(map.remove(PROJECTION)), PROJECTION);
    expect(
        |map| drop(map.insert("model.more".to_owned(), "model-00001-of-00002.safetensors".to_owned())),
        "model.more",
    );
    expect(
        |map| {
            let other = map.get("model.norm.weight").cloned().unwrap();
            drop(map.insert("model.embed_tokens.weight".to_owned(), other));
        },
        "model.embed_tokens.weight",
    );
    let folder = Folder::new();
    std::fs::remove_file(folder.weights()).unwrap();
    std::fs::write(folder.path().join("model.safetensors.index.json"), "{}").unwrap();
    assert!(matches!(folder.error(), LoadError::BrokenIndex { .. }));
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let folder = Folder::new();
    let tensors = folder.tensors();
    folder.shard(|_| ());
    write(&folder.path().join("model-00002-of-00002.safetensors"), &tensors).unwrap();
    assert!(matches!(folder.error(), LoadError::DuplicateTensor { .. }));
}

#[test]
fn two_sets_of_weights_or_none_are_refused() {
    let folder = Folder::new();
    std::fs::write(folder.path().join("model.safetensors.index.json"), "{}").unwrap();
    assert!(matches!(folder.error(), LoadError::Ambiguous { .. }));
    let folder = Folder::new();
    std::fs::remove_file(folder.weights()).unwrap();
    assert!(matches!(folder.error(), LoadError::NoWeights { .. }));
}

#[test]
fn a_tied_model_may_carry_its_head_if_it_is_the_embedding() {
    let folder = Folder::new();
    let without = folder.load().unwrap();
    let embedding = find(&mut folder.tensors(), "model.embed_tokens.weight").bytes.clone();
    let head = |bytes: Vec<u8>| OwnedTensor {
        name: "lm_head.weight".to_owned(),
        dtype: FileDtype::Bf16,
        shape: vec![512, 64],
        bytes,
    };
    folder.rewrite(|tensors| tensors.push(head(embedding.clone())));
    let with = folder.load().unwrap();
    assert_eq!(hidden_and_logits(&without), hidden_and_logits(&with));
    // The hash is of the file's tensors, so it differs.
    assert_ne!(without.weights_hash(), with.weights_hash());

    let mut other = embedding;
    other[1] ^= 1;
    folder.rewrite(|tensors| *find(tensors, "lm_head.weight") = head(other));
    assert!(matches!(folder.error(), LoadError::TiedHeadDiffers { .. }));
}

#[test]
fn weights_of_other_float_types_are_cast() {
    let folder = Folder::new();
    let before = hidden_and_logits(&folder.load().unwrap());
    folder.rewrite(|tensors| {
        for tensor in tensors {
            tensor.bytes = tensor
                .bytes
                .as_chunks::<2>()
                .0
                .iter()
                .flat_map(|bits| half::bf16::from_le_bytes(*bits).to_f32().to_le_bytes())
                .collect();
            tensor.dtype = FileDtype::F32;
        }
    });
    assert_eq!(hidden_and_logits(&folder.load().unwrap()), before);
}

#[test]
fn configurations_that_the_forward_pass_does_not_fit_are_refused() {
    let refuse = |key: &str, value: Option<serde_json::Value>, part: &str| {
        let folder = Folder::new();
        folder.config(|config| {
            config.remove(key);
            config.extend(value.map(|value| (key.to_owned(), value)));
        });
        let error = folder.error();
        assert!(matches!(error, LoadError::Config(_)), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    };
    let layers = json!(["full_attention", "sliding_attention"]);
    refuse("architectures", Some(json!(["MistralForCausalLM"])), "MistralForCausalLM");
    refuse("architectures", None, "architecture");
    refuse("use_sliding_window", Some(json!(true)), "use_sliding_window");
    refuse("layer_types", Some(layers), "layer_types");
    refuse("hidden_act", Some(json!("gelu")), "hidden_act");
    refuse("num_key_value_heads", Some(json!(3)), "num_key_value_heads");
    refuse("vocab_size", Some(json!(0)), "vocab_size");
    refuse("vocab_size", Some(json!("many")), "config.json");
    refuse("hidden_size", None, "hidden_size");
    refuse("hidden_size", Some(json!(8)), "hidden_size");
    refuse("rope_scaling", Some(json!({"rope_type": "longrope"})), "longrope");
    refuse("rope_scaling", Some(json!({"rope_type": "linear"})), "factor");
    refuse("quantization_config", Some(json!({"quant_method": "awq"})), "quantization_config");
    refuse("partial_rotary_factor", Some(json!(0.5)), "partial_rotary_factor");
    let folder = Folder::new();
    std::fs::remove_file(folder.path().join("config.json")).unwrap();
    assert!(matches!(folder.error(), LoadError::Config(ConfigError::Read { .. })));
}

#[test]
fn newer_rope_parameters_mean_what_the_older_fields_mean() {
    for golden in ["models/qwen2-untied-yarn", "models/llama-tied-llama3rope", "models/llama-untied-linear", GOLDEN] {
        let text = std::fs::read(grail_golden::path(&format!("{golden}/config.json"))).unwrap();
        let path = Path::new("config.json");
        let older = ModelConfig::from_json(&text, path).unwrap();
        let mut json: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let config = json.as_object_mut().unwrap();
        let mut rope = config.remove("rope_scaling").filter(serde_json::Value::is_object).unwrap_or(json!({}));
        rope["rope_theta"] = config.remove("rope_theta").unwrap();
        config.insert("rope_parameters".to_owned(), rope);
        let newer = ModelConfig::from_json(json.to_string().as_bytes(), path).unwrap();
        assert_eq!(older, newer);
    }
}

#[test]
fn yarn_takes_its_length_from_the_model_if_it_has_none() {
    let folder = Folder::new();
    folder.config(|config| {
        config.insert("rope_scaling".to_owned(), json!({"type": "yarn", "factor": 4.0, "beta_fast": 0}));
    });
    match ModelConfig::from_dir(folder.path()).unwrap().rope.scaling {
        RopeScaling::Yarn(yarn) => {
            assert_eq!((yarn.original_max_position_embeddings, yarn.beta_fast, yarn.truncate), (2048.0, 32.0, true));
        }
        other => panic!("{other:?}"),
    }
    folder.load().unwrap();
}

#[test]
fn a_gpu_that_is_not_there_is_named() {
    // No CUDA library is loaded in this process, so none is visible, whatever the host has.
    let error = Model::load(Folder::new().path(), &LoadOptions::on(Device::Cuda(1))).expect_err("no GPU is visible");
    assert!(matches!(error, LoadError::NoDevice { device: Device::Cuda(1), devices: 0 }), "{error}");
}
