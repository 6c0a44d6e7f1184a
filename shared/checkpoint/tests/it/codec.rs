//! The golden cases of the sparse codecs: what they decode to, which rule a broken payload breaks, and that the encoder
//! writes what the trainer writes.

use std::collections::BTreeMap;

use crate::folders::{Tensor, Tensors, assert_changes, read_tensors, write_folder};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use grail_checkpoint::delta::DeltaEncoder;
use grail_checkpoint::mirror::build;
use grail_checkpoint::{Delta, DeltaError, DeltaFormat, Mirror, MirrorPlan, Shapes, WeightsFiles};
use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Codec {
    cases: Vec<CodecCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CodecCase {
    id: String,
    format: String,
    note: Option<String>,
    payload_b64: String,
    payload_sha256: String,
    header: Option<Value>,
    base: BTreeMap<String, TensorCase>,
    base_weights_hash: WeightsHash,
    expected: BTreeMap<String, TensorCase>,
    expected_weights_hash: WeightsHash,
    /// Only of payloads that the reference's encoder wrote.
    reference_result_equals_current: Option<bool>,
    verdict_rust: String,
    verdict_reference: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TensorCase {
    dtype: String,
    shape: Vec<u64>,
    sha256: String,
    data_b64: Option<String>,
    fill_bits_hex: Option<String>,
    changed: Option<Vec<(u64, String)>>,
}

impl TensorCase {
    /// The tensor, from its bytes, from one repeated element, or from `base` and what changed.
    fn tensor(&self, base: Option<&Tensor>) -> Tensor {
        let dtype = match self.dtype.as_str() {
            "bfloat16" => "BF16",
            "float16" => "F16",
            "float32" => "F32",
            other => panic!("{other}"),
        };
        let elements = usize::try_from(self.shape.iter().product::<u64>()).unwrap();
        let bytes = match (&self.data_b64, &self.fill_bits_hex) {
            (Some(text), None) => BASE64_STANDARD.decode(text).unwrap(),
            (None, Some(bits)) => little_endian(bits).repeat(elements),
            (None, None) => self.changed_bytes(base.unwrap()),
            (Some(_), Some(_)) => panic!("two forms of one tensor"),
        };
        assert_eq!(hex::encode(Sha256::digest(&bytes)), self.sha256);
        Tensor { dtype: dtype.to_owned(), shape: self.shape.clone(), bytes }
    }

    fn changed_bytes(&self, base: &Tensor) -> Vec<u8> {
        let mut bytes = base.bytes.clone();
        let width = base.width();
        for (position, bits) in self.changed.as_ref().unwrap() {
            let start = usize::try_from(*position).unwrap() * width;
            bytes[start..start + width].copy_from_slice(&little_endian(bits));
        }
        bytes
    }
}

/// Bits in big-endian hex as they lie in memory.
fn little_endian(bits: &str) -> Vec<u8> {
    let mut bytes = hex::decode(bits).unwrap();
    bytes.reverse();
    bytes
}

fn tensors(cases: &BTreeMap<String, TensorCase>, base: Option<&Tensors>) -> Tensors {
    let tensor = |(name, case): (&String, &TensorCase)| (name.clone(), case.tensor(base.map(|base| &base[name])));
    cases.iter().map(tensor).collect()
}

/// A base folder, and what becomes of a payload on it.
struct Bench {
    base: Tensors,
    folder: tempfile::TempDir,
    weights: WeightsFiles,
    format: DeltaFormat,
}

impl Bench {
    fn new(base: Tensors, format: &str) -> Self {
        let folder = write_folder(&base);
        let weights = WeightsFiles::open(folder.path()).unwrap();
        Self { base, folder, weights, format: format.parse().unwrap() }
    }

    fn decode(&self, payload: &[u8]) -> Result<Delta, DeltaError> {
        Delta::decode(payload, self.format, &Shapes::from(&self.weights), self.folder.path())
    }

    /// The mirror with what its file holds; the change set is checked on the way.
    fn build(&self, delta: Delta) -> (Mirror, Tensors) {
        let target = tempfile::tempdir().unwrap();
        let (base_window, base_hash) = (CheckpointWindow(30), self.weights.hash().unwrap());
        let plan = MirrorPlan { base: &self.weights, base_window, base_hash, deltas: &[delta], target: target.path() };
        let mirror = build(&plan).unwrap();
        let weights = WeightsFiles::open(target.path()).unwrap();
        let new = read_tensors(&weights);
        let fingerprint = weights.fingerprint().unwrap();
        assert_eq!((fingerprint.weights_hash, &fingerprint.checksums), (mirror.weights_hash, &mirror.checksums));
        assert_changes(&mirror.changes, &self.base, &new);
        (mirror, new)
    }
}

/// The bytes inside the zstd frame, with what may follow it left out.
fn unpacked(payload: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    let mut decoder = zstd::stream::read::Decoder::new(payload).unwrap().single_frame();
    std::io::Read::read_to_end(&mut decoder, &mut plain).unwrap();
    plain
}

impl CodecCase {
    fn check(&self) {
        let (id, payload) = (&self.id, BASE64_STANDARD.decode(&self.payload_b64).unwrap());
        assert_eq!(hex::encode(Sha256::digest(&payload)), self.payload_sha256, "{id}");
        assert_eq!(self.verdict_reference, "accept", "{id}");
        let base = tensors(&self.base, None);
        let expected = tensors(&self.expected, Some(&base));
        let bench = Bench::new(base, &self.format);
        assert_eq!(bench.weights.hash().unwrap(), self.base_weights_hash, "{id}");
        assert_eq!(self.header, read_header(&payload), "{id}");

        let decoded = bench.decode(&payload);
        match (self.verdict_rust.as_str(), decoded) {
            ("accept" | "either", Ok(delta)) => self.check_accepted(&bench, delta, &expected),
            ("either", Err(error)) => panic!("{id}: {error}: what may be accepted is"),
            (verdict, Err(error)) => {
                let class = error.class().unwrap_or_else(|| panic!("{id}: {error}"));
                assert_eq!(verdict, format!("reject:{class}"), "{id}, note {:?}", self.note);
            }
            (verdict, Ok(_)) => panic!("{id}: decoded, expected {verdict}, note {:?}", self.note),
        }
        if self.reference_result_equals_current.is_some() {
            self.check_encoder(&bench, &payload, &expected);
        }
    }

    fn check_accepted(&self, bench: &Bench, delta: Delta, expected: &Tensors) {
        let id = &self.id;
        let (mirror, found) = bench.build(delta);
        assert_eq!(&found, expected, "{id}");
        assert_eq!(mirror.weights_hash, self.expected_weights_hash, "{id}");
        for (name, case) in &self.expected {
            let differences = bench.base[name].differences(&found[name]);
            let changed: Vec<_> = case.changed.iter().flatten().collect();
            let changed: Vec<_> = changed.iter().map(|(place, bits)| (*place, little_endian(bits))).collect();
            assert_eq!(differences, changed, "{id}");
        }
    }

    /// What the reference's encoder made of the same two checkpoints; only zstd's own bytes may differ.
    fn check_encoder(&self, bench: &Bench, payload: &[u8], expected: &Tensors) {
        let mut encoder = DeltaEncoder::new(bench.format);
        let shapes = Shapes::from(&bench.weights);
        for (name, old) in &bench.base {
            encoder.tensor(name, shapes.get(name).unwrap(), &old.bytes, &expected[name].bytes).unwrap();
        }
        let encoded = encoder.finish().unwrap();
        assert_eq!(unpacked(&encoded.payload), unpacked(payload), "{}", self.id);
        let listed = self.header.as_ref().unwrap()["tensors"].as_array().unwrap();
        let listed: u64 = listed.iter().map(|entry| entry["num_nonzero"].as_u64().unwrap()).sum();
        assert_eq!(encoded.listed, listed, "{}", self.id);
    }
}

fn read_header(payload: &[u8]) -> Option<Value> {
    if payload.is_empty() {
        return None;
    }
    let plain = unpacked(payload);
    let length = u32::from_le_bytes(plain[..4].try_into().unwrap());
    Some(serde_json::from_slice(&plain[4..4 + usize::try_from(length).unwrap()]).unwrap())
}

#[test]
fn codec() {
    let file = "checkpoints/codec.json";
    let vectors: Codec = grail_golden::json(file);
    vectors.cases.iter().for_each(CodecCase::check);
    grail_golden::ran(file, vectors.cases.len(), 83);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Invalid {
    classes: Vec<String>,
    cases: Vec<InvalidCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InvalidCase {
    id: String,
    format: String,
    payload_b64: String,
    base: BTreeMap<String, TensorCase>,
    /// Classes separated by a bar, of which any will do.
    expected_error: String,
    reference: InvalidReference,
    note: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InvalidReference {
    stage: String,
    error: Option<String>,
    result_weights_hash: Option<WeightsHash>,
}

impl InvalidCase {
    fn check(&self, classes: &[String]) {
        let id = &self.id;
        // What the reference let pass has a result; only of the payloads that must decode is it ours as well.
        let passed = self.reference.stage == "none";
        assert!(passed || ["decode", "apply"].contains(&self.reference.stage.as_str()), "{id}");
        assert_eq!((self.reference.error.is_none(), self.reference.result_weights_hash.is_some()), (passed, passed));

        let bench = Bench::new(tensors(&self.base, None), &self.format);
        let expected: Vec<&str> = self.expected_error.split('|').collect();
        match bench.decode(&BASE64_STANDARD.decode(&self.payload_b64).unwrap()) {
            Ok(delta) => {
                assert_eq!(expected, ["none"], "{id}, note {:?}", self.note);
                assert_eq!(Some(bench.build(delta).0.weights_hash), self.reference.result_weights_hash, "{id}");
            }
            Err(error) => {
                let class = error.class().unwrap_or_else(|| panic!("{id}: {error}")).as_str();
                assert!(expected.contains(&class), "{id}: {class}: {error}; note {:?}", self.note);
                assert!(classes.iter().any(|known| known == class), "{id}");
            }
        }
    }
}

#[test]
fn codec_invalid() {
    let file = "checkpoints/codec_invalid.json";
    let vectors: Invalid = grail_golden::json(file);
    assert_eq!(vectors.classes.len(), 11);
    vectors.cases.iter().for_each(|case| case.check(&vectors.classes));
    grail_golden::ran(file, vectors.cases.len(), 88);
}
