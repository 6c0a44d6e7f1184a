//! Damaged documents and payloads, for a limited time: none may panic, or take more memory than is declared for it.
//!
//! Each of the six tests runs for `GRAIL_FUZZ_SECONDS` (10 if unset, 60 s in all). A failure prints the seed, with which
//! `GRAIL_FUZZ_SEED` makes the same inputs again, and the input. The targets for cargo-fuzz in `fuzz/` call the same entries.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

#[path = "../fuzz/src/lib.rs"]
mod entries;
#[path = "fuzz/memory.rs"]
mod memory;
#[path = "fuzz/mutation.rs"]
mod mutation;

use std::hash::BuildHasher;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use grail_checkpoint::DeltaFormat;
use grail_checkpoint::delta::DeltaEncoder;
use memory::Tracking;
use mutation::Mutator;
use serde_json::Value;

#[global_allocator]
static ALLOCATOR: Tracking = Tracking;

/// Inputs between two looks at the clock.
const ROUND: usize = 64;

fn seconds() -> Duration {
    let text = std::env::var("GRAIL_FUZZ_SECONDS").unwrap_or_else(|_| "10".to_owned());
    Duration::from_secs(text.parse().unwrap_or_else(|_| panic!("GRAIL_FUZZ_SECONDS is {text:?}: a number is expected")))
}

fn seed() -> u64 {
    match std::env::var("GRAIL_FUZZ_SEED") {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("GRAIL_FUZZ_SEED is {text:?}: a number is expected")),
        Err(_) => std::hash::RandomState::new().hash_one(()),
    }
}

/// Says which input a panic came from.
struct Running<'a> {
    seed: u64,
    input: &'a [u8],
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("GRAIL_FUZZ_SEED={} input (hex): {}", self.seed, hex::encode(self.input));
        }
    }
}

/// Runs the corpus as it is, then what a mutator makes of it until the time is over.
fn fuzz(
    corpus: Vec<Vec<u8>>,
    entry: impl Fn(&[u8]),
    limit: impl Fn(&[u8]) -> usize,
    mutate: impl Fn(&mut Mutator) -> Vec<u8>,
) {
    let (seed, end) = (seed(), Instant::now() + seconds());
    println!("GRAIL_FUZZ_SEED={seed}, {} inputs to begin with", corpus.len());
    let run = |input: &[u8]| {
        let _running = Running { seed, input };
        let taken = memory::peak(|| entry(input));
        assert!(taken <= limit(input), "{taken} bytes of memory for {} bytes of input", input.len());
    };
    corpus.iter().for_each(|input| run(input));
    let mut mutator = Mutator::new(seed, corpus);
    let mut inputs = 0_u64;
    while Instant::now() < end {
        for _ in 0..ROUND {
            run(&mutate(&mut mutator));
            inputs += 1;
        }
    }
    println!("{inputs} damaged inputs");
}

fn documents(entry: fn(&[u8]), corpus: Vec<Vec<u8>>) {
    fuzz(corpus, entry, entries::document_memory, Mutator::document);
}

/// The documents of the golden cases.
fn golden_documents() -> Vec<Value> {
    let cases: Value = grail_golden::json("checkpoints/metadata_cases.json");
    let texts = cases["cases"].as_array().unwrap().iter().map(|case| case["text"].as_str().unwrap());
    texts.filter_map(|text| serde_json::from_str(text).ok()).collect()
}

/// Objects of the golden store that have one of these names.
fn bucket_files(names: &[&str]) -> Vec<Vec<u8>> {
    let root = grail_golden::path("checkpoints/bucket/grail/checkpoints");
    let mut folders: Vec<_> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    let paths = folders.iter().flat_map(|folder| names.iter().map(|name| folder.join(name)));
    paths.filter_map(|path| std::fs::read(path).ok()).collect()
}

#[test]
fn metadata() {
    let corpus: Vec<Vec<u8>> = golden_documents().iter().map(|document| document.to_string().into_bytes()).collect();
    assert!(corpus.len() > 50);
    documents(entries::metadata, corpus);
}

#[test]
fn manifest() {
    let published = bucket_files(&["FULL/metadata.json", "DELTA/metadata.json"]);
    let published = published.iter().map(|text| serde_json::from_slice::<Value>(text).unwrap());
    let manifests = golden_documents().into_iter().chain(published).map(|document| document["file_manifest"].clone());
    let mut corpus: Vec<Vec<u8>> = manifests.map(|manifest| manifest.to_string().into_bytes()).collect();
    corpus.sort();
    corpus.dedup();
    assert!(corpus.len() > 20);
    documents(entries::manifest, corpus);
}

#[test]
fn delta_metadata() {
    let corpus = bucket_files(&["DELTA/delta_metadata.json"]);
    assert!(corpus.len() > 10);
    documents(entries::delta_metadata, corpus);
}

#[test]
fn payload_v2() {
    payloads(DeltaFormat::V2);
}

#[test]
fn payload_v3() {
    payloads(DeltaFormat::V3);
}

#[test]
fn payload_v31() {
    payloads(DeltaFormat::V31);
}

fn payloads(format: DeltaFormat) {
    let mut corpus: Vec<Vec<u8>> = Vec::new();
    for file in ["checkpoints/codec.json", "checkpoints/codec_invalid.json"] {
        let cases: Value = grail_golden::json(file);
        let cases = cases["cases"].as_array().unwrap().iter().filter(|case| case["format"] == format.as_str());
        corpus.extend(cases.map(|case| BASE64_STANDARD.decode(case["payload_b64"].as_str().unwrap()).unwrap()));
    }
    assert!(corpus.len() > 20);
    corpus.extend([encoded(format, 1), encoded(format, 7), encoded(format, 1000)]);
    let mutate = |mutator: &mut Mutator| mutator.payload();
    fuzz(corpus, |packed| entries::payload(format, packed), |_| entries::payload_memory(), mutate);
}

/// A valid payload that changes every `step`-th element of the base.
fn encoded(format: DeltaFormat, step: usize) -> Vec<u8> {
    let base = entries::base();
    let mut encoder = DeltaEncoder::new(format);
    for name in ["w", "a.weight", "x", "long", "tall", "f", "empty"] {
        let shape = base.get(name).unwrap();
        let width = if shape.dtype == "F32" { 4 } else { 2 };
        let old = vec![1; usize::try_from(shape.elements()).unwrap() * width];
        let mut new = old.clone();
        new.chunks_mut(width).step_by(step).for_each(|element| element.fill(2));
        encoder.tensor(name, shape, &old, &new).unwrap();
    }
    encoder.finish().unwrap().payload
}
