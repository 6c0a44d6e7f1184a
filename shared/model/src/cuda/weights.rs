//! Weights where they lie on a GPU: their checksums, and some of their elements read and written.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use tch::{Device, Kind, TchError, Tensor};

use super::compile;
use super::ffi::{Argument, Context, Function};
use super::kernels::{Shape, pieces};
use crate::gpu::{self, GpuSupport};

/// Threads of a block, as the source has it.
const THREADS: i64 = 256;
/// Elements that a thread takes before it comes to its next turn.
const ELEMENTS_OF_A_THREAD: i64 = 16;
/// Blocks of one launch: several for each multiprocessor of a large card.
const MOST_BLOCKS: i64 = 4096;

/// Elements over which they are held against libtorch's operations when they are loaded: more than one turn of a block.
const CHECKED: i64 = 100_003;

/// The kernels for 16-bit weights of any shape, on one GPU.
#[derive(Debug)]
pub(crate) struct WeightKernels {
    context: Context,
    device: Device,
    sum_elements: Function,
    sum_differences: Function,
    read_elements: Function,
    write_elements: Function,
    compare_elements: Function,
}

/// Some elements of one tensor, and as many values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Selection<'t> {
    /// Flat, 16 bits wide.
    pub tensor: &'t Tensor,
    /// `[count]`, i32 with the bits of a u32, each once and below the tensor's length: the caller's promise, checked where the file is
    /// opened.
    pub positions: &'t Tensor,
    /// `[count]`, 16 bits wide.
    pub values: &'t Tensor,
}

/// The kernels of a GPU, made at the first call; `None` where libtorch's operations do their work.
pub(crate) fn weight_kernels(device: Device) -> Option<Arc<WeightKernels>> {
    type Known = Vec<(usize, Option<Arc<WeightKernels>>)>;
    static KNOWN: Mutex<Known> = Mutex::new(Vec::new());
    let Device::Cuda(index) = device else { return None };
    if !super::are_wanted() {
        return None;
    }
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, kernels)) = known.iter().find(|(at, _)| *at == index) {
        return kernels.clone();
    }
    let made = WeightKernels::load(index).map(Arc::new).map_err(|reason| {
        tracing::warn!(device = index, reason, "Own kernels for weights are left out; reloads are slower.");
    });
    let kernels = made.ok();
    known.push((index, kernels.clone()));
    kernels
}

impl WeightKernels {
    /// # Errors
    /// Why libtorch's operations have to do.
    pub(super) fn load(device: usize) -> Result<Self, String> {
        let GpuSupport::Loaded { library, .. } = gpu::enable() else {
            return Err("no CUDA library is loaded".to_owned());
        };
        let text = |error: TchError| crate::error::TorchError::from(error).detail;
        let context = Context::of_device(device).map_err(text)?;
        let capability = context.capability().map_err(text)?;
        let libraries = library.parent().unwrap_or(Path::new("."));
        let image = compile::image(libraries, capability, compile::WEIGHTS, &[])?;
        let module = context.load(&image).map_err(text)?;
        let function = |name| module.function(name).map_err(text);
        let kernels = Self {
            sum_elements: function(c"sum_elements")?,
            sum_differences: function(c"sum_differences")?,
            read_elements: function(c"read_elements")?,
            write_elements: function(c"write_elements")?,
            compare_elements: function(c"compare_elements")?,
            device: Device::Cuda(device),
            context,
        };
        if kernels.are_right().map_err(text)? {
            Ok(kernels)
        } else {
            Err("they compute something else here".to_owned())
        }
    }

    /// Whether they compute on this card what libtorch's operations do: a reload that trusts a wrong sum refuses right weights.
    fn are_right(&self) -> Result<bool, TchError> {
        let _guard = tch::no_grad_guard();
        let numbers = |count: i64| Tensor::f_arange(count, (Kind::Int64, self.device));
        let zero = |kind| Tensor::f_zeros([1], (kind, self.device));
        let first_of = |x: &Tensor| x.f_int64_value(&[0]);
        // Bits of all kinds, from an address that no vector begins at.
        let bits = numbers(CHECKED + 1)?.f_mul_scalar_(40_503)?.f_bitwise_and_(0xffff)?.f_to_kind(Kind::Int16)?;
        let x = bits.f_narrow(0, 1, CHECKED)?;
        let wide = |x: &Tensor| x.f_to_kind(Kind::Int64)?.f_bitwise_and_(0xffff);
        let weights = numbers(CHECKED)?.f_mul_scalar_(2)?.f_add_scalar_(1)?;
        let sum_of = |x: &Tensor| wide(x)?.f_mul(&weights)?.f_sum(Kind::Int64)?.f_int64_value(&[]);
        let sum = zero(Kind::Int64)?;
        self.sum_elements(&x, &sum)?;
        let before = sum_of(&x)?;
        if first_of(&sum)? != before {
            return Ok(false);
        }
        let positions = numbers(CHECKED / 3)?.f_mul_scalar_(3)?.f_add_scalar_(1)?;
        let old = x.f_index_select(0, &positions)?;
        let (read, new) = (old.f_zeros_like()?, old.f_bitwise_not()?);
        let positions = positions.f_to_kind(Kind::Int)?;
        let of = |values| Selection { tensor: &x, positions: &positions, values };
        let (unlike, like, difference) = (zero(Kind::Int)?, zero(Kind::Int)?, zero(Kind::Int64)?);
        self.read(of(&read))?;
        self.compare(of(&new), &unlike)?;
        self.write(of(&new))?;
        self.compare(of(&new), &like)?;
        self.sum_differences(&positions, [&old, &new], &difference)?;
        Ok(read.f_equal(&old)?
            && first_of(&unlike)? == 1
            && first_of(&like)? == 0
            && before.wrapping_add(first_of(&difference)?) == sum_of(&x)?)
    }

