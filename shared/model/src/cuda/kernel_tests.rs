//! What each kernel must compute, whoever runs it: a GPU, or a host for want of one.

use tch::{Device, Kind, Tensor};

use super::kernels::{Angles, TOP};
use crate::attention::HeadShape;
use crate::config::{Architecture, ModelConfig};
use crate::layers::RmsNorm;
use crate::rope::Rope;
use crate::sketch::SelectedBuckets;

pub(super) const EPSILON: f64 = 1e-6;

/// Something that runs the kernels of one model shape; arguments are those of [`super::kernels::Kernels`].
pub(super) trait Subject {
    /// Where its tensors lie.
    fn device(&self) -> Device;
    /// How many rows it is given where `many` would be thorough; more than four.
    fn rows(&self, many: i64) -> i64;
    /// Whether the composition adds squares in the order that the kernels take from it: libtorch's on a GPU.
    fn is_order_the_same(&self) -> bool;
    fn residual_norm(&self, x: &Tensor, addend: Option<&Tensor>, weight: &Tensor, out: &Tensor);
    fn rotate_queries(&self, qkv: &Tensor, angles: Angles<'_>, weight: Option<&Tensor>);
    fn gather_keys(&self, qkv: &Tensor, sources: &Tensor, angles: Angles<'_>, weight: Option<&Tensor>, out: &Tensor);
    fn silu_up(&self, gate_up: &Tensor, out: &Tensor);
    fn choose(&self, logits: &Tensor, tokens: [&Tensor; 2], results: [&Tensor; 2]);
    fn select_buckets(&self, hidden: &Tensor, buckets: &Tensor);
}

/// A model of the given sizes: hidden, heads, key heads, head dimension, inner, vocabulary.
pub(super) fn config(sizes: [usize; 6], architecture: Architecture) -> ModelConfig {
    let golden = ModelConfig::from_dir(&grail_golden::path("models/qwen2-tied")).unwrap();
    let [hidden_size, heads, kv_heads, head_dim, intermediate_size, vocab_size] = sizes;
    ModelConfig {
        architecture,
        hidden_size,
        heads,
        kv_heads,
        head_dim,
        intermediate_size,
        vocab_size,
        rms_norm_eps: EPSILON,
        ..golden
    }
}

pub(super) fn random_on(device: Device, shape: &[i64], deviation: f64) -> Tensor {
    (Tensor::randn(shape, (Kind::Float, device)) * deviation).to_kind(Kind::BFloat16)
}

fn random(subject: &dyn Subject, shape: &[i64], deviation: f64) -> Tensor {
    random_on(subject.device(), shape, deviation)
}

/// Poisoned, so that what a kernel does not write is seen.
pub(super) fn poisoned_on(device: Device, shape: &[i64], kind: Kind) -> Tensor {
    match kind {
        Kind::Int8 => Tensor::full(shape, 77, (kind, device)),
        _ => Tensor::full(shape, f64::NAN, (kind, device)),
    }
}

fn poisoned(subject: &dyn Subject, shape: &[i64], kind: Kind) -> Tensor {
    poisoned_on(subject.device(), shape, kind)
}

/// Every check.
pub(super) fn all(subject: &dyn Subject, config: &ModelConfig) {
    residual_and_norm(subject, config);
    rotated_heads(subject, config);
    activation(subject, config);
    chosen_logprobs(subject, config);
    selected_buckets(subject, config);
}

/// Share of elements that differ, and the largest difference over the largest magnitude.
pub(super) fn difference(x: &Tensor, y: &Tensor) -> (f64, f64) {
    let (x, y) = (x.to_kind(Kind::Double), y.to_kind(Kind::Double));
    assert_eq!(x.size(), y.size());
    let apart = (&x - &y).abs();
    let share = apart.not_equal(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
    let largest = apart.max().double_value(&[]) / y.abs().max().double_value(&[]);
    assert!(largest.is_finite(), "NaN is no agreement");
    (share, largest)
}

/// Whether `share` of the elements of `x` are so few that only the order of additions can have made them round to the other side.
fn are_few(share: f64, x: &Tensor) -> bool {
    let elements = x.numel() as f64;
    share * elements <= 2.0 + 1e-3 * elements
}

/// Whether norms agree: bit for bit where squares are added in the same order, and otherwise but for roundings.
fn is_norm_right(subject: &dyn Subject, share: f64, x: &Tensor) -> bool {
    if subject.is_order_the_same() { share == 0.0 } else { are_few(share, x) }
}

fn residual_and_norm(subject: &dyn Subject, config: &ModelConfig) {
    let (hidden, rows) = (config.hidden_size as i64, subject.rows(333));
    let (x, addend) = (random(subject, &[rows, hidden], 3.0), random(subject, &[rows, hidden], 2.0));
    let norm = RmsNorm { weight: random(subject, &[hidden], 1.0), epsilon: EPSILON };
    let (sum, out) = (x.copy(), poisoned(subject, &[rows, hidden], Kind::BFloat16));
    subject.residual_norm(&sum, Some(&addend), &norm.weight, &out);
    let expected = &x + &addend;
    assert_eq!(difference(&sum, &expected), (0.0, 0.0));
    let (share, largest) = difference(&out, &norm.forward(&expected).unwrap());
    assert!(is_norm_right(subject, share, &out) && largest < 0.01, "{share} of the elements, {largest}");
    subject.residual_norm(&x, None, &norm.weight, &out);
    let (share, _) = difference(&out, &norm.forward(&x).unwrap());
    assert!(is_norm_right(subject, share, &out), "{share}");
}

fn rotated_heads(subject: &dyn Subject, config: &ModelConfig) {
    let HeadShape { heads, kv_heads, head_dim } = HeadShape::of(config);
    let (rows, key_rows) = (subject.rows(257), subject.rows(600));
    let device = subject.device();
    let qkv = random(subject, &[rows, heads + 2 * kv_heads, head_dim], 2.0);
    let positions = Tensor::randint(8_000, [rows], (Kind::Int, device));
    let rotation =
        Rope::new(&config.rope, config.head_dim, device).unwrap().rotation(&positions, Kind::BFloat16).unwrap();
    let weight = RmsNorm { weight: random(subject, &[head_dim], 1.0), epsilon: EPSILON };
    let has_norms = config.architecture == Architecture::Qwen3;
    let rotated = |first, count| {
        let part = qkv.narrow(1, first, count);
        rotation.apply(&if has_norms { weight.forward(&part).unwrap() } else { part }).unwrap()
    };
    let (queries, keys) = (rotated(0, heads), rotated(heads, kv_heads));
    let values = qkv.narrow(1, heads + kv_heads, kv_heads);
    let sources = Tensor::randint(rows, [key_rows], (Kind::Int, device));
    let out = poisoned(subject, &[key_rows, 2, kv_heads, head_dim], Kind::BFloat16);
    let [cos, sin] = rotation.into_parts().unwrap();
    let (angles, norm) = (Angles { cos: &cos, sin: &sin }, has_norms.then_some(&weight.weight));
    let mine = qkv.copy();
    subject.rotate_queries(&mine, angles, norm);
    subject.gather_keys(&mine, &sources, angles, norm, &out);
    for (found, expected) in [(mine.narrow(1, 0, heads), queries), (out.select(1, 0), keys.index_select(0, &sources))] {
        let share = difference(&found, &expected).0;
        assert!(if has_norms { is_norm_right(subject, share, &found) } else { share == 0.0 }, "{share}");
    }
    assert_eq!(difference(&out.select(1, 1), &values.index_select(0, &sources)).0, 0.0);
    let others = |x: &Tensor| x.narrow(1, heads, 2 * kv_heads);
    assert_eq!(difference(&others(&mine), &others(&qkv)).0, 0.0, "keys and values stay");
}

fn activation(subject: &dyn Subject, config: &ModelConfig) {
    let (inner, rows) = (config.intermediate_size as i64, subject.rows(129));
    let (gate_up, out) = (random(subject, &[rows, 2 * inner], 4.0), poisoned(subject, &[rows, inner], Kind::BFloat16));
    subject.silu_up(&gate_up, &out);
    let expected = gate_up.narrow(1, 0, inner).silu() * gate_up.narrow(1, inner, inner);
    let (share, largest) = difference(&out, &expected);
    assert!(are_few(share, &out) && largest < 0.01, "{share} of the elements, {largest}");
}

fn chosen_logprobs(subject: &dyn Subject, config: &ModelConfig) {
    let (vocab, rows, device) = (config.vocab_size as i64, subject.rows(77), subject.device());
    let logits = random(subject, &[rows, vocab], 6.0);
    let tokens = || Tensor::randint(vocab, [rows], (Kind::Int, device));
    let (targets, eos) = (tokens(), tokens());
    let (logprobs, likely) = (poisoned(subject, &[rows], Kind::Float), poisoned(subject, &[rows], Kind::Float));
    subject.choose(&logits, [&targets, &eos], [&logprobs, &likely]);
    let at = |x: &Tensor, index: &Tensor| x.gather(1, &index.to_kind(Kind::Int64).unsqueeze(1), false).squeeze_dim(1);
    let expected = at(&logits.log_softmax(-1, Kind::Float), &targets);
    assert!((&logprobs - &expected).abs().max().double_value(&[]) < 1e-4);
    let (_, largest) = difference(&likely, &at(&logits.softmax(-1, None), &eos));
    assert!(largest < 0.01, "{largest}");
    // Where no EOS is asked for nothing is written, and what is not finite shows.
    let none = Tensor::full([rows], -1, (Kind::Int, device));
    drop(logits.get(1).narrow(0, 17, 1).fill_(f64::INFINITY));
    drop(logits.get(2).narrow(0, vocab - 1, 1).fill_(f64::NAN));
    drop(logits.get(3).fill_(f64::NEG_INFINITY));
    let untouched = poisoned(subject, &[rows], Kind::Float);
    subject.choose(&logits, [&targets, &none], [&logprobs, &untouched]);
    assert!(untouched.isnan().all().int64_value(&[]) == 1);
    let finite = Vec::<bool>::try_from(logprobs.isfinite()).unwrap();
    assert!(finite.iter().enumerate().all(|(row, finite)| *finite != (1..=3).contains(&row)));
}

fn selected_buckets(subject: &dyn Subject, config: &ModelConfig) {
    let (hidden, rows) = (config.hidden_size as i64, subject.rows(205));
    // Coarse values tie at the cut; zeros leave fewer than sixteen that differ from them.
    let fine = random(subject, &[rows, hidden], 20.0);
    let coarse = ((random(subject, &[rows, hidden], 1.0)).round() * 3.0).to_kind(Kind::BFloat16);
    let zeros = Tensor::zeros([3, hidden], (Kind::BFloat16, subject.device()));
    // On both sides of where buckets begin: bf16 values below and above, the rest of the row zero.
    let beginnings = [1.3784_f32, 4.6569, 12.4544, 31.0, 75.1089, 180.0193, 429.539];
    let steps = beginnings.map(|value| value.to_bits() >> 16);
    let edges: Vec<f32> = steps.iter().flat_map(|step| [step << 16, (step + 1) << 16]).map(f32::from_bits).collect();
    let edges = Tensor::from_slice(&edges).to_kind(Kind::BFloat16).to_device(subject.device());
    zeros.get(1).narrow(0, 0, edges.size()[0]).copy_(&edges);
    zeros.get(2).narrow(0, hidden - edges.size()[0], edges.size()[0]).copy_(&edges.neg());
    let x = Tensor::cat(&[fine, coarse, zeros], 0);
    let out = poisoned(subject, &[x.size()[0], TOP], Kind::Int8);
    subject.select_buckets(&x, &out);
    let bytes = Vec::<i8>::try_from(out.to_device(Device::Cpu).view([-1])).unwrap();
    let mine = SelectedBuckets::from_rows(bytes.as_chunks().0.to_vec());
    assert!(mine == SelectedBuckets::of(&x.to_device(Device::Cpu)).unwrap(), "{} columns", hidden);

    drop(x.get(4).narrow(0, hidden - 1, 1).fill_(f64::NAN));
    drop(x.get(rows + 1).narrow(0, 0, 1).fill_(f64::NEG_INFINITY));
    subject.select_buckets(&x, &out);
    let first = Vec::<i8>::try_from(out.select(1, 0)).unwrap();
    let bad: Vec<usize> = (0..first.len()).filter(|row| first[*row] == i8::MIN).collect();
    assert_eq!(bad, [4, usize::try_from(rows).unwrap() + 1]);
}
