//! What only a GPU can show: `cargo nextest run -p grail-model --run-ignored only gpu_tests` on a host that has one.

use tch::{Device, Kind, Tensor};

use super::attention::{self, Attention};
use super::ffi::{self, VarlenKernel};
use super::kernel_tests::{self, Subject, config, difference, poisoned_on, random_on};
use super::kernels::{Angles, Dimensions, Kernels, Lane};
use super::layout::{Layout, Predictions};
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

/// The kernels of one shape on the first GPU.
struct Gpu {
    kernels: Kernels,
    lane: Lane,
}

impl Gpu {
    fn of(config: &ModelConfig) -> Self {
        let GpuSupport::Loaded { library, .. } = gpu::enable() else { panic!("no CUDA library") };
        tch::manual_seed(11);
        let dimensions = Dimensions::of(config).unwrap();
        let kernels = Kernels::load(library.parent().unwrap(), 0, dimensions).unwrap();
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

#[test]
#[ignore = "needs a GPU"]
fn packed_attention_is_that_of_each_sequence() {
    assert_eq!(Attention::flash(), Ok(Attention::Varlen(VarlenKernel::Flash)));
    for config in configs() {
        let subject = Gpu::of(&config);
        let shape = HeadShape::of(&config);
        let HeadShape { heads, kv_heads, head_dim } = shape;
        let batch = batch();
        let rows = batch.len() as i64;
        let qkv = random_on(GPU, &[rows, heads + 2 * kv_heads, head_dim], 1.0);
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
                let gathered = poisoned_on(GPU, &keys.size(), Kind::BFloat16);
                let sources = layout.key_sources().unwrap();
                subject.gather_keys(&qkv, &sources, Angles { cos: &cos, sin: &sin }, None, &gathered);
                assert_eq!(difference(&gathered, &keys).0, 0.0);
            }
        }
    }
}
