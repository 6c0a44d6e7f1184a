//! Attention of packed sequences by the project's own kernel for Hopper; `cuda/attend.cu` says how it works.

use std::path::Path;

use tch::{Device, Kind, TchError, Tensor};

use super::attention::{self, Attention};
use super::compile;
use super::ffi::{self, Argument, Context, Function, Mapped, TensorMap, VarlenKernel};
use super::kernels::{Dimensions, Lane, Shape};
use super::layout::{Layout, Predictions};
use super::tiles::{TILE_KEYS, TILE_ROWS, Tiling};
use super::trial::{self, Apart, CAPABILITY, scattered};
use crate::attention::HeadShape;
use crate::packed::PackedBatch;
use grail_protocol::ids::TokenId;

const HEAD_DIM: i64 = 128;
/// Columns of a box: what the swizzle spans.
const BOX_COLUMNS: u32 = 64;
/// Threads of a block, and its shared memory: `THREADS` and `SHARED_BYTES` of the source, which compares them.
const THREADS: u32 = 384;
const SHARED_BYTES: u32 = 197_728;
/// What the trial allows for rounding, for values up to 1.7.
const MOST_APART: f64 = 2e-2;

/// The kernel for one model's heads on one GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hopper {
    function: Function,
    device: usize,
    heads: i64,
    pub(super) tiling: Tiling,
}

impl Hopper {
    /// The kernel, compiled and held against libtorch's `flash`, or `None` where it is not meant to be: on other cards and for other
    /// heads than those of 128.
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
        if context.capability().map_err(text)? != CAPABILITY || dimensions.head_dim != HEAD_DIM {
            return Ok(None);
        }
        let tiling = tiling(dimensions, context.multiprocessors().map_err(text)?)?;
        let macros = [("HEADS", dimensions.heads), ("KV_HEADS", dimensions.kv_heads), ("HEAD_DIM", HEAD_DIM)]
            .map(|(name, value)| format!("{name}={value}"));
        let function = trial::load(&context, libraries, (compile::ATTEND, &macros), c"attend", SHARED_BYTES)?;
        let own = Self { function, device, heads: dimensions.heads, tiling };
        own.apart_from_flash(lane).map_err(text)?.accept(own, MOST_APART)
    }

    /// What all layers of a batch need for their attention.
    ///
    /// * `qkv`: `[rows, (heads + 2 · kv_heads) · 128]`, `keys_values`: `[key rows, 2, kv_heads, 128]`, both bf16; every layer has its own
    ///   in their place.
    ///
    /// # Errors
    /// They are not, or the driver refuses them.
    pub(crate) fn prepare(
        &self,
        qkv: &Tensor,
        keys_values: &Tensor,
        layout: &Layout,
    ) -> Result<PreparedAttention, TchError> {
        let Self { heads, device, tiling: Tiling { group, queries, kv_heads, .. }, .. } = *self;
        let ([rows, key_rows], kv_heads) = ([layout.rows(), layout.key_rows()], i64::from(kv_heads));
        let (all_heads, row_bytes) = (heads + 2 * kv_heads, HEAD_DIM * 2);
        for (x, elements) in [(qkv, rows * all_heads * HEAD_DIM), (keys_values, key_rows * 2 * kv_heads * HEAD_DIM)] {
            let is_right = x.device() == Device::Cuda(device)
                && x.kind() == Kind::BFloat16
                && x.is_contiguous()
                && x.numel() as i64 == elements
                && (1..=key_rows).contains(&rows);
            if !is_right {
                let (kind, size, device) = (x.kind(), x.size(), x.device());
                return Err(TchError::Shape(format!(
                    "attention of {rows} rows over {key_rows} got {kind:?} {size:?} on {device:?}"
                )));
            }
        }
        let map = |x: &Tensor, sizes: [i64; 3], boxes| {
            let strides = [row_bytes, x.numel() as i64 / sizes[2] * 2].map(i64::cast_unsigned);
            TensorMap::of(&Mapped {
                address: x.data_ptr() as u64,
                sizes: sizes.map(i64::cast_unsigned),
                strides,
                boxes,
            })
        };
        Ok(PreparedAttention {
            own: *self,
            queries: map(qkv, [HEAD_DIM, heads, rows], [BOX_COLUMNS, group, queries])?,
            keys_values: map(keys_values, [HEAD_DIM, 2 * kv_heads, key_rows], [BOX_COLUMNS, 1, TILE_KEYS])?,
            work: layout.work()?,
            out: Tensor::f_empty([rows, heads * HEAD_DIM], (Kind::BFloat16, Device::Cuda(device)))?,
            _read: [qkv.shallow_clone(), keys_values.shallow_clone()],
        })
    }

    /// How far the kernel's results are from flash attention's, over lengths around the borders of tiles.
    fn apart_from_flash(&self, lane: Lane) -> Result<Apart, TchError> {
        let batch = trial(self.tiling);
        let layout = Layout::new(&batch, &Predictions::default(), Attention::Hopper(*self), |numbers| {
            ffi::upload(numbers, self.device)
        })?;
        let shape = HeadShape { heads: self.heads, kv_heads: i64::from(self.tiling.kv_heads), head_dim: HEAD_DIM };
        let all_heads = shape.heads + 2 * shape.kv_heads;
        let qkv = scattered(&[batch.len() as i64, all_heads, HEAD_DIM])?.f_to_device(Device::Cuda(self.device))?;
        let part = |first, count| qkv.f_narrow(1, first, count);
        let keys_values = part(shape.heads, 2 * shape.kv_heads)?
            .f_reshape([-1, 2, shape.kv_heads, HEAD_DIM])?
            .f_index_select(0, &layout.key_sources()?)?;
        let theirs = attention::attend(VarlenKernel::Flash, &part(0, shape.heads)?, &keys_values, &layout, shape)?;
        let prepared = self.prepare(&qkv, &keys_values, &layout)?;
        // What is not written is then not a number.
        let mut out = prepared.out.shallow_clone();
        drop(out.f_fill_(f64::NAN)?);
        prepared.attend(lane)?;
        Apart::of(&out, &theirs)
    }
}

