//! Coefficients, buckets and sketches.

use std::collections::BTreeMap;

use grail_protocol::hash::sha256;
use grail_protocol::randomness::clean_hex;
use grail_protocol::sketch::{
    SketchCoeffs, bucket, coefficient_of, selected_indices_bf16, selected_indices_f32, sketch_bf16, sketch_f32,
    sketch_rows_bf16, sketch_rows_f32,
};
use half::bf16;
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CoefficientFile {
    note: String,
    cases: Vec<CoefficientCase>,
    int16_to_coeff: BTreeMap<String, i32>,
    int16_table_i8_sha256: String,
    int16_table_order: String,
    hidden_size_independent: BTreeMap<String, [i32; 16]>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CoefficientCase {
    randomness: String,
    r_vec: [i32; 16],
}

fn coefficients(randomness: &str) -> SketchCoeffs {
    SketchCoeffs::from_randomness(&clean_hex(randomness).unwrap())
}

fn digest_of_table(table: impl Iterator<Item = i32>) -> String {
    let bytes: Vec<u8> = table.map(|entry| i8::try_from(entry).unwrap().cast_unsigned()).collect();
    assert_eq!(bytes.len(), 65_536);
    hex::encode(sha256(&bytes))
}

#[test]
fn coefficients_of_randomness() {
    const FILE: &str = "protocol/r_vec.json";
    let file: CoefficientFile = grail_golden::json(FILE);
    assert!(!file.note.is_empty());
    let mut ran = 0;
    for case in &file.cases {
        assert_eq!(coefficients(&case.randomness).as_array(), &case.r_vec, "{:?}", case.randomness);
        ran += 1;
    }
    for (word, expected) in &file.int16_to_coeff {
        assert_eq!(coefficient_of(word.parse().unwrap()), *expected, "{word}");
        ran += 1;
    }
    assert_eq!(file.int16_table_order, "int16 from -32768 to 32767, one int8 each");
    assert_eq!(digest_of_table((i16::MIN..=i16::MAX).map(coefficient_of)), file.int16_table_i8_sha256);
    ran += 1;
    for expected in file.hidden_size_independent.values() {
        assert_eq!(coefficients(&file.cases[0].randomness).as_array(), expected);
        ran += 1;
    }
    let in_file = file.cases.len() + file.int16_to_coeff.len() + 1 + file.hidden_size_independent.len();
    grail_golden::ran(FILE, ran, in_file);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BucketFile {
    cases: Vec<BucketCase>,
    thresholds: Vec<Threshold>,
    all_bf16_table_i8_sha256: String,
    all_bf16_order: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BucketCase {
    f32_bits: String,
    value: String,
    bucket: i32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Threshold {
    bucket: i32,
    exact_real: String,
    first_f32_bits: String,
    first_f32: String,
    first_bf16_bits: String,
    first_bf16: String,
}

fn f32_of_bits(bits: &str) -> f32 {
    f32::from_bits(u32::from_str_radix(bits, 16).unwrap())
}

/// True if `text`, a binary64 as Python prints it, is exactly `value`.
fn is_written_as(value: f32, text: &str) -> bool {
    let written: f64 = text.parse().unwrap();
    f64::from(value).to_bits() == written.to_bits() || (value.is_nan() && written.is_nan())
}

impl Threshold {
    fn check(&self) {
        assert_eq!(self.exact_real, format!("2^(1.25*{})-1", self.bucket));
        let exact = (1.25 * f64::from(self.bucket)).exp2() - 1.0;
        let first = f32_of_bits(&self.first_f32_bits);
        assert!(is_written_as(first, &self.first_f32));
        assert!(f64::from(first) >= exact && f64::from(first.next_down()) < exact);
        let first_coarse = bf16::from_bits(u16::from_str_radix(&self.first_bf16_bits, 16).unwrap());
        assert!(is_written_as(first_coarse.to_f32(), &self.first_bf16));
        let coarse_below = bf16::from_bits(first_coarse.to_bits() - 1);
        for (value, expected) in [
            (first, self.bucket),
            (first.next_down(), self.bucket - 1),
            (first_coarse.to_f32(), self.bucket),
            (coarse_below.to_f32(), self.bucket - 1),
        ] {
            assert_eq!(bucket(value), expected, "{value}");
            assert_eq!(bucket(-value), -expected, "-{value}");
        }
    }
}

#[test]
fn buckets() {
    const FILE: &str = "protocol/buckets.json";
    let file: BucketFile = grail_golden::json(FILE);
    let mut ran = 0;
    for case in &file.cases {
        let value = f32_of_bits(&case.f32_bits);
        assert!(is_written_as(value, &case.value), "{} {}", case.f32_bits, case.value);
        assert_eq!(bucket(value), case.bucket, "{}", case.value);
        ran += 1;
    }
    for threshold in &file.thresholds {
        threshold.check();
        ran += 1;
    }
    assert_eq!(file.all_bf16_order, "bf16 bit patterns 0x0000..0xffff, one int8 each");
    let table = (0..=u16::MAX).map(|bits| bucket(bf16::from_bits(bits).to_f32()));
    assert_eq!(digest_of_table(table), file.all_bf16_table_i8_sha256);
    ran += 1;
    grail_golden::ran(FILE, ran, file.cases.len() + file.thresholds.len() + 1);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SketchFile {
    note: String,
    cases: Vec<SketchCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SketchCase {
    name: String,
    randomness: String,
    dtype: String,
    shape: [usize; 2],
    r_vec: [i32; 16],
    sketch_scalar: Vec<u32>,
    sketch_batch: Vec<u32>,
    sorted_indices: Vec<[usize; 16]>,
    buckets: Vec<[i32; 16]>,
    tie_at_cut: Option<Vec<bool>>,
    lowest_index_sketch: Option<Vec<Option<u32>>>,
    admissible_sketches: Option<Vec<Option<Vec<u32>>>>,
    hidden_encoding: String,
    hidden: String,
}

enum Hidden {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

/// Decodes standard base64 without a dependency that nothing else needs.
fn base64(text: &str) -> Vec<u8> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => panic!("{byte} is no base64 digit"),
    };
    let mut bytes = Vec::new();
    for quad in text.trim_end_matches('=').as_bytes().chunks(4) {
        let bits = quad.iter().enumerate().fold(0_u32, |bits, (place, byte)| {
            bits | u32::from(digit(*byte)) << (18 - 6 * u32::try_from(place).unwrap())
        });
        bytes.extend_from_slice(&bits.to_be_bytes()[1..quad.len()]);
    }
    bytes
}

impl SketchCase {
    fn hidden(&self) -> Hidden {
        let bytes = base64(&self.hidden);
        match (self.dtype.as_str(), self.hidden_encoding.as_str()) {
            ("float32", "base64 of little-endian f32, row major") => {
                Hidden::F32(bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect())
            }
            ("bfloat16", "base64 of little-endian u16 bf16 bits, row major") => {
                Hidden::Bf16(bytes.as_chunks().0.iter().map(|word| bf16::from_le_bytes(*word)).collect())
            }
            other => panic!("unknown encoding {other:?}"),
        }
    }

    fn check(&self) {
        let [rows, width] = self.shape;
        let coefficients = coefficients(&self.randomness);
        assert_eq!(coefficients.as_array(), &self.r_vec, "{}", self.name);
        let (single, batch, indices, values): (Vec<u32>, Vec<u32>, Vec<[usize; 16]>, Vec<f32>) = match self.hidden() {
            Hidden::F32(hidden) => (
                hidden.chunks(width).map(|row| sketch_f32(row, &coefficients)).collect(),
                sketch_rows_f32(&hidden, width, &coefficients),
                hidden.chunks(width).map(selected_indices_f32).collect(),
                hidden,
            ),
            Hidden::Bf16(hidden) => (
                hidden.chunks(width).map(|row| sketch_bf16(row, &coefficients)).collect(),
                sketch_rows_bf16(&hidden, width, &coefficients),
                hidden.chunks(width).map(selected_indices_bf16).collect(),
                hidden.iter().map(|value| value.to_f32()).collect(),
            ),
        };
        assert_eq!(single.len(), rows);
        assert_eq!(single, batch, "{}", self.name);
        for (row, (sketch, selected)) in single.into_iter().zip(indices).enumerate() {
            let name = format!("{} row {row}", self.name);
            let theirs = [self.sketch_scalar[row], self.sketch_batch[row]];
            let tie_at_cut = self.tie_at_cut.as_ref().is_some_and(|ties| ties[row]);
            let expected = self.lowest_index_sketch.as_ref().and_then(|sketches| sketches[row]);
            let admissible = self.admissible_sketches.as_ref().and_then(|sketches| sketches[row].as_ref());
            if tie_at_cut {
                assert_eq!(Some(sketch), expected, "{name}");
                assert!(admissible.is_none_or(|all| theirs.iter().chain([&sketch]).all(|one| all.contains(one))));
                continue;
            }
            assert!(expected.is_none() && admissible.is_none(), "{name}");
            assert_eq!([sketch; 2], theirs, "{name}");
            assert_eq!(selected, self.sorted_indices[row], "{name}");
            assert_eq!(selected.map(|index| bucket(values[row * width + index])), self.buckets[row], "{name}");
        }
    }
}

#[test]
fn sketches() {
    const FILE: &str = "protocol/sketches.json";
    let file: SketchFile = grail_golden::json(FILE);
    assert!(!file.note.is_empty());
    file.cases.iter().for_each(SketchCase::check);
    grail_golden::ran(FILE, file.cases.len(), file.cases.len());
}
