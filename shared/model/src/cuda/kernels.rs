//! Launches of the project's own kernels; `cuda/kernels.cu` says what each computes.
//!
//! Every launch checks its tensors first: the kernels believe what they are told.

use std::path::Path;

use tch::{Device, Kind, TchError, Tensor};

use super::compile;
use super::ffi::{Argument, Context, Function, Stream};
use crate::config::{Architecture, ModelConfig};

/// Elements of one vector of the kernels.
const VECTOR: i64 = 8;
const WARP: i64 = 32;
const SILU_THREADS: i64 = 256;
const CHOOSE_THREADS: i64 = 512;
/// Activations whose buckets make a sketch.
pub(crate) const TOP: i64 = grail_protocol::constants::PROOF_TOPK as i64;

/// What the kernels are compiled for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Dimensions {
    pub hidden: i64,
    pub heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
    pub inner: i64,
    pub vocab: i64,
    pub epsilon: f64,
    /// Queries and keys have norms of their own.
    pub has_head_norms: bool,
    /// Gate, up and down have biases.
    pub has_mlp_bias: bool,
}

impl Dimensions {
    /// For tests that need some model.
    #[cfg(test)]
    pub(super) const TINY: Self = Self {
        hidden: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        inner: 128,
        vocab: 512,
        epsilon: 1e-6,
        has_head_norms: false,
        has_mlp_bias: false,
    };

    /// # Errors
    /// Which number of the model the kernels do not support.
    pub(crate) fn of(config: &ModelConfig) -> Result<Self, String> {
        let found = Self {
            hidden: config.hidden_size as i64,
            heads: config.heads as i64,
            kv_heads: config.kv_heads as i64,
            head_dim: config.head_dim as i64,
            inner: config.intermediate_size as i64,
            vocab: config.vocab_size as i64,
            epsilon: config.rms_norm_eps,
            has_head_norms: config.architecture == Architecture::Qwen3,
            has_mlp_bias: config.mlp_bias,
        };
        for (name, value, divisor, most) in [
            ("hidden_size", found.hidden, VECTOR, 16_384),
            ("intermediate_size", found.inner, VECTOR, i64::from(u16::MAX) * SILU_THREADS),
            ("vocab_size", found.vocab, VECTOR, i64::from(i32::MAX)),
            ("head_dim", found.head_dim, VECTOR, 256),
            ("num_key_value_heads", found.kv_heads, 1, WARP),
        ] {
            if value % divisor != 0 || value > most {
                return Err(format!("{name} = {value} is no multiple of {divisor} up to {most}"));
            }
        }
        Ok(found)
    }

    /// What the source is compiled with.
    pub(super) fn macros(&self) -> Vec<String> {
        vec![
            format!("HIDDEN={}", self.hidden),
            format!("HEADS={}", self.heads),
            format!("KV_HEADS={}", self.kv_heads),
            format!("HEAD_DIM={}", self.head_dim),
            format!("INNER={}", self.inner),
            format!("VOCAB={}", self.vocab),
            format!("EPSILON={:e}f", self.epsilon),
            format!("HEAD_NORM={}", i32::from(self.has_head_norms)),
        ]
    }

    /// Columns of the fused projection.
    pub(crate) const fn qkv(&self) -> i64 {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// One block a row.
    fn by_row(rows: i64, width: i64) -> Result<Shape, TchError> {
        Ok(Shape { blocks: (grid(rows)?, 1), threads: threads(width), shared_bytes: 0 })
    }

    pub(super) fn residual_norm(&self, rows: i64) -> Result<Shape, TchError> {
        Self::by_row(rows, (pieces(pieces(self.hidden / VECTOR, 2), WARP) * WARP).min(1024))
    }

    pub(super) fn rotate_queries(&self, rows: i64) -> Result<Shape, TchError> {
        Self::by_row(rows, self.heads.min(4) * WARP)
    }

    pub(super) fn gather_keys(&self, key_rows: i64) -> Result<Shape, TchError> {
        Self::by_row(key_rows, self.kv_heads * WARP)
    }

    pub(super) fn silu_up(&self, rows: i64) -> Result<Shape, TchError> {
        let lines = grid(pieces(self.inner / VECTOR, SILU_THREADS))?;
        Ok(Shape { blocks: (grid(rows)?, lines), threads: threads(SILU_THREADS), shared_bytes: 0 })
    }

    pub(super) fn choose(rows: i64) -> Result<Shape, TchError> {
        Self::by_row(rows, CHOOSE_THREADS)
    }

    /// As many rows to a block as fit its memory.
    pub(super) fn select_buckets(&self, rows: i64) -> Result<Shape, TchError> {
        let warps = (49_152 / (self.hidden * 2 + 64)).min(4);
        Self::by_row(pieces(rows, warps), warps * WARP)
    }
}

/// Blocks and threads of a launch, as the kernels count on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Columns and lines of the grid.
    pub blocks: (u32, u32),
    /// Of one block.
    pub threads: u32,
    /// Dynamic shared memory of one block.
    pub shared_bytes: u32,
}

