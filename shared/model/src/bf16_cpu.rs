//! bf16 on a CPU, with the arithmetic of libtorch on processors of the AVX-512 family.
//!
//! Golden data comes from such processors. Others run other loops, whose sums round elsewhere: a single different bit early in a
//! sequence moves every later position, up to a tenth of the sketches. So the order of every sum is fixed here: products are
//! exact in f32, and each sum fuses them one by one; matrices take the second of every pair of columns before the first, as the
//! emulated dot product of two bf16 does, attention takes columns in order. The result is the same on every processor, bit for
//! bit that of the golden data.

use tch::{Device, Kind, TchError, Tensor};

use crate::attention::HeadShape;
use crate::ffi;

/// Rows that one pass of the product keeps in registers.
pub(crate) const LANES: usize = 32;
/// Keys that the attention kernel takes at once; a later block rescales what earlier ones gave.
const KEY_BLOCK: usize = 512;
/// Width of the kernel's vectors: the exponentials of the last keys that fill none are exact.
const VECTOR: usize = 16;
/// Queries whose scores are held at once.
const QUERY_BLOCK: usize = 256;

/// Whether tensors of this kind on this device take the paths of this module.
pub(crate) fn applies(x: &Tensor) -> bool {
    x.kind() == Kind::BFloat16 && x.device() == Device::Cpu
}

/// `x · weightᵀ + bias`, rounded once.
///
/// * `x`: `[rows, columns]`, `weight`: `[outputs, columns]`, `bias`: `[outputs]`, all bf16.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, TchError> {
    let (rows, columns) = x.size2()?;
    let (outputs, _) = weight.size2()?;
    let x = Matrix { values: host(x)?, columns: extent(columns) };
    let weight = Matrix { values: host(weight)?, columns: extent(columns) };
    let mut product = product(&x, &weight, Order::SecondOfPairFirst);
    if let Some(bias) = bias {
        let bias = host(bias)?;
        for row in product.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(&bias).for_each(|(value, bias)| *value += bias);
        }
    }
    Tensor::f_from_slice(&product)?.f_view([rows, outputs])?.f_to_kind(Kind::BFloat16)
}

/// Whether more tokens of the sequence follow the keys, in another call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ends {
    Here,
    Later,
}

/// Causal attention; the last query sees all keys, each earlier one a key less.
///
/// The kernel's vectors run over the keys of the whole sequence, so its exact exponentials are those of the sequence's last
/// keys. A shared prompt has none of them unless its completions are shorter than a vector.
///
/// * `query`: `[rows, heads, head_dim]`; `key`, `value`: `[keys, kv_heads, head_dim]`, all bf16.
///
/// Returns `[rows, heads · head_dim]`, bf16.
pub(crate) fn attend([query, key, value]: [&Tensor; 3], shape: HeadShape, ends: Ends) -> Result<Tensor, TchError> {
    let (rows, heads) = (extent(query.size()[0]), extent(shape.heads));
    let (kv_heads, head_dim) = (extent(shape.kv_heads), extent(shape.head_dim));
    let by_head = |x: &Tensor| host(&x.f_transpose(0, 1)?);
    // Values with the keys as columns, `[kv_heads, head_dim, keys]`.
    let (queries, keys, values) = (by_head(query)?, by_head(key)?, host(&value.f_permute([1, 2, 0])?)?);
    let mut attended = Vec::with_capacity(queries.len());
    for (head, queries) in queries.chunks_exact(rows * head_dim).enumerate() {
        let kv_size = keys.len() / kv_heads;
        let total_keys = kv_size / head_dim;
        let kv_head = head / (heads / kv_heads) * kv_size;
        let head = Head {
            keys: &keys[kv_head..kv_head + kv_size],
            values: &values[kv_head..kv_head + kv_size],
            head_dim,
            exact_from: if ends == Ends::Here { total_keys - total_keys % VECTOR } else { total_keys },
            #[expect(clippy::cast_possible_truncation, reason = "the kernel's factor is f32 too")]
            scale: shape.scale() as f32,
        };
        let first = total_keys - rows;
        for (block, queries) in queries.chunks(QUERY_BLOCK * head_dim).enumerate() {
            head.attend(queries, first + block * QUERY_BLOCK, &mut attended);
        }
    }
    Tensor::f_from_slice(&attended)?
        .f_view([shape.heads, rows as i64, shape.head_dim])?
        .f_transpose(0, 1)?
        .f_reshape([rows as i64, shape.heads * shape.head_dim])?
        .f_to_kind(Kind::BFloat16)
}

