//! Weights where they lie on a GPU: their checksums, copies of them, and some of their elements read and written.
//!
//! Each call is one launch over all tensors: beside proofs a launch waits for a product of theirs to end, and a model has hundreds
//! of tensors.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use tch::{Device, Kind, TchError, Tensor};

use super::compile;
use super::ffi::{self, Argument, Context, Function};
use super::kernels::Shape;
use crate::gpu::{self, GpuSupport};

/// Threads of a block, as the source has it.
const THREADS: u32 = 256;
/// Elements of one piece of a table: a few dozen turns of a block.
const PIECE: u64 = 1 << 17;
/// Blocks of one launch: several for each multiprocessor of a large card.
const MOST_BLOCKS: usize = 2048;
/// Elements over which they are held against libtorch's operations when they are loaded: more than one piece.
const CHECKED: i64 = 300_003;

/// The kernels for 16-bit weights of any shape, on one GPU.
#[derive(Debug)]
pub(crate) struct WeightKernels {
    context: Context,
    index: usize,
    sum_elements: Function,
    sum_differences: Function,
    copy_elements: Function,
    read_elements: Function,
    write_elements: Function,
    compare_elements: Function,
}

/// Some elements of one tensor, and as many values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Selection<'t> {
    /// Flat, 16 bits wide.
    pub tensor: &'t Tensor,
    /// `[count]`, i32 with the bits of a u32, each once; those that are not below the tensor's length are left out.
    pub positions: &'t Tensor,
    /// `[count]`, 16 bits wide.
    pub values: &'t Tensor,
}

