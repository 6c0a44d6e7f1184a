//! The proof forward pass on a GPU in bfloat16: one packed batch without a wait, by libtorch's matrix products and attention, by
//! kernels of our own between them, and on Hopper by our own attention and by a product of our own that ends in the activation.
//!
//! It computes what [`crate::layers`] composes of libtorch's operations, with the same rounding points. Where something it needs
//! is missing, it says so once, and the composition does the work.

mod attention;
mod compile;
mod ffi;
mod forward;
mod gate_up;
#[cfg(test)]
mod gpu_tests;
mod hopper;
#[cfg(test)]
mod host_tests;
#[cfg(test)]
mod kernel_tests;
mod kernels;
mod layout;
mod tiles;
mod trial;
#[cfg(test)]
mod weight_tests;
mod weights;
mod workspace;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tch::TchError;

use self::attention::Attention;
use self::gate_up::{FeedForward, GateUp};
use self::kernels::{Dimensions, Kernels};
use self::workspace::Workspace;
use crate::config::ModelConfig;
use crate::device::{Device, Dtype};
use crate::gpu::{self, GpuSupport};

pub(crate) use self::ffi::pinned;
pub(crate) use self::forward::{BatchOutput, Launched};
pub(crate) use self::layout::Predictions;
pub(crate) use self::weights::{Changed, Selection, WeightKernels, weight_kernels};

/// Variable that leaves out own kernels, to compare or to go round a fault of theirs; see `docs/benchmarks/gpu.md`.
const KERNELS: &str = "GRAIL_PROOF_KERNELS";
const NO_KERNELS: &str = "off";
const OWN_KERNELS: &str = "own";
/// Rows of a batch that memory must allow for before a shadow copy of the weights is provided for.
const LEAST_ROWS: usize = 4096;
/// Fewest rows that a batch is halved to by a shortage of memory; a longer sequence runs alone.
const LEAST_LIMIT: usize = 512;
/// Batches that must fit before one of twice as many rows is tried again. An attempt that fails costs as much as a batch or two.
const BATCHES_BEFORE_MORE: usize = 64;
/// The same after attempts that failed: at four batches a second about a quarter of an hour.
const MOST_BATCHES_BEFORE_MORE: usize = 4096;
/// Device memory that is left alone: the matrix products' workspaces, and what the allocator cannot use.
const SPARE_BYTES: usize = 1 << 30;

/// What proves on one GPU for models of one shape, whatever their weights.
#[derive(Debug)]
pub(crate) struct Engine {
    device: usize,
    kernels: Kernels,
    attention: Attention,
    /// Unset where product and activation are two kernels.
    gate_up: Option<GateUp>,
    workspace: Mutex<Workspace>,
    limit: RowLimit,
}

/// Most rows of a batch for which memory suffices, as far as is known. What took the memory may be gone again later, as a second copy
/// of the weights is, so a limit that was lowered rises after a while: after twice as long each time that a rise was wrong.
#[derive(Debug)]
struct RowLimit {
    /// By the memory that was free at the start.
    most: AtomicUsize,
    now: AtomicUsize,
    /// Batches of about as many rows as the limit allows, since it was changed.
    batches: AtomicUsize,
    /// How many of them it takes to raise it, and to trust that it was right.
    wait: AtomicUsize,
    /// Whether the last change was a rise that is not trusted yet.
    is_tried: AtomicBool,
}

impl RowLimit {
    const fn none() -> Self {
        let [most, now] = [const { AtomicUsize::new(usize::MAX) }; 2];
        let (batches, wait) = (AtomicUsize::new(0), AtomicUsize::new(BATCHES_BEFORE_MORE));
        Self { most, now, batches, wait, is_tried: AtomicBool::new(false) }
    }

    fn set(&self, rows: usize) {
        self.most.store(rows, Ordering::Relaxed);
        self.now.store(rows, Ordering::Relaxed);
    }

    fn lower(&self, rows: usize) {
        self.now.fetch_min((rows / 2).max(LEAST_LIMIT), Ordering::Relaxed);
        self.batches.store(0, Ordering::Relaxed);
        // A batch that is halved several times tells once that the rise was wrong.
        if self.is_tried.swap(false, Ordering::Relaxed) {
            let wait = self.wait.load(Ordering::Relaxed);
            self.wait.store((2 * wait).min(MOST_BATCHES_BEFORE_MORE), Ordering::Relaxed);
        }
    }