    /// Adds Σ bits·(2·index + 1) over `x`, flat and 16 bits wide, to `total`, one i64 that wraps.
    pub(crate) fn sum_elements(&self, x: &Tensor, total: &Tensor) -> Result<(), TchError> {
        let count = x.size1()?;
        let arguments = [self.elements(x, count)?, wide(count), self.address(total, &[Kind::Int64], 1)?];
        // SAFETY: `sum_elements(x, count, total)` reads `count` elements and adds to one number, which is what was just checked.
        // JUSTIFICATION: with libtorch's operations a checksum moves thirty times the bytes of the weights.
        unsafe { self.launch(self.sum_elements, count, &arguments) }
    }

    /// Adds Σ (values − before)·(2·position + 1) to `total`; `before` has the elements as they are.
    pub(crate) fn sum_differences(
        &self,
        positions: &Tensor,
        [before, after]: [&Tensor; 2],
        total: &Tensor,
    ) -> Result<(), TchError> {
        let count = positions.size1()?;
        let arguments = [
            self.elements(before, count)?,
            self.elements(after, count)?,
            self.positions(positions, count)?,
            wide(count),
            self.address(total, &[Kind::Int64], 1)?,
        ];
        // SAFETY: `sum_differences(before, after, positions, count, total)` reads `count` of each, which is what was just checked.
        // JUSTIFICATION: as for the sum.
        unsafe { self.launch(self.sum_differences, count, &arguments) }
    }

    /// Elements of `tensor` into `values`.
    pub(crate) fn read(&self, selection: Selection<'_>) -> Result<(), TchError> {
        let (count, [tensor, positions, values]) = self.selection(selection)?;
        // SAFETY: `read_elements(x, positions, count, out)` reads elements that `positions` name and writes `count`; sizes were just
        // checked, and that positions are within the tensor is what `Selection` asks of whoever makes it.
        // JUSTIFICATION: libtorch needs positions twice as wide.
        unsafe { self.launch(self.read_elements, count, &[tensor, positions, wide(count), values]) }
    }

    /// `values` into elements of `tensor`.
    pub(crate) fn write(&self, selection: Selection<'_>) -> Result<(), TchError> {
        let (count, [tensor, positions, values]) = self.selection(selection)?;
        // SAFETY: `write_elements(x, positions, values, count)`, as in `read`; nobody else has the tensor meanwhile: weights are
        // changed through `Frozen::exclusive` only.
        // JUSTIFICATION: proofs wait for it, and libtorch's scatter takes several times as long.
        unsafe { self.launch(self.write_elements, count, &[tensor, positions, values, wide(count)]) }
    }

    /// Sets `differ`, one i32, to 1 if an element of `tensor` is another than its value.
    pub(crate) fn compare(&self, selection: Selection<'_>, differ: &Tensor) -> Result<(), TchError> {
        let (count, [tensor, positions, values]) = self.selection(selection)?;
        let differ = self.address(differ, &[Kind::Int], 1)?;
        // SAFETY: `compare_elements(x, positions, values, count, differ)`, as in `read`.
        // JUSTIFICATION: as for `write`.
        unsafe { self.launch(self.compare_elements, count, &[tensor, positions, values, wide(count), differ]) }
    }

    fn selection(&self, selection: Selection<'_>) -> Result<(i64, [Argument; 3]), TchError> {
        let Selection { tensor, positions, values } = selection;
        let count = positions.size1()?;
        let arguments =
            [self.elements(tensor, tensor.size1()?)?, self.positions(positions, count)?, self.elements(values, count)?];
        Ok((count, arguments))
    }

    fn elements(&self, x: &Tensor, count: i64) -> Result<Argument, TchError> {
        self.address(x, &[Kind::BFloat16, Kind::Half, Kind::Int16], count)
    }

    fn positions(&self, x: &Tensor, count: i64) -> Result<Argument, TchError> {
        self.address(x, &[Kind::Int], count)
    }

    /// The address of a flat tensor that is what a kernel takes it for.
    fn address(&self, x: &Tensor, kinds: &[Kind], count: i64) -> Result<Argument, TchError> {
        let (size, kind) = (x.size(), x.kind());
        if x.device() == self.device && kinds.contains(&kind) && x.is_contiguous() && size == [count] {
            return Ok(Argument::Address(x.data_ptr() as u64));
        }
        let expected = format!("a kernel for {kinds:?} [{count}] on {:?}", self.device);
        Err(TchError::Shape(format!("{expected} got {kind:?} {size:?} on {:?}", x.device())))
    }

    /// # Safety
    /// As [`Function::launch`].
    unsafe fn launch(&self, function: Function, count: i64, arguments: &[Argument]) -> Result<(), TchError> {
        if count == 0 {
            return Ok(());
        }
        self.context.enter()?;
        // SAFETY: the caller's promise; the stream is of the context of the kernel.
        unsafe { function.launch(shape(count), arguments, self.context.stream()?) }
    }
}

/// Blocks and threads for `count` elements.
pub(super) fn shape(count: i64) -> Shape {
    let blocks = pieces(count, THREADS * ELEMENTS_OF_A_THREAD).clamp(1, MOST_BLOCKS);
    let number = |value: i64| u32::try_from(value).unwrap_or(1);
    Shape { blocks: (number(blocks), 1), threads: number(THREADS) }
}

const fn wide(count: i64) -> Argument {
    Argument::Wide(count.cast_unsigned())
}
