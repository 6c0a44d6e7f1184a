//! What the fuzz targets and the property harness in `tests/fuzz.rs` call: each entry takes any bytes, and panics if what
//! is accepted breaks a promise. None may panic for another reason, or take more memory than it declares.

use std::path::{Component, Path};

use grail_checkpoint::delta::TensorShape;
use grail_checkpoint::{Delta, DeltaFormat, DeltaMetadata, Manifest, Metadata, Shapes, Tree};
use grail_protocol::ids::CheckpointWindow;

/// Bytes of memory for each byte of a JSON document, at worst: a list of single digits.
const BYTES_PER_JSON_BYTE: usize = 256;
/// Bytes of memory for each byte of a payload's header, at worst: a shape of single digits.
const BYTES_PER_HEADER_BYTE: u64 = 32;
/// Bytes for buffers and messages whatever the input.
const FIXED_BYTES: usize = 1 << 20;

/// Memory that may be taken to read a document.
#[must_use]
pub const fn document_memory(text: &[u8]) -> usize {
    FIXED_BYTES + BYTES_PER_JSON_BYTE * text.len()
}

/// Memory that may be taken to decode a payload, whatever its size; zstd's own window is not counted.
#[must_use]
pub fn payload_memory() -> usize {
    let base = base();
    let bytes = base.payload_limit() + BYTES_PER_HEADER_BYTE * base.header_limit();
    FIXED_BYTES + usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Reads `metadata.json` of both trees.
pub fn metadata(text: &[u8]) {
    for tree in [Tree::Full, Tree::Delta] {
        let Ok(metadata) = Metadata::parse(text, CheckpointWindow(3030), tree) else { continue };
        if let Ok(files) = metadata.files() {
            assert_safe(files);
            assert!(tree == Tree::Full || metadata.base().is_ok_and(|base| base.0 < 3030));
        }
        if let Ok(policy) = metadata.policy() {
            assert!((1..=8192).contains(&policy.generation.max_new()));
            assert!((0.01..=2.0).contains(&policy.generation.temperature));
        }
    }
}

/// Reads a file manifest.
pub fn manifest(text: &[u8]) {
    let Ok(value) = serde_json::from_slice(text) else { return };
    let Ok(manifest) = Manifest::from_json(&value) else { return };
    assert_safe(&manifest);
    assert!(Manifest::from_json(&manifest.to_json()).is_ok_and(|again| again == manifest));
}

/// Reads `delta_metadata.json`.
pub fn delta_metadata(text: &[u8]) {
    if let Ok(DeltaMetadata { format }) = DeltaMetadata::parse(text) {
        assert_eq!(format.as_str().parse(), Ok(format));
    }
}

/// Decodes a payload as it is stored, and walks over everything that it changes.
pub fn payload(format: DeltaFormat, packed: &[u8]) {
    let base = base();
    let delta = match Delta::decode(packed, format, &base, Path::new("/nowhere")) {
        Ok(delta) => delta,
        Err(error) => {
            assert!(error.class().is_some(), "no payload for this base is large enough for a file: {error}");
            return;
        }
    };
    for (name, tensor) in delta.tensors() {
        let elements = base.get(name).map(TensorShape::elements);
        assert_eq!(elements, Some(tensor.elements));
        let (mut seen, mut next) = (0, 0);
        let Some(mut cursor) = delta.cursor(name) else { continue };
        while let Ok(Some(changes)) = cursor.next_block() {
            assert_eq!(changes.values.len(), changes.positions.len() * tensor.width);
            for position in changes.positions {
                assert!(*position >= next && *position < tensor.elements, "{name}: {position} after {next}");
                next = position + 1;
            }
            seen += changes.positions.len() as u64;
        }
        assert_eq!(seen, tensor.listed, "{name}");
    }
}

/// The checkpoint that payloads are decoded for; it has the tensors of the golden payloads that name only a few.
#[must_use]
pub fn base() -> Shapes {
    let tensors: [(&str, &str, &[u64]); 7] = [
        ("w", "BF16", &[4, 6]),
        ("a.weight", "BF16", &[8, 8]),
        ("x", "BF16", &[1, 9]),
        ("long", "BF16", &[70_000]),
        ("tall", "F16", &[600, 3]),
        ("f", "F32", &[2, 3, 4]),
        ("empty", "BF16", &[0, 5]),
    ];
    let shape = |dtype: &str, shape: &[u64]| TensorShape { dtype: dtype.to_owned(), shape: shape.to_vec() };
    tensors.into_iter().map(|(name, dtype, sizes)| (name.to_owned(), shape(dtype, sizes))).collect()
}

fn assert_safe(manifest: &Manifest) {
    for (name, _) in manifest.required() {
        assert!(Path::new(name).components().all(|part| matches!(part, Component::Normal(_))), "{name}");
    }
}