    /// A batch of `rows` had memory; `configured` is the most that any batch has.
    fn note_success(&self, rows: usize, configured: usize) {
        let now = self.now.load(Ordering::Relaxed);
        let most = self.most.load(Ordering::Relaxed).min(configured);
        let is_tried = self.is_tried.load(Ordering::Relaxed);
        // A small batch says nothing of the limit.
        if now >= most && !is_tried || rows < now.min(most) / 2 {
            return;
        }
        if self.batches.fetch_add(1, Ordering::Relaxed) + 1 < self.wait.load(Ordering::Relaxed) {
            return;
        }
        self.batches.store(0, Ordering::Relaxed);
        if is_tried {
            self.wait.store(BATCHES_BEFORE_MORE, Ordering::Relaxed);
        }
        self.is_tried.store(now < most, Ordering::Relaxed);
        if now < most {
            self.now.store(now.saturating_mul(2).min(most), Ordering::Relaxed);
        }
    }
}

/// Runs `work`, and returns when a GPU has done what it ordered there. Its orders go to a stream of their own: in the stream of the
/// proofs each would wait for the batches that are queued, and the host with it.
///
/// It may read weights that are proved with, but must not change them.
pub fn beside_proofs<T>(device: Device, work: impl FnOnce() -> T) -> T {
    on_loading_stream(device.torch(), work)
}

/// As [`beside_proofs`].
pub(crate) fn on_loading_stream<T>(device: tch::Device, work: impl FnOnce() -> T) -> T {
    let tch::Device::Cuda(index) = device else { return work() };
    let stream = ffi::OnLoadingStream::enter(index)
        .inspect_err(|error| tracing::debug!(%error, "No stream for loading; it takes turns with the proofs."));
    let result = work();
    drop(stream);
    result
}

/// The engine of a GPU and a model shape; made at the first call, which says once how it will compute.
///
/// `None` where the composition of libtorch's operations computes: on a CPU, in another precision than bfloat16, where the kernels
/// cannot be had, and if `GRAIL_PROOF_KERNELS` is `off`.
pub(crate) fn engine(config: &ModelConfig, device: Device, dtype: Dtype) -> Option<Arc<Engine>> {
    /// All that an engine is made for: checkpoints of one model differ in other things, for instance in their EOS tokens, and an engine
    /// keeps its memory.
    type Key = (usize, Result<Dimensions, String>, usize);
    static KNOWN: Mutex<Vec<(Key, Option<Arc<Engine>>)>> = Mutex::new(Vec::new());
    let (Device::Cuda(index), Dtype::Bf16) = (device, dtype) else { return None };
    if !are_wanted() {
        return None;
    }
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (index, Dimensions::of(config), config.parameters());
    if let Some((_, engine)) = known.iter().find(|(of, _)| *of == key) {
        return engine.clone();
    }
    let made = Engine::start(config, index).map(Arc::new).map_err(|reason| {
        tracing::warn!(%device, reason, "Own kernels are left out; libtorch's operations take their place and are slower.");
    });
    let engine = made.ok();
    known.push((key, engine.clone()));
    engine
}

/// Whether own kernels are used where they can be had.
fn are_wanted() -> bool {
    static WANTED: OnceLock<bool> = OnceLock::new();
    *WANTED.get_or_init(|| {
        let value = std::env::var_os(KERNELS).unwrap_or_default();
        if !(value.is_empty() || value == NO_KERNELS || value == OWN_KERNELS) {
            tracing::warn!(?value, "{KERNELS} is neither {OWN_KERNELS} nor {NO_KERNELS}; own kernels are used.");
        }
        value != NO_KERNELS
    })
}

impl Engine {
    fn start(config: &ModelConfig, device: usize) -> Result<Self, String> {
        let GpuSupport::Loaded { library, .. } = gpu::enable() else {
            return Err("no CUDA library is loaded".to_owned());
        };
        let libraries = library.parent().unwrap_or(Path::new("."));
        let text = |error: TchError| crate::error::TorchError::from(error).detail;
        ffi::set_default_matrix_products().map_err(text)?;
        let kernels = Kernels::load(libraries, device, Dimensions::of(config)?)?;
        let attention = Attention::choose(libraries, device, &kernels);
        let lane = kernels.enter().map_err(text)?;
        let gate_up = GateUp::start(libraries, device, &kernels.dimensions, lane).unwrap_or_else(|reason| {
            tracing::warn!(
                reason,
                "The kernel of gate and up for Hopper is left out until this worker starts again; libtorch's product takes its place and is slower."
            );
            None
        });
        let engine = Self {
            workspace: Mutex::new(Workspace::empty(tch::Device::Cuda(device), FeedForward::by(gate_up))),
            limit: RowLimit::none(),
            device,
            kernels,
            attention,
            gate_up,
        };
        engine.budget(config);
        let gate_up = if gate_up.is_some() { "hopper" } else { "libtorch" };
        tracing::info!(device, %attention, %gate_up, most_rows = engine.most_rows(usize::MAX), "Own kernels are in use.");
        Ok(engine)
    }