/// Keys `[keys, head_dim]` and values `[head_dim, keys]` of one head.
struct Head<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    head_dim: usize,
    /// Keys from here on fill no vector of the kernel.
    exact_from: usize,
    scale: f32,
}

impl Head<'_> {
    /// Appends the outputs of some queries, of which the first stands at position `first`.
    fn attend(&self, queries: &[f32], first: usize, attended: &mut Vec<f32>) {
        let count = queries.len() / self.head_dim;
        let visible = first + count;
        let total_keys = self.keys.len() / self.head_dim;
        let queries = Matrix { values: queries.to_vec(), columns: self.head_dim };
        let mut rows = vec![OnlineSoftmax::new(self.head_dim); count];
        for block in (0..visible).step_by(KEY_BLOCK) {
            let width = KEY_BLOCK.min(visible - block);
            let keys = &self.keys[block * self.head_dim..(block + width) * self.head_dim];
            let keys = Matrix { values: keys.to_vec(), columns: self.head_dim };
            let scores = product(&queries, &keys, Order::Plain);
            let mut weights = Vec::with_capacity(scores.len());
            for (query, (row, scores)) in rows.iter_mut().zip(scores.chunks_exact(width)).enumerate() {
                let seen = (first + query + 1).saturating_sub(block).min(width);
                let exact = self.exact_from.saturating_sub(block).min(width);
                weights.extend(row.weigh(scores.iter().take(seen).map(|score| score * self.scale), exact));
                weights.resize((query + 1) * width, 0.0);
            }
            let values = self.values.chunks_exact(total_keys).flat_map(|row| &row[block..block + width]);
            let values = Matrix { values: values.copied().collect(), columns: width };
            let sums = product(&Matrix { values: weights, columns: width }, &values, Order::Plain);
            for (row, sums) in rows.iter_mut().zip(sums.chunks_exact(self.head_dim)) {
                row.output.iter_mut().zip(sums).for_each(|(output, sum)| *output += sum);
            }
        }
        for row in rows {
            let factor = 1.0 / row.total;
            attended.extend(row.output.iter().map(|output| output * factor));
        }
    }
}

/// Softmax of one query over blocks of keys.
#[derive(Clone)]
struct OnlineSoftmax {
    largest: f32,
    total: f32,
    output: Vec<f32>,
}

impl OnlineSoftmax {
    fn new(head_dim: usize) -> Self {
        Self { largest: f32::NEG_INFINITY, total: 0.0, output: vec![0.0; head_dim] }
    }

    /// Takes in the scores of a block; those from `exact` on fill no vector. Returns their weights, rounded to bf16.
    fn weigh(&mut self, scores: impl Iterator<Item = f32>, exact: usize) -> Vec<f32> {
        let mut weights: Vec<f32> = scores.collect();
        if weights.is_empty() {
            return weights;
        }
        let largest = weights.iter().copied().fold(self.largest, f32::max);
        let vector_part = exact.min(weights.len());
        let (vectors, rest) = weights.split_at_mut(vector_part);
        vectors.iter_mut().for_each(|score| *score = fast_exp(*score - largest));
        rest.iter_mut().for_each(|score| *score = (*score - largest).exp());
        let rescale = (self.largest - largest).exp();
        self.total = vector_sum(vectors, rest) + rescale * self.total;
        self.output.iter_mut().for_each(|output| *output *= rescale);
        self.largest = largest;
        weights.iter_mut().for_each(|weight| *weight = half::bf16::from_f32(*weight).to_f32());
        weights
    }
}

