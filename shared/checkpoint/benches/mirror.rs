//! Making a checkpoint's folder from its base and a delta, against reading the base once, which is the floor.
//!
//! `cargo bench -p grail-checkpoint --bench mirror`. The checkpoint has 1 GB of random BF16 weights, or
//! `GRAIL_BENCH_CHECKPOINT_BYTES`; three times that is needed on the disk of the temporary folder, and the page cache should hold it.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;
use std::sync::OnceLock;

use divan::Bencher;
use divan::counter::BytesCount;
use grail_checkpoint::delta::DeltaEncoder;
use grail_checkpoint::mirror::build;
use grail_checkpoint::{Delta, DeltaFormat, MirrorPlan, Shapes, WeightsFiles};
use grail_protocol::ids::{CheckpointWindow, WeightsHash};

const BYTES: u64 = 1 << 30;
/// Sizes of one matrix; the checkpoint has as many as fill it.
const SHAPE: [u64; 2] = [4096, 4096];
const MATRIX_BYTES: u64 = SHAPE[0] * SHAPE[1] * 2;

fn main() {
    divan::main();
}

/// Changed elements in a thousand; the argument of the benchmarks.
const CHANGED: [u64; 2] = [10, 50];

struct Checkpoint {
    folder: tempfile::TempDir,
    /// Packed payloads by the number of changed elements in a thousand.
    payloads: BTreeMap<u64, Vec<u8>>,
    bytes: u64,
}

/// Numbers that do not compress and are the same in every run.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Weights as a trained model has them: both signs, exponents around 2^-6, random mantissas.
    fn weights(&mut self) -> Vec<u8> {
        let mut weights = Vec::new();
        for _ in 0..MATRIX_BYTES / 8 {
            let random = self.next() & 0x81FF_81FF_81FF_81FF;
            weights.extend_from_slice(&(random | 0x3C00_3C00_3C00_3C00).to_le_bytes());
        }
        weights
    }
}

fn matrices() -> u64 {
    let bytes = std::env::var("GRAIL_BENCH_CHECKPOINT_BYTES").ok();
    let bytes = bytes.map_or(BYTES, |text| text.parse().expect("GRAIL_BENCH_CHECKPOINT_BYTES is a number of bytes"));
    bytes.div_ceil(MATRIX_BYTES)
}

fn write_base(path: &Path) -> std::io::Result<()> {
    let count = matrices();
    let entries = (0..count).map(|matrix| {
        let (start, end) = (matrix * MATRIX_BYTES, (matrix + 1) * MATRIX_BYTES);
        format!(r#""layer.{matrix:04}.weight":{{"dtype":"BF16","shape":{SHAPE:?},"data_offsets":[{start},{end}]}}"#)
    });
    let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut random = SplitMix(1);
    for _ in 0..count {
        file.write_all(&random.weights())?;
    }
    file.into_inner()?.sync_all()
}

/// Each element changes by one unit in the last place with the given probability.
fn payload(base: &WeightsFiles, in_a_thousand: u64) -> Vec<u8> {
    let shapes = Shapes::from(base);
    let mut encoder = DeltaEncoder::new(DeltaFormat::V31);
    let mut random = SplitMix(in_a_thousand);
    for name in base.tensors().keys() {
        let old = base.read(name).unwrap().unwrap();
        let mut new = old.clone();
        for element in new.as_chunks_mut::<2>().0 {
            element[0] ^= u8::from(random.next() % 1000 < in_a_thousand);
        }
        encoder.tensor(name, shapes.get(name).unwrap(), &old, &new).unwrap();
    }
    encoder.finish().unwrap().payload
}

fn checkpoint() -> &'static Checkpoint {
    static CHECKPOINT: OnceLock<Checkpoint> = OnceLock::new();
    CHECKPOINT.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        write_base(&folder.path().join("model.safetensors")).unwrap();
        let base = WeightsFiles::open(folder.path()).unwrap();
        let payloads = CHANGED.into_iter().map(|changed| (changed, payload(&base, changed))).collect();
        Checkpoint { payloads, bytes: base.bytes(), folder }
    })
}

#[divan::bench(sample_count = 5)]
fn read_once(bencher: Bencher) {
    let checkpoint = checkpoint();
    let path = checkpoint.folder.path().join("model.safetensors");
    let mut buffer = vec![0; 4 << 20];
    bencher.counter(BytesCount::new(checkpoint.bytes)).bench_local(|| {
        let mut file = File::open(&path).unwrap();
        while file.read(&mut buffer).unwrap() > 0 {}
    });
}

#[divan::bench(sample_count = 5)]
fn fingerprint_of_a_full_checkpoint(bencher: Bencher) {
    let checkpoint = checkpoint();
    let base = WeightsFiles::open(checkpoint.folder.path()).unwrap();
    bencher.counter(BytesCount::new(checkpoint.bytes)).bench_local(|| base.fingerprint().unwrap());
}

#[divan::bench(args = CHANGED, sample_count = 5)]
fn decode(bencher: Bencher, changed: u64) {
    let checkpoint = checkpoint();
    let base = WeightsFiles::open(checkpoint.folder.path()).unwrap();
    bencher.counter(BytesCount::new(checkpoint.bytes)).bench_local(|| decoded(checkpoint, &base, changed));
}

#[divan::bench(args = CHANGED, sample_count = 5)]
fn build_mirror(bencher: Bencher, changed: u64) {
    let checkpoint = checkpoint();
    let base = WeightsFiles::open(checkpoint.folder.path()).unwrap();
    let deltas = [decoded(checkpoint, &base, changed)];
    let base = &base;
    bencher
        .counter(BytesCount::new(checkpoint.bytes))
        .with_inputs(|| tempfile::tempdir_in(checkpoint.folder.path()).unwrap())
        .bench_local_values(|target| {
            let (base_window, base_hash) = (CheckpointWindow(0), WeightsHash(0));
            let plan = MirrorPlan { base, base_window, base_hash, deltas: &deltas, target: target.path() };
            let mirror = build(&plan).unwrap();
            (mirror, target)
        });
}

fn decoded(checkpoint: &Checkpoint, base: &WeightsFiles, changed: u64) -> Delta {
    let payload = checkpoint.payloads[&changed].as_slice();
    Delta::decode(payload, DeltaFormat::V31, &Shapes::from(base), checkpoint.folder.path()).unwrap()
}
