//! What only a GPU can show: `cargo nextest run -p grail-model --run-ignored only gpu_tests` on a host that has one.

use tch::{Device, Kind, Tensor};

use super::attention::{self, Attention};
use super::ffi::{self, VarlenKernel};
use super::kernels::{Angles, Dimensions, Kernels, Lane, TOP};
use super::layout::{Layout, Predictions};
use crate::attention::{AttentionPlan, HeadShape};
use crate::config::{Architecture, ModelConfig};
use crate::gpu::{self, GpuSupport};
use crate::layers::RmsNorm;
use crate::packed::PackedBatch;
use crate::rope::Rope;
use crate::sketch::SelectedBuckets;
use grail_protocol::ids::TokenId;

const GPU: Device = Device::Cuda(0);
const EPSILON: f64 = 1e-6;

fn config(sizes: [usize; 6], architecture: Architecture) -> ModelConfig {
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

/// Shapes of real models and a small one; Qwen3 has norms of heads.
fn configs() -> [ModelConfig; 4] {
    [
        config([3_584, 28, 4, 128, 18_944, 152_064], Architecture::Qwen2),
        config([1_536, 12, 2, 128, 8_960, 151_936], Architecture::Qwen2),
        config([2_560, 32, 8, 128, 9_728, 151_936], Architecture::Qwen3),
        config([64, 4, 2, 16, 128, 512], Architecture::Qwen3),
    ]
}

fn kernels(config: &ModelConfig) -> (Kernels, Lane) {
    let GpuSupport::Loaded { library, .. } = gpu::enable() else { panic!("no CUDA library") };
    tch::manual_seed(11);
    let dimensions = Dimensions::of(config).unwrap();
    let kernels = Kernels::load(library.parent().unwrap(), 0, dimensions).unwrap();
    let lane = kernels.enter().unwrap();
    (kernels, lane)
}

fn random(shape: &[i64], deviation: f64) -> Tensor {
    (Tensor::randn(shape, (Kind::Float, GPU)) * deviation).to_kind(Kind::BFloat16)
}

/// Poisoned, so that what a kernel does not write is seen.
fn poisoned(shape: &[i64], kind: Kind) -> Tensor {
    match kind {
        Kind::Int8 => Tensor::full(shape, 77, (kind, GPU)),
        _ => Tensor::full(shape, f64::NAN, (kind, GPU)),
    }
}

/// Share of elements that differ, and the largest difference over the largest magnitude.
fn difference(x: &Tensor, y: &Tensor) -> (f64, f64) {
    let (x, y) = (x.to_kind(Kind::Double), y.to_kind(Kind::Double));
    assert_eq!(x.size(), y.size());
    let apart = (&x - &y).abs();
    let share = apart.not_equal(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
    let largest = apart.max().double_value(&[]) / y.abs().max().double_value(&[]);
    assert!(largest.is_finite(), "NaN is no agreement");
    (share, largest)
}

#[test]
#[ignore = "needs a GPU"]
fn residual_and_norm_round_as_the_composition_does() {
    for config in configs() {
        let (kernels, lane) = kernels(&config);
        let hidden = config.hidden_size as i64;
        let (x, addend) = (random(&[333, hidden], 3.0), random(&[333, hidden], 2.0));
        let norm = RmsNorm { weight: random(&[hidden], 1.0), epsilon: EPSILON };
        let (sum, out) = (x.copy(), poisoned(&[333, hidden], Kind::BFloat16));
        kernels.residual_norm(lane, &sum, Some(&addend), &norm.weight, &out).unwrap();
        let expected = &x + &addend;
        assert_eq!(difference(&sum, &expected), (0.0, 0.0));
        // The sum of squares is added in another order: a few values round to the other side.
        let (share, largest) = difference(&out, &norm.forward(&expected).unwrap());
        assert!(share < 1e-3 && largest < 0.01, "{share} of the elements, {largest}");
        kernels.residual_norm(lane, &x, None, &norm.weight, &out).unwrap();
        let (share, _) = difference(&out, &norm.forward(&x).unwrap());
        assert!(share < 1e-3, "{share}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn rotated_heads_are_those_of_the_composition() {
    for config in configs() {
        let (kernels, lane) = kernels(&config);
        let HeadShape { heads, kv_heads, head_dim } = HeadShape::of(&config);
        let rows = 257;
        let qkv = random(&[rows, heads + 2 * kv_heads, head_dim], 2.0);
        let positions = Tensor::randint(8_000, [rows], (Kind::Int, GPU));
        let rotation =
            Rope::new(&config.rope, config.head_dim, GPU).unwrap().rotation(&positions, Kind::BFloat16).unwrap();
        let weight = RmsNorm { weight: random(&[head_dim], 1.0), epsilon: EPSILON };
        let has_norms = config.architecture == Architecture::Qwen3;
        let rotated = |first, count| {
            let part = qkv.narrow(1, first, count);
            rotation.apply(&if has_norms { weight.forward(&part).unwrap() } else { part }).unwrap()
        };
        let (queries, keys) = (rotated(0, heads), rotated(heads, kv_heads));
        let values = qkv.narrow(1, heads + kv_heads, kv_heads);
        let sources = Tensor::randint(rows, [600], (Kind::Int, GPU));
        let out = poisoned(&[600, 2, kv_heads, head_dim], Kind::BFloat16);
        let [cos, sin] = rotation.into_parts().unwrap();
        let (angles, norm) = (Angles { cos: &cos, sin: &sin }, has_norms.then_some(&weight.weight));
        let mine = qkv.copy();
        kernels.rotate_queries(lane, &mine, angles, norm).unwrap();
        kernels.gather_keys(lane, &mine, &sources, angles, norm, &out).unwrap();
        let limit = if has_norms { 1e-3 } else { 0.0 };
        assert!(difference(&mine.narrow(1, 0, heads), &queries).0 <= limit);
        assert!(difference(&out.select(1, 0), &keys.index_select(0, &sources)).0 <= limit);
        assert_eq!(difference(&out.select(1, 1), &values.index_select(0, &sources)).0, 0.0);
        let others = heads + kv_heads;
        assert_eq!(
            difference(&mine.narrow(1, heads, 2 * kv_heads), &qkv.narrow(1, heads, 2 * kv_heads)).0,
            0.0,
            "{others}"
        );
    }
}

#[test]
#[ignore = "needs a GPU"]
fn activation_rounds_as_the_composition_does() {
    for config in configs() {
        let (kernels, lane) = kernels(&config);
        let inner = config.intermediate_size as i64;
        let (gate_up, out) = (random(&[129, 2 * inner], 4.0), poisoned(&[129, inner], Kind::BFloat16));
        kernels.silu_up(lane, &gate_up, &out).unwrap();
        let expected = gate_up.narrow(1, 0, inner).silu() * gate_up.narrow(1, inner, inner);
        let (share, largest) = difference(&out, &expected);
        assert!(share < 1e-3 && largest < 0.01, "{share} of the elements, {largest}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn chosen_logprobs_are_those_of_log_softmax() {
    for config in configs() {
        let (kernels, lane) = kernels(&config);
        let vocab = config.vocab_size as i64;
        let logits = random(&[77, vocab], 6.0);
        let (targets, eos) =
            (Tensor::randint(vocab, [77], (Kind::Int, GPU)), Tensor::randint(vocab, [77], (Kind::Int, GPU)));
        let (logprobs, likely) = (poisoned(&[77], Kind::Float), poisoned(&[77], Kind::Float));
        kernels.choose(lane, &logits, [&targets, &eos], [&logprobs, &likely]).unwrap();
        let at =
            |x: &Tensor, index: &Tensor| x.gather(1, &index.to_kind(Kind::Int64).unsqueeze(1), false).squeeze_dim(1);
        let expected = at(&logits.log_softmax(-1, Kind::Float), &targets);
        assert!((&logprobs - &expected).abs().max().double_value(&[]) < 1e-4);
        let (_, largest) = difference(&likely, &at(&logits.softmax(-1, None), &eos));
        assert!(largest < 0.01, "{largest}");
        // Where no EOS is asked for nothing is written, and what is not finite shows.
        let none = Tensor::full([77], -1, (Kind::Int, GPU));
        drop(logits.get(5).narrow(0, 17, 1).fill_(f64::INFINITY));
        let untouched = poisoned(&[77], Kind::Float);
        kernels.choose(lane, &logits, [&targets, &none], [&logprobs, &untouched]).unwrap();
        assert!(untouched.isnan().all().int64_value(&[]) == 1);
        let finite = Vec::<bool>::try_from(logprobs.isfinite()).unwrap();
        assert!(finite.iter().enumerate().all(|(row, finite)| *finite == (row != 5)));
    }
}

#[test]
#[ignore = "needs a GPU"]
fn selected_buckets_are_those_of_the_scan() {
    for config in configs() {
        let (kernels, lane) = kernels(&config);
        let hidden = config.hidden_size as i64;
        // Coarse values tie at the cut; zeros leave fewer than sixteen that differ from them.
        let fine = random(&[205, hidden], 20.0);
        let coarse = ((random(&[205, hidden], 1.0)).round() * 3.0).to_kind(Kind::BFloat16);
        let zeros = Tensor::zeros([3, hidden], (Kind::BFloat16, GPU));
        let x = Tensor::cat(&[fine, coarse, zeros], 0);
        let out = poisoned(&[x.size()[0], TOP], Kind::Int8);
        kernels.select_buckets(lane, &x, &out).unwrap();
        let bytes = Vec::<i8>::try_from(out.to_device(Device::Cpu).view([-1])).unwrap();
        let mine = SelectedBuckets::from_rows(bytes.as_chunks().0.to_vec());
        assert!(mine == SelectedBuckets::of(&x.to_device(Device::Cpu)).unwrap(), "{} columns", hidden);

        drop(x.get(7).narrow(0, hidden - 1, 1).fill_(f64::NAN));
        drop(x.get(300).narrow(0, 0, 1).fill_(f64::NEG_INFINITY));
        kernels.select_buckets(lane, &x, &out).unwrap();
        let first = Vec::<i8>::try_from(out.select(1, 0)).unwrap();
        let bad: Vec<usize> = (0..first.len()).filter(|row| first[*row] == i8::MIN).collect();
        assert_eq!(bad, [7, 300]);
    }
}

/// A prompt with three continuations and a sequence of its own.
fn batch() -> PackedBatch {
    let tokens: Vec<TokenId> = (0..700).map(|token| TokenId(token % 512)).collect();
    let mut batch = PackedBatch::new();
    let prompt = batch.push_sequence(&tokens[..130]);
    for length in [1, 257, 640] {
        batch.push_continuation(prompt, &tokens[..length]);
    }
    batch.push_sequence(&tokens[..99]);
    batch
}

#[test]
#[ignore = "needs a GPU"]
fn packed_attention_is_that_of_each_sequence() {
    assert_eq!(Attention::flash(), Ok(Attention::Varlen(VarlenKernel::Flash)));
    for config in configs() {
        let (kernels, lane) = kernels(&config);
        let shape = HeadShape::of(&config);
        let HeadShape { heads, kv_heads, head_dim } = shape;
        let batch = batch();
        let rows = batch.len() as i64;
        let qkv = random(&[rows, heads + 2 * kv_heads, head_dim], 1.0);
        let part = |first, count| qkv.narrow(1, first, count);
        // In float32 and sequence by sequence: what all kernels approach.
        let wide = |x: Tensor| x.to_kind(Kind::Float);
        let exact = AttentionPlan::new(&batch, shape, (Kind::Float, GPU)).unwrap();
        let exact = exact
            .attend(&wide(part(0, heads)), &wide(part(heads, kv_heads)), &wide(part(heads + kv_heads, kv_heads)))
            .unwrap();
        let error = |x: &Tensor| ((wide(x.shallow_clone()) - &exact).norm() / exact.norm()).double_value(&[]);
        let plain = AttentionPlan::new(&batch, shape, (Kind::BFloat16, GPU)).unwrap();
        let plain = plain.attend(&part(0, heads), &part(heads, kv_heads), &part(heads + kv_heads, kv_heads)).unwrap();

        // No rotation: angle zero.
        let cos = Tensor::ones([rows, head_dim], (Kind::BFloat16, GPU));
        let sin = Tensor::zeros([rows, head_dim], (Kind::BFloat16, GPU));
        for kernel in [VarlenKernel::Flash, VarlenKernel::Efficient] {
            let upload = |numbers: &[i32]| ffi::upload(numbers, 0);
            let layout = Layout::new(&batch, &Predictions::default(), Attention::Varlen(kernel), upload).unwrap();
            let keys = Tensor::stack(&[part(heads, kv_heads), part(heads + kv_heads, kv_heads)], 1)
                .index_select(0, &layout.key_sources().unwrap());
            let attended = attention::attend(kernel, &part(0, heads), &keys, &layout, shape).unwrap();
            assert!(
                error(&attended) < 1.2 * error(&plain) + 1e-4,
                "{kernel:?}: {} {}",
                error(&attended),
                error(&plain)
            );
            // A mask that is aligned at the wrong end, or a foreign prefix, is no small error.
            let swapped = keys.roll([1], [0]);
            let wrong = attention::attend(kernel, &part(0, heads), &swapped, &layout, shape).unwrap();
            assert!(error(&wrong) > 10.0 * error(&plain), "{kernel:?}");
            if config.architecture == Architecture::Qwen2 {
                let gathered = poisoned(&keys.size(), Kind::BFloat16);
                let sources = layout.key_sources().unwrap();
                kernels.gather_keys(lane, &qkv, &sources, Angles { cos: &cos, sin: &sin }, None, &gathered).unwrap();
                assert_eq!(difference(&gathered, &keys).0, 0.0);
            }
        }
    }
}