/// The kernel's sum: lane by lane, the lanes by halves, then the rest one by one.
fn vector_sum(vectors: &[f32], rest: &[f32]) -> f32 {
    let mut lanes = [0.0; VECTOR];
    for vector in vectors.chunks(VECTOR) {
        lanes.iter_mut().zip(vector).for_each(|(lane, value)| *lane += value);
    }
    let mut width = VECTOR / 2;
    while width > 0 {
        let (low, high) = lanes.split_at_mut(width);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
        width /= 2;
    }
    rest.iter().fold(lanes[0], |sum, value| sum + value)
}

/// The kernel's exponential for results that are rounded to bf16: `2^x` through the exponent bits with a cubic correction
/// (Malossi and others, "Fast exponential computation on SIMD architectures").
fn fast_exp(x: f32) -> f32 {
    const CUBIC: [f32; 4] = [0.000_107_034_35, 0.303_542_6, -0.224_338_36, -0.079_204_24];
    const LEAST: u32 = 0xc2ae_ac50;
    const MANTISSA: f32 = 8_388_608.0;
    if x < f32::from_bits(LEAST) || x.is_nan() {
        return if x.is_nan() { x } else { 0.0 };
    }
    let exponent = x * std::f32::consts::LOG2_E;
    let fraction = exponent - exponent.floor();
    let correction = fraction.mul_add(CUBIC[3], CUBIC[2]);
    let correction = fraction.mul_add(correction, CUBIC[1]);
    let correction = fraction.mul_add(correction, CUBIC[0]);
    let bits = MANTISSA.mul_add(exponent - correction, MANTISSA * 127.0);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the bits of a number in 0..=1: at least 0 and below 2^31"
    )]
    f32::from_bits(bits as u32)
}

/// Rows of equal length.
struct Matrix {
    values: Vec<f32>,
    columns: usize,
}

/// Order in which the products of a sum are added.
#[derive(Clone, Copy)]
enum Order {
    Plain,
    SecondOfPairFirst,
}

impl Order {
    /// The column that comes `place`-th.
    fn column(self, place: usize, columns: usize) -> usize {
        match self {
            // Without a partner the last column stays where it is.
            Self::SecondOfPairFirst if place ^ 1 < columns => place ^ 1,
            Self::Plain | Self::SecondOfPairFirst => place,
        }
    }
}

/// `[left rows, right rows]`: sums of products over the columns.
fn product(left: &Matrix, right: &Matrix, order: Order) -> Vec<f32> {
    let columns = left.columns;
    let ordered: Vec<f32> = right
        .values
        .chunks_exact(columns)
        .flat_map(|row| (0..columns).map(|place| row[order.column(place, columns)]))
        .collect();
    let (rows, outputs) = (left.values.len() / columns, right.values.len() / columns);
    let mut result = vec![0.0; rows * outputs];
    let mut block = vec![0.0; columns * LANES];
    let mut sums = vec![0.0; outputs * LANES];
    for first in (0..rows).step_by(LANES) {
        let count = LANES.min(rows - first);
        let block_rows = left.values[first * columns..(first + count) * columns].chunks_exact(columns);
        for (lane, row) in block_rows.enumerate() {
            for place in 0..columns {
                block[place * LANES + lane] = row[order.column(place, columns)];
            }
        }
        ffi::fused_products(&block, &ordered, &mut sums);
        for (lane, row) in result[first * outputs..(first + count) * outputs].chunks_exact_mut(outputs).enumerate() {
            row.iter_mut().zip(sums.chunks_exact(LANES)).for_each(|(value, sums)| *value = sums[lane]);
        }
    }
    result
}