/// Pieces of `size` that cover `whole`.
pub(super) const fn pieces(whole: i64, size: i64) -> i64 {
    (whole + size - 1) / size
}

fn threads(count: i64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// The compiled kernels of one model shape on one GPU.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub dimensions: Dimensions,
    context: Context,
    device: Device,
    residual_norm: Function,
    rotate_queries: Function,
    gather_keys: Function,
    silu_up: Function,
    choose: Function,
    select_buckets: Function,
}

/// A stream of the kernels' own device, whose context is this thread's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lane(Stream);

impl Lane {
    pub(crate) const fn stream(self) -> Stream {
        self.0
    }
}

/// Cosine and sine by row, `[rows, head_dim]` bf16.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Angles<'a> {
    pub cos: &'a Tensor,
    pub sin: &'a Tensor,
}

impl Kernels {
    /// Compiles the kernels, or takes them from the cache, and loads them.
    ///
    /// # Errors
    /// Why the composition of libtorch's operations has to do.
    pub(crate) fn load(libraries: &Path, device: usize, dimensions: Dimensions) -> Result<Self, String> {
        let text = |error: TchError| crate::error::TorchError::from(error).detail;
        let context = Context::of_device(device).map_err(text)?;
        let capability = context.capability().map_err(text)?;
        if capability.0 < 8 {
            return Err(format!("compute capability {}.{} has no bfloat16: 8.0 is needed", capability.0, capability.1));
        }
        let image = compile::image(libraries, capability, compile::FORWARD, &dimensions.macros())?;
        let module = context.load(&image).map_err(text)?;
        let function = |name| module.function(name).map_err(text);
        Ok(Self {
            residual_norm: function(c"residual_norm")?,
            rotate_queries: function(c"rotate_queries")?,
            gather_keys: function(c"gather_keys")?,
            silu_up: function(c"silu_up")?,
            choose: function(c"choose")?,
            select_buckets: function(c"select_buckets")?,
            device: Device::Cuda(device),
            dimensions,
            context,
        })
    }

    /// Makes this thread's libtorch work on the kernels' GPU, and says where its operations go.
    pub(crate) fn enter(&self) -> Result<Lane, TchError> {
        self.context.enter()?;
        self.context.stream().map(Lane)
    }

    /// `x += addend`, `out = weight · norm(x)`; without `addend` only the norm.
    ///
    /// * `x`, `addend`, `out`: `[rows, hidden]`, `weight`: `[hidden]`, all bf16.
    pub(crate) fn residual_norm(
        &self,
        lane: Lane,
        x: &Tensor,
        addend: Option<&Tensor>,
        weight: &Tensor,
        out: &Tensor,
    ) -> Result<(), TchError> {
        let rows = self.rows(x)?;
        let shape = [rows, self.dimensions.hidden];
        let arguments = [
            self.bf16(x, &shape)?,
            addend.map_or(Ok(Argument::Address(0)), |addend| self.bf16(addend, &shape))?,
            self.bf16(weight, &shape[1..])?,
            self.bf16(out, &shape)?,
        ];
        // SAFETY: `residual_norm(x, addend, weight, out)` reads and writes `rows` rows of `hidden` bf16 values and the weight's,
        // which is what was just checked; libtorch's allocator frees memory in the order of the stream.
        // JUSTIFICATION: one pass over memory instead of seven; the norms are 6 % of a forward pass otherwise.
        unsafe { self.residual_norm.launch(self.dimensions.residual_norm(rows)?, &arguments, lane.0) }
    }

