//! The feed-forward's first half by the project's own kernel for Hopper; `cuda/gate_up_silu.cu` says how it works.

use std::path::Path;

use tch::{Device, Kind, TchError, Tensor};

use super::compile;
use super::ffi::{Argument, Context, Function, Mapped, TensorMap};
use super::kernels::{Dimensions, Lane, Shape};
use super::trial::{self, Apart, CAPABILITY, scattered};

/// Threads of a block, and its shared memory: `THREADS` and `SHARED_BYTES` of the source, which compares them.
const THREADS: u32 = 384;
const SHARED_BYTES: u32 = 229_440;
/// Blocks that share their weights: the grid is a multiple of it.
const CLUSTER: u32 = 2;
/// What the source asks of a model: it works on 64 columns of the hidden state at a time and needs nine of these, and on 128 of the
/// inner one.
const HIDDEN_STEP: i64 = 64;
const LEAST_HIDDEN: i64 = 9 * HIDDEN_STEP;
const INNER_STEP: i64 = 128;
/// Boxes, columns and rows: what is fetched of a matrix at a time, and what is stored.
const FETCHED: [u32; 2] = [64, 128];
const STORED: [u32; 2] = [64, 64];
/// Rows of the trial: some tiles and a part of one.
const TRIAL_ROWS: i64 = 300;
/// What the trial allows for rounding. The kernel's bits are libtorch's own on an H100; were its product to add in another order, a gate
/// of four might round to the other side, times an up of four.
const MOST_APART: f64 = 0.25;
/// Elements after which the trial's weights repeat: a prime, so that no two rows are the same.
const TRIAL_PERIOD: i64 = 1_000_003;

/// How a pass computes the feed-forward's first half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FeedForward {
    /// Gate and up are never written.
    InOne,
    /// A product, and the activation behind it.
    InTwo,
}

impl FeedForward {
    /// By the kernel, if there is one.
    pub(super) const fn by(kernel: Option<GateUp>) -> Self {
        if kernel.is_some() { Self::InOne } else { Self::InTwo }
    }

    /// Columns of gate and up that are written, for `inner` of each.
    pub(super) const fn written(self, inner: i64) -> i64 {
        match self {
            Self::InOne => 0,
            Self::InTwo => 2 * inner,
        }
    }
}

/// The kernel for one model's sizes on one GPU.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GateUp {
    function: Function,
    device: usize,
    hidden: i64,
    inner: i64,
    blocks: u32,
}

impl GateUp {
    /// The kernel, compiled and held against libtorch's operations, or `None` where it is not meant to be: on other cards, for a model
    /// with biases and for sizes that its tiles do not divide.
    ///
    /// # Errors
    /// Why the kernel cannot be used.
    pub(super) fn start(
        libraries: &Path,
        device: usize,
        dimensions: &Dimensions,
        lane: Lane,
    ) -> Result<Option<Self>, String> {
        let text = |error: TchError| crate::error::TorchError::from(error).detail;
        let context = Context::of_device(device).map_err(text)?;
        let Dimensions { hidden, inner, has_mlp_bias, .. } = *dimensions;
        if has_mlp_bias || context.capability().map_err(text)? != CAPABILITY || !fits(hidden, inner) {
            return Ok(None);
        }
        let multiprocessors = context.multiprocessors().map_err(text)?;
        let blocks = u32::try_from(multiprocessors).unwrap_or_default() / CLUSTER * CLUSTER;
        if blocks == 0 {
            return Err(format!("{multiprocessors} multiprocessors"));
        }
        let macros = [format!("HIDDEN={hidden}"), format!("INNER={inner}")];
        let source = (compile::GATE_UP_SILU, macros.as_slice());
        let function = trial::load(&context, libraries, source, c"gate_up_silu", SHARED_BYTES)?;
        let own = Self { function, device, hidden, inner, blocks };
        own.apart_from_libtorch(lane).map_err(text)?.accept(own, MOST_APART)
    }