/// Tiles for a model's heads on a GPU of so many multiprocessors.
///
/// # Errors
/// Which heads the kernel does not support.
fn tiling(Dimensions { heads, kv_heads, .. }: &Dimensions, multiprocessors: i32) -> Result<Tiling, String> {
    let group = heads / kv_heads.max(&1);
    match (u32::try_from(group), u32::try_from(*kv_heads), u32::try_from(multiprocessors)) {
        // Where no head shares its keys the compiler lets no two products be in flight: slow, and no model here is so.
        (Ok(group @ 2..=TILE_ROWS), Ok(kv_heads @ 1..=255), Ok(blocks @ 1..)) if heads % i64::from(kv_heads) == 0 => {
            Ok(Tiling { group, queries: TILE_ROWS / group, kv_heads, blocks })
        }
        _ => Err(format!("{heads} heads over {kv_heads} of keys, on {multiprocessors} multiprocessors")),
    }
}

/// A prompt that is continued and sequences of their own, with lengths around the borders of tiles.
fn trial(tiling: Tiling) -> PackedBatch {
    let queries = tiling.queries as usize;
    let tokens = [TokenId(0); 400];
    let mut batch = PackedBatch::new();
    let mut push = |prefix, length: usize| {
        let tokens = tokens.get(..length).unwrap_or(&tokens);
        match prefix {
            Some(prefix) => batch.push_continuation(prefix, tokens),
            None => batch.push_sequence(tokens),
        }
    };
    let prompt = push(None, 130);
    for length in [1, 62, 63, 126, 127, 200, 390] {
        push(Some(prompt), length);
    }
    for length in [queries.saturating_sub(1).max(1), queries, queries + 1, 63, 65, 127, 128, 129, 1] {
        push(None, length);
    }
    batch
}

/// A batch's attention: the same for each of its layers, whose queries, keys and values take each other's place.
#[derive(Debug)]
pub(crate) struct PreparedAttention {
    own: Hopper,
    queries: TensorMap,
    keys_values: TensorMap,
    /// Starts and tiles, i32.
    work: [Tensor; 2],
    out: Tensor,
    /// What the maps show.
    _read: [Tensor; 2],
}

impl PreparedAttention {
    /// Attends. The result, `[rows, heads · 128]` bf16, is the next call's, too.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn attend(&self, lane: Lane) -> Result<&Tensor, TchError> {
        let [starts, tiles] = self.work.each_ref().map(|numbers| numbers.data_ptr() as u64);
        let out = self.out.data_ptr() as u64;
        // A tile is read as one piece, and so are eight results written.
        if !tiles.is_multiple_of(16) || !out.is_multiple_of(16) {
            return Err(TchError::Shape(format!("tiles at {tiles:#x} and results at {out:#x}")));
        }
        let shape = Shape { blocks: (self.own.tiling.blocks, 1), threads: THREADS, shared_bytes: SHARED_BYTES };
        let arguments = [
            Argument::Map(&self.queries),
            Argument::Map(&self.keys_values),
            Argument::Address(starts),
            Argument::Address(tiles),
            Argument::Address(out),
        ];
        // SAFETY: `attend(queries, keys_values, starts, tiles, out)` reads through the maps, which end where their tensors do, and
        // as many starts as there are blocks and one more; tiles and the rows of `out` that they name are those of the layout that
        // the tensors' sizes were checked against. All of it lives as long as `self`, and libtorch's allocator frees memory in the
        // order of the stream.
        // JUSTIFICATION: at 28 heads and 23,341 rows 0.38 ms on an H100, where libtorch's flash attention takes 1.12.
        unsafe { self.own.function.launch(shape, &arguments, lane.stream()) }?;
        Ok(&self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dimensions(heads: i64, kv_heads: i64) -> Dimensions {
        Dimensions { heads, kv_heads, head_dim: HEAD_DIM, ..Dimensions::TINY }
    }

    #[test]
    fn a_tile_holds_whole_groups_of_heads() {
        let tiles =
            |heads, kv_heads| tiling(&dimensions(heads, kv_heads), 132).map(|tiling| (tiling.group, tiling.queries));
        assert_eq!(tiles(28, 4), Ok((7, 18)));
        assert_eq!(tiles(12, 2), Ok((6, 21)));
        assert_eq!(tiles(32, 8), Ok((4, 32)));
        assert_eq!(tiles(64, 1), Ok((64, 2)));
        for (heads, kv_heads) in [(28, 3), (129, 1), (8, 8), (0, 1), (4, 0)] {
            assert!(tiles(heads, kv_heads).is_err(), "{heads} over {kv_heads}");
        }
    }
}