    /// Norm (where there is one) and rotation of the queries of `qkv`, in place.
    ///
    /// * `qkv`: `[rows, heads + 2 · kv_heads, head_dim]`, `weight`: `[head_dim]`, both bf16.
    pub(crate) fn rotate_queries(
        &self,
        lane: Lane,
        qkv: &Tensor,
        angles: Angles<'_>,
        weight: Option<&Tensor>,
    ) -> Result<(), TchError> {
        let rows = self.rows(qkv)?;
        let [cos, sin, weight] = self.angles(angles, rows, weight)?;
        let arguments = [self.bf16(qkv, &[rows, self.dimensions.qkv()])?, cos, sin, weight];
        // SAFETY: `rotate_queries(qkv, cos, sin, weight)` touches `rows` rows of each, which is what was just checked, and the
        // weight only if the kernels were compiled with norms of heads, in which case `angles` made sure that there is one.
        // JUSTIFICATION: rotation by libtorch's operations reads and writes the projection seven times.
        unsafe { self.rotate_queries.launch(self.dimensions.rotate_queries(rows)?, &arguments, lane.0) }
    }

    /// Keys, with norm and rotation, and values of the rows `sources` of `qkv`.
    ///
    /// * `sources`: `[key rows]` i32, each below the rows of `qkv`: the caller's promise, checked where the numbers are made;
    ///   `out`: `[key rows, 2, kv_heads, head_dim]` bf16, keys first.
    pub(crate) fn gather_keys(
        &self,
        lane: Lane,
        qkv: &Tensor,
        sources: &Tensor,
        angles: Angles<'_>,
        weight: Option<&Tensor>,
        out: &Tensor,
    ) -> Result<(), TchError> {
        let (rows, key_rows) = (self.rows(qkv)?, self.rows(sources)?);
        let [cos, sin, weight] = self.angles(angles, rows, weight)?;
        let Dimensions { kv_heads, head_dim, .. } = self.dimensions;
        let arguments = [
            self.bf16(qkv, &[rows, self.dimensions.qkv()])?,
            self.checked(sources, Kind::Int, &[key_rows])?,
            cos,
            sin,
            weight,
            self.bf16(out, &[key_rows, 2, kv_heads, head_dim])?,
        ];
        // SAFETY: `gather_keys(qkv, source, cos, sin, weight, out)` writes `key_rows` rows of `out` and reads rows of the rest that
        // `sources` names; sizes were just checked, and the numbers are those of `Layout`, which bounds them.
        // JUSTIFICATION: as for the queries; libtorch would also gather in two more passes.
        unsafe { self.gather_keys.launch(self.dimensions.gather_keys(key_rows)?, &arguments, lane.0) }
    }

    /// `silu(gate) · up`.
    ///
    /// * `gate_up`: `[rows, 2 · inner]`, `out`: `[rows, inner]`, both bf16.
    pub(crate) fn silu_up(&self, lane: Lane, gate_up: &Tensor, out: &Tensor) -> Result<(), TchError> {
        let (rows, inner) = (self.rows(gate_up)?, self.dimensions.inner);
        let arguments = [self.bf16(gate_up, &[rows, 2 * inner])?, self.bf16(out, &[rows, inner])?];
        // SAFETY: `silu_up(gate_up, out)` touches `rows` rows of both, which is what was just checked.
        // JUSTIFICATION: one pass instead of two over the widest activations.
        unsafe { self.silu_up.launch(self.dimensions.silu_up(rows)?, &arguments, lane.0) }
    }

