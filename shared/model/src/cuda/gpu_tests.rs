//! What only a GPU can show: `cargo nextest run -p grail-model --run-ignored only gpu_tests` on a host that has one.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::attention::{self, Attention};
use super::ffi::{self, Context, VarlenKernel};
use super::gate_up::GateUp;
use super::hopper::Hopper;
use super::kernel_tests::{self, Subject, config, difference, poisoned_on, random_on};
use super::kernels::{Angles, Dimensions, Kernels, Lane};
use super::layout::{Layout, Predictions};
use super::trial::CAPABILITY;
use super::weight_tests::{self, WeightSubject};
use super::weights::{Changed, Selection, WeightKernels};
use crate::attention::{AttentionPlan, HeadShape};
use crate::config::{Architecture, ModelConfig};
use crate::gpu::{self, GpuSupport};
use crate::packed::PackedBatch;
use grail_protocol::ids::TokenId;

const GPU: Device = Device::Cuda(0);

/// Shapes of real models and a small one; Qwen3 has norms of heads.
fn configs() -> [ModelConfig; 4] {
    [
        config([3_584, 28, 4, 128, 18_944, 152_064], Architecture::Qwen2),
        config([1_536, 12, 2, 128, 8_960, 151_936], Architecture::Qwen2),
        config([2_560, 32, 8, 128, 9_728, 151_936], Architecture::Qwen3),
        config([64, 4, 2, 16, 128, 512], Architecture::Qwen3),
    ]
}

/// Where the libraries of the torch lie whose GPU half is loaded.
fn libraries() -> &'static Path {
    let GpuSupport::Loaded { library, .. } = gpu::enable() else { panic!("no CUDA library") };
    library.parent().unwrap()
}

/// A kernel for Hopper is left out for want of such a card only, or where it is not made for the model.
fn assert_left_out(is_unfit: bool) {
    let capability = Context::of_device(0).unwrap().capability().unwrap();
    assert!(capability != CAPABILITY || is_unfit, "it is left out on {capability:?}");
}

/// The kernels of one shape on the first GPU.
struct Gpu {
    kernels: Kernels,
    lane: Lane,
}

impl Gpu {
    fn of(config: &ModelConfig) -> Self {
        tch::manual_seed(11);
        let dimensions = Dimensions::of(config).unwrap();
        let kernels = Kernels::load(libraries(), 0, dimensions).unwrap();
        let lane = kernels.enter().unwrap();
        Self { kernels, lane }
    }
}

impl Subject for Gpu {
    fn device(&self) -> Device {
        GPU
    }

    fn rows(&self, many: i64) -> i64 {
        many
    }

    fn is_order_the_same(&self) -> bool {
        true
    }

    fn residual_norm(&self, x: &Tensor, addend: Option<&Tensor>, weight: &Tensor, out: &Tensor) {
        self.kernels.residual_norm(self.lane, x, addend, weight, out).unwrap();
    }

    fn rotate_queries(&self, qkv: &Tensor, angles: Angles<'_>, weight: Option<&Tensor>) {
        self.kernels.rotate_queries(self.lane, qkv, angles, weight).unwrap();
    }

    fn gather_keys(&self, qkv: &Tensor, sources: &Tensor, angles: Angles<'_>, weight: Option<&Tensor>, out: &Tensor) {
        self.kernels.gather_keys(self.lane, qkv, sources, angles, weight, out).unwrap();
    }

    fn silu_up(&self, gate_up: &Tensor, out: &Tensor) {
        self.kernels.silu_up(self.lane, gate_up, out).unwrap();
    }

    fn choose(&self, logits: &Tensor, tokens: [&Tensor; 2], results: [&Tensor; 2]) {
        self.kernels.choose(self.lane, logits, tokens, results).unwrap();
    }

    fn select_buckets(&self, hidden: &Tensor, buckets: &Tensor) {
        self.kernels.select_buckets(self.lane, hidden, buckets).unwrap();
    }
}

#[test]
#[ignore = "needs a GPU"]
fn kernels_compute_what_the_composition_does() {
    for config in configs() {
        kernel_tests::all(&Gpu::of(&config), &config);
    }
}

impl WeightSubject for WeightKernels {
    fn weights_device(&self) -> Device {
        GPU
    }

    fn sums(&self, tensors: &[&Tensor]) -> Tensor {
        self.sums(tensors).unwrap()
    }