/// Sums of products, each fused with the sum before it, in the order of the columns.
///
/// * `block`: `[columns][LANES]`, `right`: `[outputs][columns]`, `sums`: `[outputs][LANES]`.
///
/// Inlined into a function that is compiled for fused multiply-add; see [`ffi::fused_products`].
#[inline(always)]
pub(crate) fn fused_products(block: &[f32], right: &[f32], sums: &mut [f32]) {
    let (block, _) = block.as_chunks::<LANES>();
    let (sums, _) = sums.as_chunks_mut::<LANES>();
    for (sums, factors) in sums.iter_mut().zip(right.chunks_exact(block.len())) {
        let mut total = [0.0; LANES];
        for (values, factor) in block.iter().zip(factors) {
            for (sum, value) in total.iter_mut().zip(values) {
                *sum = value.mul_add(*factor, *sum);
            }
        }
        *sums = total;
    }
}

fn host(x: &Tensor) -> Result<Vec<f32>, TchError> {
    crate::model::host_f32(x)
}

fn extent(size: i64) -> usize {
    usize::try_from(size).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_summed_in_the_given_order() {
        let value = |index: usize| half::bf16::from_f32((index as f32 * 0.37).sin() * 3.0).to_f32();
        // More rows than lanes, an odd number of columns.
        let (rows, outputs, columns) = (LANES + 5, 7, 41);
        let left = Matrix { values: (0..rows * columns).map(value).collect(), columns };
        let right = Matrix { values: (1000..1000 + outputs * columns).map(value).collect(), columns };
        let pairs: Vec<usize> = (0..20).flat_map(|pair| [2 * pair + 1, 2 * pair]).chain([40]).collect();
        for (order, sequence) in [(Order::Plain, (0..41).collect()), (Order::SecondOfPairFirst, pairs)] {
            let found = product(&left, &right, order);
            for row in 0..rows {
                for output in 0..outputs {
                    let sum = sequence.iter().fold(0.0_f32, |sum, column| {
                        left.values[row * columns + column].mul_add(right.values[output * columns + column], sum)
                    });
                    assert_eq!(found[row * outputs + output].to_bits(), sum.to_bits(), "row {row}, output {output}");
                }
            }
        }
    }

    #[test]
    fn the_fast_exponential_is_near_the_exact_one() {
        for step in 0..=870_u16 {
            let x = -f32::from(step) / 10.0;
            let (fast, exact) = (fast_exp(x), x.exp());
            assert!((fast / exact - 1.0).abs() < 3e-4, "{x}: {fast}, {exact}");
        }
        assert_eq!(fast_exp(-88.0), 0.0);
        assert_eq!(fast_exp(f32::NEG_INFINITY), 0.0);
        assert!(fast_exp(f32::NAN).is_nan());
    }

    #[test]
    fn blocks_of_keys_and_queries_give_what_exact_attention_gives() {
        let shape = HeadShape { heads: 4, kv_heads: 2, head_dim: 8 };
        let (rows, keys) = (QUERY_BLOCK as i64 + 40, 2 * KEY_BLOCK as i64 + 90);
        tch::manual_seed(3);
        let random = |size: [i64; 3]| Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
        let query = random([rows, 4, 8]);
        let (key, value) = (random([keys, 2, 8]), random([keys, 2, 8]));
        let found = attend([&query, &key, &value], shape, Ends::Here).unwrap().to_kind(Kind::Double);
        let wide = |x: &Tensor| x.to_kind(Kind::Double).transpose(0, 1);
        let repeated = |x: &Tensor| wide(x).repeat_interleave_self_int(2, 0, None);
        let hidden = crate::attention::causal_mask(rows, keys - rows, Device::Cpu).unwrap().logical_not();
        let scores = wide(&query).matmul(&repeated(&key).transpose(1, 2)) * shape.scale();
        let weights = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, Kind::Double);
        let expected = weights.matmul(&repeated(&value)).transpose(0, 1).reshape([rows, 32]);
        let farthest = (found - expected).abs().max().double_value(&[]);
        assert!(farthest < 0.02, "{farthest}");
    }
}