    /// Log-softmax at the chosen tokens, and the probability of EOS where one is asked for.
    ///
    /// * `logits`: `[rows, vocab]` bf16; `targets`: `[rows]` i32, below the vocabulary; `eos`: `[rows]` i32, the same or −1;
    ///   `logprobs`, `eos_probabilities`: `[rows]` f32. That tokens are below the vocabulary is checked with the request.
    pub(crate) fn choose(
        &self,
        lane: Lane,
        logits: &Tensor,
        [targets, eos]: [&Tensor; 2],
        [logprobs, eos_probabilities]: [&Tensor; 2],
    ) -> Result<(), TchError> {
        let rows = self.rows(logits)?;
        let arguments = [
            self.bf16(logits, &[rows, self.dimensions.vocab])?,
            self.checked(targets, Kind::Int, &[rows])?,
            self.checked(eos, Kind::Int, &[rows])?,
            self.checked(logprobs, Kind::Float, &[rows])?,
            self.checked(eos_probabilities, Kind::Float, &[rows])?,
        ];
        // SAFETY: `choose(logits, targets, eos, logprobs, eos_probabilities)` touches `rows` rows of each, which is what was just
        // checked, at columns that the request's check bounds.
        // JUSTIFICATION: libtorch writes and reads a row of 600 kB in f32 for one number of it.
        unsafe { self.choose.launch(Dimensions::choose(rows)?, &arguments, lane.0) }
    }

    /// Buckets of the largest activations; see the kernel for rows that are not finite.
    ///
    /// * `hidden`: `[rows, hidden]` bf16, `buckets`: `[rows, 16]` i8.
    pub(crate) fn select_buckets(&self, lane: Lane, hidden: &Tensor, buckets: &Tensor) -> Result<(), TchError> {
        let rows = self.rows(hidden)?;
        let arguments = [
            self.bf16(hidden, &[rows, self.dimensions.hidden])?,
            self.checked(buckets, Kind::Int8, &[rows, TOP])?,
            Argument::Int(i32::try_from(rows).map_err(|_| TchError::Shape(format!("{rows} rows")))?),
        ];
        // SAFETY: `select_buckets(hidden, buckets, rows)` touches `rows` rows of both, which is what was just checked.
        // JUSTIFICATION: libtorch's `topk` promises nothing about equal magnitudes, and needs integer keys four times as wide.
        unsafe { self.select_buckets.launch(self.dimensions.select_buckets(rows)?, &arguments, lane.0) }
    }

    fn angles(
        &self,
        Angles { cos, sin }: Angles<'_>,
        rows: i64,
        weight: Option<&Tensor>,
    ) -> Result<[Argument<'static>; 3], TchError> {
        let head_dim = self.dimensions.head_dim;
        let weight = match weight {
            Some(weight) => self.bf16(weight, &[head_dim])?,
            None if self.dimensions.has_head_norms => {
                return Err(TchError::Shape("the norm of heads is missing".into()));
            }
            None => Argument::Address(0),
        };
        Ok([self.bf16(cos, &[rows, head_dim])?, self.bf16(sin, &[rows, head_dim])?, weight])
    }

    fn rows(&self, x: &Tensor) -> Result<i64, TchError> {
        x.size()
            .first()
            .copied()
            .filter(|rows| *rows > 0)
            .ok_or_else(|| TchError::Shape("a tensor without rows".into()))
    }

    fn bf16(&self, x: &Tensor, shape: &[i64]) -> Result<Argument<'static>, TchError> {
        self.checked(x, Kind::BFloat16, shape)
    }

    /// The address of a tensor that is what the kernel takes it for. Shapes are compared by their number of elements in each row:
    /// how the columns are folded does not matter to a kernel.
    fn checked(&self, x: &Tensor, kind: Kind, shape: &[i64]) -> Result<Argument<'static>, TchError> {
        let size = x.size();
        let is_right = x.device() == self.device
            && x.kind() == kind
            && x.is_contiguous()
            && size.first() == shape.first()
            && size.iter().product::<i64>() == shape.iter().product::<i64>();
        let address = x.data_ptr() as u64;
        // Vectors of the kernels are 16 bytes wide, and so are the rows of everything that they load as vectors.
        let is_aligned = kind != Kind::BFloat16 || address.is_multiple_of(16);
        if is_right && is_aligned {
            return Ok(Argument::Address(address));
        }
        Err(TchError::Shape(format!(
            "a kernel for {kind:?} {shape:?} on {:?} got {:?} {size:?} on {:?} at {address:#x}",
            self.device,
            x.kind(),
            x.device()
        )))
    }
}

fn grid(blocks: i64) -> Result<u32, TchError> {
    u32::try_from(blocks).map_err(|_| TchError::Shape(format!("{blocks} rows in one batch")))
}