/// Some elements of one tensor as they are and as they will be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Changed<'t> {
    /// As in [`Selection`].
    pub positions: &'t Tensor,
    /// `[count]`, 16 bits wide.
    pub before: &'t Tensor,
    /// As `before`.
    pub after: &'t Tensor,
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
            copy_elements: function(c"copy_elements")?,
            read_elements: function(c"read_elements")?,
            write_elements: function(c"write_elements")?,
            compare_elements: function(c"compare_elements")?,
            index: device,
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
        let device = Device::Cuda(self.index);
        let numbers = |count: i64| Tensor::f_arange(count, (Kind::Int64, device));
        // Bits of all kinds, from an address that no vector begins at.
        let bits = numbers(CHECKED + 1)?.f_mul_scalar_(40_503)?.f_bitwise_and_(0xffff)?.f_to_kind(Kind::Int16)?;
        let x = bits.f_narrow(0, 1, CHECKED)?;
        let weights = numbers(CHECKED)?.f_mul_scalar_(2)?.f_add_scalar_(1)?;
        let sum_of = |x: &Tensor| {
            let wide = x.f_to_kind(Kind::Int64)?.f_bitwise_and_(0xffff)?;
            wide.f_mul(&weights)?.f_sum(Kind::Int64)?.f_int64_value(&[])
        };
        let (before, copies) = (sum_of(&x)?, [x.f_zeros_like()?, bits.f_zeros_like()?]);
        // One is aligned, the other not.
        let pairs =
            [&x, &bits].map(Tensor::shallow_clone).into_iter().zip(copies.each_ref().map(Tensor::shallow_clone));
        self.copy(&pairs.collect::<Vec<_>>())?;
        let are_copied = copies[0].f_equal(&x)? && copies[1].f_equal(&bits)?;
        if self.sums(&[&x])?.f_int64_value(&[0])? != before || !are_copied {
            return Ok(false);
        }
        let wide_positions = numbers(CHECKED / 3)?.f_mul_scalar_(3)?.f_add_scalar_(1)?;
        let old = x.f_index_select(0, &wide_positions)?;
        let (read, new) = (old.f_zeros_like()?, old.f_bitwise_not()?);
        let positions = wide_positions.f_to_kind(Kind::Int)?;
        let of = |values| [Selection { tensor: &x, positions: &positions, values }];
        self.read(&of(&read))?;
        let is_unlike = self.differ(&of(&new))?.f_int64_value(&[0])? == 1;
        self.write(&of(&new))?;
        let is_like = self.differ(&of(&new))?.f_int64_value(&[0])? == 0;
        let difference = self.differences(&[Changed { positions: &positions, before: &old, after: &new }])?;
        let after = before.wrapping_add(difference.f_int64_value(&[0])?);
        Ok(read.f_equal(&old)? && is_unlike && is_like && after == sum_of(&x)?)
    }

    /// Σ bits·(2·index + 1) of each tensor, flat and 16 bits wide: `[tensors]`, i64 that wrap.
    pub(crate) fn sums(&self, tensors: &[&Tensor]) -> Result<Tensor, TchError> {
        let table = stretches(tensors, |x, width| self.address(x, width))?;
        let sums = self.zeros(tensors.len(), Kind::Int64)?;
        // SAFETY: `sum_elements(pieces, count, totals)` reads what the table names, whose tensors were just checked and live until the
        // stream has passed (libtorch frees memory in its order), and adds to as many totals as there are tensors.
        // JUSTIFICATION: with libtorch's operations a checksum moves thirty times the bytes of the weights.
        unsafe { self.launch(self.sum_elements, &table, Some(&sums))? };
        Ok(sums)
    }

    /// Σ (after − before)·(2·position + 1) of each, `[changed]`, i64 that wrap.
    pub(crate) fn differences(&self, changed: &[Changed<'_>]) -> Result<Tensor, TchError> {
        let table = changes(changed, |x, width| self.address(x, width))?;
        let sums = self.zeros(changed.len(), Kind::Int64)?;
        // SAFETY: `sum_differences(pieces, count, totals)`, as in `sums`.
        // JUSTIFICATION: as for the sums.
        unsafe { self.launch(self.sum_differences, &table, Some(&sums))? };
        Ok(sums)
    }

    /// Copies flat tensors of 16-bit elements.
    pub(crate) fn copy(&self, pairs: &[(Tensor, Tensor)]) -> Result<(), TchError> {
        let table = moves(pairs, |x, width| self.address(x, width))?;
        // SAFETY: `copy_elements(pieces, count)` reads and writes what the table names: tensors of equal size, just checked. Nobody
        // reads those that are written: the caller made them.
        // JUSTIFICATION: a copy of each tensor by itself waits for as many products of the proofs.
        unsafe { self.launch(self.copy_elements, &table, None) }
    }

    /// Elements of tensors into `values`.
    pub(crate) fn read(&self, selections: &[Selection<'_>]) -> Result<(), TchError> {
        let table = selected(selections, |x, width| self.address(x, width))?;
        // SAFETY: `read_elements(pieces, count)` reads the elements that positions name, if they are within the tensor's length, and
        // writes as many values; sizes were just checked.
        // JUSTIFICATION: libtorch needs positions twice as wide.
        unsafe { self.launch(self.read_elements, &table, None) }
    }

    /// `values` into elements of tensors.
    pub(crate) fn write(&self, selections: &[Selection<'_>]) -> Result<(), TchError> {
        let table = selected(selections, |x, width| self.address(x, width))?;
        // SAFETY: `write_elements(pieces, count)`, as in `read`; nobody else has the tensors meanwhile: weights are changed through
        // `Frozen::exclusive` only.
        // JUSTIFICATION: proofs wait for it, and libtorch's scatter takes several times as long.
        unsafe { self.launch(self.write_elements, &table, None) }
    }

    /// Whether an element of a tensor is another than its value: `[1]`, i32, 0 or 1.
    pub(crate) fn differ(&self, selections: &[Selection<'_>]) -> Result<Tensor, TchError> {
        let table = selected(selections, |x, width| self.address(x, width))?;
        let differ = self.zeros(1, Kind::Int)?;
        // SAFETY: `compare_elements(pieces, count, differ)`, as in `read`; it writes one number.
        // JUSTIFICATION: as for `write`.
        unsafe { self.launch(self.compare_elements, &table, Some(&differ))? };
        Ok(differ)
    }

    fn zeros(&self, count: usize, kind: Kind) -> Result<Tensor, TchError> {
        Tensor::f_zeros([count as i64], (kind, Device::Cuda(self.index)))
    }

    /// The address of a flat tensor that is what a kernel takes it for.
    fn address(&self, x: &Tensor, width: Width) -> Result<u64, TchError> {
        let (kind, device) = (x.kind(), Device::Cuda(self.index));
        if x.device() == device && width.is_of(kind) && x.is_contiguous() && x.dim() == 1 {
            return Ok(x.data_ptr() as u64);
        }
        let shape = x.size();
        Err(TchError::Shape(format!(
            "a kernel for flat {width:?} on {device:?} got {kind:?} {shape:?} on {:?}",
            x.device()
        )))
    }

    /// # Safety
    /// As [`Function::launch`], for a kernel that takes a table, its number of rows, and an address if there is a `result`.
    unsafe fn launch(&self, function: Function, table: &Table, result: Option<&Tensor>) -> Result<(), TchError> {
        if table.rows == 0 {
            return Ok(());
        }
        self.context.enter()?;
        let uploaded = ffi::upload(&table.halves(), self.index)?;
        let mut arguments = vec![Argument::Address(uploaded.data_ptr() as u64), Argument::Wide(table.rows as u64)];
        arguments.extend(result.map(|result| Argument::Address(result.data_ptr() as u64)));
        // SAFETY: the caller's promise; the table is freed in the order of the stream, which is of the context of the kernel.
        unsafe { function.launch(shape(table.rows), &arguments, self.context.stream()?) }
    }
}

/// What a kernel takes a tensor's elements for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Width {
    Elements,
    Positions,
}

impl Width {
    fn is_of(self, kind: Kind) -> bool {
        match self {
            Self::Elements => matches!(kind, Kind::BFloat16 | Kind::Half | Kind::Int16),
            Self::Positions => kind == Kind::Int,
        }
    }

    const fn bytes(self) -> u64 {
        match self {
            Self::Elements => 2,
            Self::Positions => 4,
        }
    }

    /// Where an element of what lies at `start` is.
    const fn at(self, start: u64, element: u64) -> u64 {
        start + self.bytes() * element
    }
}

/// Rows of 64-bit numbers, as the source's structures have them.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub numbers: Vec<u64>,
    pub rows: usize,
}

impl Table {
    /// Adds a row for each piece of `count` elements; `row` makes it of the piece's first element and length.
    fn push<const WIDTH: usize>(&mut self, count: u64, row: impl Fn(u64, u64) -> [u64; WIDTH]) {
        let mut first = 0;
        while first < count {
            let length = PIECE.min(count - first);
            self.numbers.extend(row(first, length));
            self.rows += 1;
            first += length;
        }
    }

    /// Low and high halves of the numbers.
    fn halves(&self) -> Vec<i32> {
        let half = |number: u64| (number & 0xffff_ffff) as u32;
        self.numbers.iter().flat_map(|number| [half(*number), half(*number >> 32)].map(u32::cast_signed)).collect()
    }
}

/// Rows for `sum_elements`; `address` says where a tensor lies, if it is what it should be.
pub(super) fn stretches(
    tensors: &[&Tensor],
    address: impl Fn(&Tensor, Width) -> Result<u64, TchError>,
) -> Result<Table, TchError> {
    let mut table = Table::default();
    for (x, total) in tensors.iter().zip(0..) {
        let start = address(x, Width::Elements)?;
        table.push(x.numel() as u64, |first, count| [Width::Elements.at(start, first), first, count, total]);
    }
    Ok(table)
}

/// Rows for `copy_elements`.
pub(super) fn moves(
    pairs: &[(Tensor, Tensor)],
    address: impl Fn(&Tensor, Width) -> Result<u64, TchError>,
) -> Result<Table, TchError> {
    let mut table = Table::default();
    for (from, to) in pairs {
        let count = same_count([from, to])?;
        let (from, to) = (address(from, Width::Elements)?, address(to, Width::Elements)?);
        let at = |start, first| Width::Elements.at(start, first);
        table.push(count, |first, count| [at(from, first), at(to, first), count]);
    }
    Ok(table)
}

/// Rows for the kernels over some elements of tensors.
pub(super) fn selected(
    selections: &[Selection<'_>],
    address: impl Fn(&Tensor, Width) -> Result<u64, TchError>,
) -> Result<Table, TchError> {
    let mut table = Table::default();
    for Selection { tensor, positions, values } in selections {
        let count = same_count([positions, values])?;
        let (tensor, length) = (address(tensor, Width::Elements)?, tensor.numel() as u64);
        let (positions, values) = (address(positions, Width::Positions)?, address(values, Width::Elements)?);
        table.push(count, |first, count| {
            [tensor, Width::Positions.at(positions, first), Width::Elements.at(values, first), count, length]
        });
    }
    Ok(table)
}

/// Rows for `sum_differences`.
pub(super) fn changes(
    changed: &[Changed<'_>],
    address: impl Fn(&Tensor, Width) -> Result<u64, TchError>,
) -> Result<Table, TchError> {
    let mut table = Table::default();
    for (Changed { positions, before, after }, total) in changed.iter().zip(0..) {
        let count = same_count([positions, before])?.min(same_count([before, after])?);
        let positions = address(positions, Width::Positions)?;
        let [before, after] = [address(before, Width::Elements)?, address(after, Width::Elements)?];
        let at = |start, first| Width::Elements.at(start, first);
        table.push(count, |first, count| {
            [at(before, first), at(after, first), Width::Positions.at(positions, first), count, total]
        });
    }
    Ok(table)
}

fn same_count([x, y]: [&Tensor; 2]) -> Result<u64, TchError> {
    let (count, other) = (x.numel() as u64, y.numel() as u64);
    if count == other {
        Ok(count)
    } else {
        Err(TchError::Shape(format!("a kernel got {count} elements and {other} for them")))
    }
}

/// Blocks and threads for a table.
pub(super) fn shape(rows: usize) -> Shape {
    Shape { blocks: (u32::try_from(rows.clamp(1, MOST_BLOCKS)).unwrap_or(1), 1), threads: THREADS, shared_bytes: 0 }
}
