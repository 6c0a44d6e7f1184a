//! Hash and header rules of safetensors folders.

use std::path::Path;

use crate::faulty::write_safetensors;
use grail_checkpoint::metadata::PublishedHash;
use grail_checkpoint::weights::{HashAgreement, WeightsError, WeightsFiles};
use grail_protocol::ids::WeightsHash;
use xxhash_rust::xxh3::xxh3_128;

const A: (&str, &[u8]) = ("a.weight", &[1, 2]);
const EMBEDDING: (&str, &[u8]) = ("model.embed_tokens.weight", &[3, 4, 5, 6]);
const UPPER: (&str, &[u8]) = ("Z.weight", &[7, 8]);

fn folder(write: impl FnOnce(&Path)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    folder
}

fn index(path: &Path, map: &serde_json::Value) {
    let text = serde_json::to_vec(&serde_json::json!({"metadata": {}, "weight_map": map})).unwrap();
    std::fs::write(path.join("model.safetensors.index.json"), text).unwrap();
}

#[test]
fn tensors_are_hashed_in_code_point_order_whatever_the_file_order() {
    let one = folder(|path| write_safetensors(&path.join("model.safetensors"), &[EMBEDDING, A, UPPER]));
    let two = folder(|path| {
        write_safetensors(&path.join("model-00001-of-00002.safetensors"), &[EMBEDDING, UPPER]);
        write_safetensors(&path.join("model-00002-of-00002.safetensors"), &[A]);
        let map = serde_json::json!({
            EMBEDDING.0: "model-00001-of-00002.safetensors",
            UPPER.0: "model-00001-of-00002.safetensors",
            A.0: "model-00002-of-00002.safetensors",
        });
        index(path, &map);
    });
    let expected = WeightsHash(xxh3_128(&[7, 8, 1, 2, 3, 4, 5, 6]));
    for folder in [one, two] {
        let weights = WeightsFiles::open(folder.path()).unwrap();
        assert_eq!(weights.hash().unwrap(), expected);
        assert_eq!(weights.bytes(), 8);
        assert_eq!(weights.tensors()[EMBEDDING.0].shape, [2]);
        assert_eq!(weights.tensors()[EMBEDDING.0].dtype, "BF16");
    }
}

#[test]
fn a_tied_head_may_be_counted_as_a_copy_of_the_embedding() {
    let tied = folder(|path| write_safetensors(&path.join("model.safetensors"), &[A, EMBEDDING]));
    let weights = WeightsFiles::open(tied.path()).unwrap();
    let hash = weights.hash().unwrap();
    let with_head = WeightsHash(xxh3_128(&[1, 2, 3, 4, 5, 6, 3, 4, 5, 6]));
    assert_eq!(weights.hash_with_tied_head().unwrap(), Some(with_head));
    for (published, expected) in [
        (PublishedHash::Stated(hash), HashAgreement::Equal),
        (PublishedHash::Stated(with_head), HashAgreement::EqualWithTiedHead),
        (PublishedHash::Stated(WeightsHash(1)), HashAgreement::Different),
        (PublishedHash::Malformed("x".to_owned()), HashAgreement::Different),
        (PublishedHash::None, HashAgreement::NotPublished),
    ] {
        assert_eq!(weights.agreement(hash, &published).unwrap(), expected, "{published:?}");
    }
    let untied = folder(|path| {
        write_safetensors(&path.join("model.safetensors"), &[EMBEDDING, ("lm_head.weight", &[9, 9])]);
    });
    assert_eq!(WeightsFiles::open(untied.path()).unwrap().hash_with_tied_head().unwrap(), None);
}

#[test]
fn folders_without_one_clear_set_of_weights_are_refused() {
    let none = folder(|_| {});
    assert!(matches!(WeightsFiles::open(none.path()), Err(WeightsError::None { .. })));
    let both = folder(|path| {
        write_safetensors(&path.join("model.safetensors"), &[A]);
        index(path, &serde_json::json!({A.0: "model.safetensors"}));
    });
    assert!(matches!(WeightsFiles::open(both.path()), Err(WeightsError::Ambiguous { .. })));
    let elsewhere = folder(|path| {
        write_safetensors(&path.join("x.safetensors"), &[A]);
        index(path, &serde_json::json!({A.0: "x.safetensors", "b": "x.safetensors"}));
    });
    assert!(matches!(WeightsFiles::open(elsewhere.path()), Err(WeightsError::NotInShard { name, .. }) if name == "b"));
    let twice = folder(|path| {
        write_safetensors(&path.join("x.safetensors"), &[A, UPPER]);
        write_safetensors(&path.join("y.safetensors"), &[A]);
        index(path, &serde_json::json!({A.0: "y.safetensors", UPPER.0: "x.safetensors"}));
    });
    assert!(matches!(WeightsFiles::open(twice.path()), Err(WeightsError::Twice { name, .. }) if name == A.0));
    let outside = folder(|path| index(path, &serde_json::json!({A.0: "../x.safetensors"})));
    assert!(matches!(WeightsFiles::open(outside.path()), Err(WeightsError::Format { .. })));
}

#[test]
fn damaged_headers_are_refused_before_anything_is_allocated_for_them() {
    let header = |length: u64, text: &str, data: usize| {
        [length.to_le_bytes().as_slice(), text.as_bytes(), &vec![0; data]].concat()
    };
    let exact = |text: &str, data| header(text.len() as u64, text, data);
    for (what, file) in [
        ("shorter than its length field", vec![0; 7]),
        ("header longer than the file", header(100, "{}", 0)),
        ("header of 2^63 bytes", header(1 << 63, "{}", 0)),
        ("no JSON", exact("{", 0)),
        ("no object", exact("[]", 0)),
        ("no offsets", exact(r#"{"a":{"dtype":"BF16","shape":[1]}}"#, 2)),
        ("data beyond the end", exact(r#"{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}"#, 2)),
        ("offsets in disorder", exact(r#"{"a":{"dtype":"BF16","shape":[0],"data_offsets":[2,0]}}"#, 2)),
        ("negative offset", exact(r#"{"a":{"dtype":"BF16","shape":[1],"data_offsets":[-2,0]}}"#, 2)),
        ("shape of another size", exact(r#"{"a":{"dtype":"BF16","shape":[3],"data_offsets":[0,2]}}"#, 2)),
        (
            "shape that overflows",
            exact(&format!(r#"{{"a":{{"dtype":"BF16","shape":[{0},{0}],"data_offsets":[0,2]}}}}"#, u64::MAX), 2),
        ),
        ("unknown dtype", exact(r#"{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,2]}}"#, 2)),
    ] {
        let folder = folder(|path| std::fs::write(path.join("model.safetensors"), &file).unwrap());
        let opened = WeightsFiles::open(folder.path());
        assert!(matches!(opened, Err(WeightsError::Format { .. })), "{what}: {opened:?}");
    }
}