    fn differences(&self, changed: &[Changed<'_>]) -> Tensor {
        self.differences(changed).unwrap()
    }

    fn copy(&self, pairs: &[(Tensor, Tensor)]) {
        self.copy(pairs).unwrap();
    }

    fn read(&self, selections: &[Selection<'_>]) {
        self.read(selections).unwrap();
    }

    fn write(&self, selections: &[Selection<'_>]) {
        self.write(selections).unwrap();
    }

    fn differ(&self, selections: &[Selection<'_>]) -> Tensor {
        self.differ(selections).unwrap()
    }
}

#[test]
#[ignore = "needs a GPU"]
fn kernels_for_weights_compute_what_a_host_does() {
    let GpuSupport::Loaded { .. } = gpu::enable() else { panic!("no CUDA library") };
    // Makes the device's context.
    drop(Tensor::zeros([1], (Kind::Float, GPU)));
    weight_tests::all(&WeightKernels::load(0).unwrap());
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

/// Random queries, keys and values of a batch, and what attention makes of them.
struct Attended {
    shape: HeadShape,
    /// `[rows, heads + 2 · kv_heads, head_dim]`, bf16.
    qkv: Tensor,
    /// In float32 and sequence by sequence: what all kernels approach.
    exact: Tensor,
    /// In bf16 and sequence by sequence.
    plain: Tensor,
}

impl Attended {
    fn of(config: &ModelConfig, batch: &PackedBatch) -> Self {
        let shape = HeadShape::of(config);
        let HeadShape { heads, kv_heads, head_dim } = shape;
        let qkv = random_on(GPU, &[batch.len() as i64, heads + 2 * kv_heads, head_dim], 1.0);
        let part = |first, count, kind| qkv.narrow(1, first, count).to_kind(kind);
        let [exact, plain] = [Kind::Float, Kind::BFloat16].map(|kind| {
            let plan = AttentionPlan::new(batch, shape, (kind, GPU)).unwrap();
            let [query, key, value] = [(0, heads), (heads, kv_heads), (heads + kv_heads, kv_heads)]
                .map(|(first, count)| part(first, count, kind));
            plan.attend(&query, &key, &value).unwrap()
        });
        Self { shape, qkv, exact, plain }
    }

    fn query(&self) -> Tensor {
        self.qkv.narrow(1, 0, self.shape.heads)
    }

    /// Keys and values as `layout` orders them.
    fn keys_values(&self, layout: &Layout) -> Tensor {
        let HeadShape { heads, kv_heads, .. } = self.shape;
        let part = |first| self.qkv.narrow(1, first, kv_heads);
        Tensor::stack(&[part(heads), part(heads + kv_heads)], 1).index_select(0, &layout.key_sources().unwrap())
    }

    fn error(&self, x: &Tensor) -> f64 {
        ((x.to_kind(Kind::Float) - &self.exact).norm() / self.exact.norm()).double_value(&[])
    }

    fn assert_right(&self, attended: &Tensor, what: &str) {
        let (error, plain) = (self.error(attended), self.error(&self.plain));
        assert!(error < 1.2 * plain + 1e-4, "{what}: {error} {plain}");
    }

    fn assert_wrong(&self, attended: &Tensor, what: &str) {
        let (error, plain) = (self.error(attended), self.error(&self.plain));
        assert!(error > 10.0 * plain, "{what}: {error} {plain}");
    }
}

fn layout_of(batch: &PackedBatch, attention: Attention) -> Layout {
    Layout::new(batch, &Predictions::default(), attention, |numbers| ffi::upload(numbers, 0)).unwrap()
}

#[test]
#[ignore = "needs a GPU"]
fn packed_attention_is_that_of_each_sequence() {
    assert_eq!(Attention::flash(), Ok(Attention::Varlen(VarlenKernel::Flash)));
    for config in configs() {
        let subject = Gpu::of(&config);
        let batch = batch();
        let attended = Attended::of(&config, &batch);
        let Attended { shape, qkv, .. } = &attended;
        // No rotation: angle zero.
        let angle = [batch.len() as i64, shape.head_dim];
        let cos = Tensor::ones(angle, (Kind::BFloat16, GPU));
        let sin = Tensor::zeros(angle, (Kind::BFloat16, GPU));
        for kernel in [VarlenKernel::Flash, VarlenKernel::Efficient] {
            let layout = layout_of(&batch, Attention::Varlen(kernel));
            let keys = attended.keys_values(&layout);
            let attend = |keys: &Tensor| attention::attend(kernel, &attended.query(), keys, &layout, *shape).unwrap();
            attended.assert_right(&attend(&keys), &format!("{kernel:?}"));
            // A mask that is aligned at the wrong end, or a foreign prefix, is no small error.
            attended.assert_wrong(&attend(&keys.roll([1], [0])), &format!("{kernel:?}"));
            if config.architecture == Architecture::Qwen2 {
                let gathered = poisoned_on(GPU, &keys.size(), Kind::BFloat16);
                let sources = layout.key_sources().unwrap();
                subject.gather_keys(qkv, &sources, Angles { cos: &cos, sin: &sin }, None, &gathered);
                assert_eq!(difference(&gathered, &keys).0, 0.0);
            }
        }
    }
}

/// One group of the length that is usual: more tiles than a card works on at a time.
fn long_batch() -> PackedBatch {
    let tokens = vec![TokenId(0); 3_000];
    let mut batch = PackedBatch::new();
    let prompt = batch.push_sequence(&tokens[..200]);
    for length in [801, 17, 2_999, 640, 128, 1_000, 333, 56] {
        batch.push_continuation(prompt, &tokens[..length]);
    }
    batch
}

#[test]
#[ignore = "needs a GPU"]
fn attention_by_the_kernel_for_hopper_is_that_of_each_sequence() {
    for config in configs() {
        let Gpu { kernels, lane } = Gpu::of(&config);
        let own = Hopper::start(libraries(), 0, &kernels.dimensions, lane).unwrap();
        let Some(own) = own else {
            assert_left_out(config.head_dim != 128);
            continue;
        };
        assert_eq!(Attention::choose(libraries(), 0, &kernels).to_string(), "hopper");
        for batch in [batch(), long_batch()] {
            let attended = Attended::of(&config, &batch);
            let layout = layout_of(&batch, Attention::Hopper(own));
            let keys = attended.keys_values(&layout);
            let attend = |keys: &Tensor| {
                let prepared = own.prepare(&attended.qkv, keys, &layout).unwrap();
                prepared.attend(lane).unwrap().copy()
            };
            let first = attend(&keys);
            attended.assert_right(&first, "hopper");
            attended.assert_wrong(&attend(&keys.roll([1], [0])), "hopper");
            assert!(attend(&keys).equal(&first), "the same bits again");
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn gate_and_up_by_the_kernel_for_hopper_are_libtorchs_bit_for_bit() {
    for config in configs() {
        let Gpu { kernels, lane } = Gpu::of(&config);
        let start = |dimensions| GateUp::start(libraries(), 0, &dimensions, lane).unwrap();
        let biased = Dimensions { has_mlp_bias: true, ..kernels.dimensions.clone() };
        assert!(start(biased).is_none(), "it adds no bias");
        let Some(own) = start(kernels.dimensions.clone()) else {
            assert_left_out(config.hidden_size < 576);
            continue;
        };
        let (hidden, inner) = (config.hidden_size as i64, config.intermediate_size as i64);
        let weight = random_on(GPU, &[2 * inner, hidden], 0.03);
        // One row, parts of a tile, and more tiles than a card works on at a time.
        for rows in [1, 127, 300, 4_097] {
            let x = random_on(GPU, &[rows, hidden], 1.0);
            let room = poisoned_on(GPU, &[rows + 256, inner], Kind::BFloat16);
            let out = room.narrow(0, 0, rows);
            own.launch(lane, &x, &weight, &out).unwrap();
            let gate_up = x.mm(&weight.tr());
            let expected = gate_up.narrow(1, 0, inner).silu() * gate_up.narrow(1, inner, inner);
            assert_eq!(difference(&out, &expected), (0.0, 0.0), "{rows} rows of {hidden}");
            assert_eq!(room.narrow(0, rows, 256).isnan().all().int64_value(&[]), 1, "rows behind the last stay");
            let first = out.copy();
            own.launch(lane, &x, &weight, &out).unwrap();
            assert!(out.equal(&first), "the same bits again");
        }
        // What is not finite stays so, in its own row.
        let x = random_on(GPU, &[300, hidden], 1.0);
        drop(x.get(5).narrow(0, 0, 1).fill_(f64::INFINITY));
        drop(x.get(7).narrow(0, 1, 1).fill_(f64::NAN));
        let out = poisoned_on(GPU, &[300, inner], Kind::BFloat16);
        own.launch(lane, &x, &weight, &out).unwrap();
        let finite = Vec::<bool>::try_from(out.isfinite().all_dim(1, false)).unwrap();
        assert!(finite.iter().enumerate().all(|(row, finite)| *finite != [5, 7].contains(&row)));
        // Another shape or another kind is refused before anything runs.
        assert!(own.launch(lane, &x, &weight.tr(), &out).is_err());
        assert!(own.launch(lane, &x.to_kind(Kind::Float), &weight, &out).is_err());
        assert!(own.launch(lane, &x, &weight, &out.narrow(0, 0, 299)).is_err());
    }
}