    /// `out = silu(gate) · up`, where `gate | up = x · weightᵀ`, all of it rounded to bf16.
    ///
    /// * `x`: `[rows, hidden]`, `weight`: `[2 · inner, hidden]`, the gate's rows first, `out`: `[rows, inner]`, all bf16.
    ///
    /// # Errors
    /// They are not, or the driver refuses them.
    pub(crate) fn launch(&self, lane: Lane, x: &Tensor, weight: &Tensor, out: &Tensor) -> Result<(), TchError> {
        let rows = x.size().first().copied().unwrap_or_default();
        let x = self.map(x, [rows, self.hidden], FETCHED)?;
        let weight = self.map(weight, [2 * self.inner, self.hidden], FETCHED)?;
        let out = self.map(out, [rows, self.inner], STORED)?;
        let rows = i32::try_from(rows).map_err(|_| TchError::Shape(format!("{rows} rows in one batch")))?;
        let shape = Shape { blocks: (self.blocks, 1), threads: THREADS, shared_bytes: SHARED_BYTES };
        let arguments = [Argument::Map(&x), Argument::Map(&weight), Argument::Map(&out), Argument::Int(rows)];
        // SAFETY: `gate_up_silu(x, weight, out, rows)` reads and writes through the maps, which end where their tensors do, and the
        // tensors are of the sizes that it was compiled for. libtorch's allocator frees memory in the order of the stream.
        // JUSTIFICATION: gate and up are two thirds of what a layer writes; without them the first half of a feed-forward takes 0.89 of
        // the time of product and activation at 7B on an H100, and 0.81 at 1.5B.
        unsafe { self.function.launch(shape, &arguments, lane.stream()) }
    }

    /// A map of `x` if it is a matrix of that shape, contiguous, in bf16, on this GPU.
    fn map(&self, x: &Tensor, shape: [i64; 2], boxes: [u32; 2]) -> Result<TensorMap, TchError> {
        let (size, kind, device) = (x.size(), x.kind(), x.device());
        let is_right = size == shape
            && shape.iter().all(|length| *length > 0)
            && kind == Kind::BFloat16
            && device == Device::Cuda(self.device)
            && x.is_contiguous();
        if !is_right {
            return Err(TchError::Shape(format!("gate and up of {shape:?} got {kind:?} {size:?} on {device:?}")));
        }
        let [rows, columns] = shape.map(i64::cast_unsigned);
        TensorMap::of(&Mapped { address: x.data_ptr() as u64, sizes: [columns, rows], strides: [columns * 2], boxes })
    }

    /// How far the kernel's results are from libtorch's.
    fn apart_from_libtorch(&self, lane: Lane) -> Result<Apart, TchError> {
        let device = Device::Cuda(self.device);
        // Behind the sequence of the weights: rows of x that are rows of the weights would have gates of √hidden.
        let elements = 2 * self.inner * self.hidden;
        let x = scattered(&[TRIAL_PERIOD + TRIAL_ROWS * self.hidden])?.f_narrow(
            0,
            TRIAL_PERIOD,
            TRIAL_ROWS * self.hidden,
        )?;
        let x = x.f_view([TRIAL_ROWS, self.hidden])?.f_to_device(device)?;
        // Gates of variance one.
        let part = scattered(&[TRIAL_PERIOD.min(elements)])?.f_mul_scalar((self.hidden as f64).powf(-0.5))?;
        let repeated = part.f_to_device(device)?.f_repeat([elements / TRIAL_PERIOD + 1])?;
        let weight = repeated.f_narrow(0, 0, elements)?.f_view([2 * self.inner, self.hidden])?;
        let gate_up = x.f_mm(&weight.f_tr()?)?;
        let theirs =
            gate_up.f_narrow(1, 0, self.inner)?.f_silu()?.f_mul(&gate_up.f_narrow(1, self.inner, self.inner)?)?;
        // What is not written is then not a number.
        let out = Tensor::f_full([TRIAL_ROWS, self.inner], f64::NAN, (Kind::BFloat16, device))?;
        self.launch(lane, &x, &weight, &out)?;
        Apart::of(&out, &theirs)
    }
}

/// Whether the kernel's tiles divide a model's sizes.
const fn fits(hidden: i64, inner: i64) -> bool {
    hidden % HIDDEN_STEP == 0 && hidden >= LEAST_HIDDEN && inner % INNER_STEP == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_real_models_are_divided_by_its_tiles() {
        for (hidden, inner) in
            [(896, 4_864), (1_536, 8_960), (2_048, 11_008), (2_560, 9_728), (3_584, 18_944), (4_096, 14_336)]
        {
            assert!(fits(hidden, inner), "{hidden}, {inner}");
        }
        for (hidden, inner) in [(192, 640), (512, 1_024), (1_096, 2_048), (1_536, 8_992)] {
            assert!(!fits(hidden, inner), "{hidden}, {inner}");
        }
    }
}