    /// Sets the most rows by the memory that is free now, when the weights are loaded and nothing else is.
    fn budget(&self, config: &ModelConfig) {
        let Some((free, _)) = crate::ffi::cuda_memory(Some(self.device)) else { return };
        let rows = rows_that_fit(
            free,
            config.parameters() * 2,
            Workspace::bytes_per_row(&self.kernels.dimensions, FeedForward::by(self.gate_up)),
        );
        self.limit.set(rows);
    }

    /// Most rows of a batch, not above `configured`.
    pub(crate) fn most_rows(&self, configured: usize) -> usize {
        self.limit.now.load(Ordering::Relaxed).min(configured)
    }

    /// Notes that a batch of `rows` rows did not fit.
    pub(crate) fn halve(&self, rows: usize) {
        self.limit.lower(rows);
    }

    /// Notes that there was memory for a batch of `rows` rows, where no batch has more than `configured`.
    pub(crate) fn note_success(&self, rows: usize, configured: usize) {
        self.limit.note_success(rows, configured);
    }
}

/// Rows that fit `free` bytes beside the logits and a shadow copy of the weights; without the copy if it leaves too few.
fn rows_that_fit(free: usize, weight_bytes: usize, bytes_per_row: usize) -> usize {
    let usable = free.saturating_sub(SPARE_BYTES + Workspace::logit_bytes());
    let beside_a_copy = usable.saturating_sub(weight_bytes) / bytes_per_row;
    if beside_a_copy >= LEAST_ROWS { beside_a_copy } else { (usable / bytes_per_row).max(LEAST_LIMIT) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: usize = 1 << 30;

    #[test]
    fn the_budget_leaves_room_for_a_shadow_copy_where_there_is_any() {
        let (weights, row) = (15 * GIB, 160_000);
        let large = rows_that_fit(64 * GIB, weights, row);
        assert!((250_000..340_000).contains(&large), "{large}");
        let no_copy = rows_that_fit(8 * GIB, weights, row);
        assert!((30_000..50_000).contains(&no_copy), "{no_copy}");
        assert_eq!(rows_that_fit(GIB, weights, row), LEAST_LIMIT);
    }

    #[test]
    fn a_limit_that_was_lowered_rises_again_and_later_where_that_was_wrong() {
        let limit = RowLimit::none();
        limit.set(300_000);
        let after = |batches: usize, rows: usize| {
            (0..batches).for_each(|_| limit.note_success(rows, 32_000));
            limit.now.load(Ordering::Relaxed)
        };
        assert_eq!(after(2 * BATCHES_BEFORE_MORE, 30_000), 300_000);
        // One batch that is halved until it fits.
        [30_000, 15_000, 7_500].into_iter().for_each(|rows| limit.lower(rows));
        assert_eq!(after(9 * BATCHES_BEFORE_MORE, 1_800), 3_750, "small batches say nothing");
        assert_eq!(after(BATCHES_BEFORE_MORE - 1, 3_700), 3_750);
        assert_eq!(after(1, 3_700), 7_500, "three halves of one shortage make no longer wait");
        limit.lower(7_500);
        assert_eq!(after(2 * BATCHES_BEFORE_MORE - 1, 3_700), 3_750, "the rise was wrong");
        assert_eq!(after(1, 3_700), 7_500);
        assert_eq!(after(9 * BATCHES_BEFORE_MORE, 32_000), 32_000, "as much as any batch has");
        // After it has held for long, a shortage is the first one again.
        limit.lower(32_000);
        assert_eq!(after(BATCHES_BEFORE_MORE, 16_000), 32_000);
        limit.lower(600);
        assert_eq!(limit.now.load(Ordering::Relaxed), LEAST_LIMIT);
    }

    #[test]
    fn a_cpu_and_float32_have_no_engine() {
        let config = ModelConfig::from_dir(&grail_golden::path("models/qwen2-tied")).unwrap();
        assert!(engine(&config, Device::Cpu, Dtype::Bf16).is_none());
        assert!(engine(&config, Device::Cuda(0), Dtype::F32).is_none());
    }
}
