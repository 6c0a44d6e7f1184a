//! Sketches of one group: 16 sequences of 1,000 positions with 3,584 activations each.
//!
//! `cargo bench -p grail-protocol --bench sketch`

use divan::Bencher;
use divan::counter::ItemsCount;
use grail_protocol::python_random::PythonRandom;
use grail_protocol::sketch::{SketchCoeffs, sketch_rows_bf16, sketch_rows_f32};
use half::bf16;

const SEQUENCES: usize = 16;
const POSITIONS: usize = 1_000;
const HIDDEN: usize = 3_584;

fn main() {
    divan::main();
}

/// Normally distributed rows; a row repeats after the 997th, which no cache holds either.
fn hidden_states<T: Clone>(convert: impl Fn(f64) -> T) -> Vec<T> {
    let mut random = PythonRandom::from_u64(1);
    let distinct: Vec<T> = (0..997 * HIDDEN).map(|_| convert(random.gauss(0.0, 4.0))).collect();
    distinct.iter().cycle().take(SEQUENCES * POSITIONS * HIDDEN).cloned().collect()
}

#[expect(clippy::cast_possible_truncation, reason = "hidden states are binary32")]
#[divan::bench(sample_count = 20)]
fn group_f32(bencher: Bencher) {
    let hidden = hidden_states(|value| value as f32);
    let coefficients = SketchCoeffs::from_randomness(&[7; 32]);
    bencher
        .counter(ItemsCount::new(SEQUENCES * POSITIONS))
        .bench(|| sketch_rows_f32(divan::black_box(&hidden), HIDDEN, &coefficients));
}

#[divan::bench(sample_count = 20)]
fn group_bf16(bencher: Bencher) {
    let hidden = hidden_states(bf16::from_f64);
    let coefficients = SketchCoeffs::from_randomness(&[7; 32]);
    bencher
        .counter(ItemsCount::new(SEQUENCES * POSITIONS))
        .bench(|| sketch_rows_bf16(divan::black_box(&hidden), HIDDEN, &coefficients));
}
