//! One packed batch on the GPU: everything is ordered at once, and the results are fetched when they are there.

use std::sync::PoisonError;

use grail_protocol::constants::PROOF_TOPK;
use tch::{Device, Kind, TchError, Tensor};

use super::Engine;
use super::attention::{self, Attention};
use super::ffi::{self, Event};
use super::gate_up::GateUp;
use super::hopper::PreparedAttention;
use super::kernels::{Angles, Kernels, Lane, TOP};
use super::layout::{Layout, Predictions};
use super::workspace::{Buffers, Workspace};
use crate::attention::{AttentionPlan, HeadShape};
use crate::layers::{Layer, Linear, Network};
use crate::packed::PackedBatch;
use crate::stages::{Stage, stage};

/// What a batch's rows say.
#[derive(Debug)]
pub(crate) struct BatchOutput {
    /// By row of the batch; [`BatchOutput::is_finite`] says whether they are buckets.
    pub buckets: Vec<[i8; PROOF_TOPK]>,
    /// By prediction.
    pub logprobs: Vec<f32>,
    /// By prediction; without meaning where none was asked for.
    pub eos_probabilities: Vec<f32>,
}

/// What the selection writes for a row with NaN or infinity.
const NOT_FINITE: i8 = i8::MIN;

impl BatchOutput {
    /// Whether the hidden state of `row` has neither NaN nor infinity.
    pub(crate) fn is_finite(&self, row: usize) -> bool {
        self.buckets.get(row).is_some_and(|buckets| buckets.first() != Some(&NOT_FINITE))
    }
}

/// A batch that the GPU computes.
#[derive(Debug)]
pub(crate) struct Launched {
    passed: Event,
    /// Pinned memory that the device writes before `passed`: buckets, logprobs, EOS probabilities.
    results: Tensor,
    rows: usize,
    predictions: usize,
}

impl Launched {
    /// Whether [`Launched::finish`] will not wait.
    pub(crate) fn is_done(&self) -> bool {
        self.passed.is_passed()
    }

    /// Waits for the results.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub(crate) fn finish(self) -> Result<BatchOutput, TchError> {
        stage(Stage::ReadBack, || {
            self.passed.wait()?;
            let mut bytes = vec![0_u8; self.results.numel()];
            let count = bytes.len();
            self.results.f_copy_data(&mut bytes, count)?;
            let (buckets, numbers) = bytes.split_at(self.rows * PROOF_TOPK);
            let (logprobs, eos) = numbers.split_at(self.predictions * size_of::<f32>());
            let floats = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            let signed = |row: &[u8; PROOF_TOPK]| row.map(u8::cast_signed);
            Ok(BatchOutput {
                buckets: buckets.as_chunks().0.iter().map(signed).collect(),
                logprobs: floats(logprobs),
                eos_probabilities: floats(eos),
            })
        })
    }
}

impl Engine {
    /// Orders a batch. `also` may read the hidden states `[rows, hidden]` before the next batch takes their place.
    ///
    /// # Errors
    /// libtorch's; nothing is under way then that anybody would read.
    pub(crate) fn launch<T>(
        &self,
        network: &Network,
        batch: &PackedBatch,
        predictions: &Predictions,
        also: impl FnOnce(&Tensor) -> Result<T, TchError>,
    ) -> Result<(Launched, T), TchError> {
        let lane = self.kernels.enter()?;
        let device = Device::Cuda(self.device);
        let layout = stage(Stage::Upload, || {
            Layout::new(batch, predictions, self.attention, |numbers| ffi::upload(numbers, self.device))
        })?;
        let (rows, count) = (batch.len(), predictions.rows.len());
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        workspace.reserve(&self.kernels.dimensions, (rows as i64, layout.key_rows(), count as i64), device)?;
        let hidden = Pass::new(self, network, batch, &layout, lane, &workspace)?.hidden()?;
        let results = Results::new(rows, count, device)?;
        stage(Stage::Sketch, || self.kernels.select_buckets(lane, &hidden, &results.buckets))?;
        Head { kernels: &self.kernels, network, layout: &layout, lane, workspace: &workspace, results: &results }
            .read(&hidden, count)?;
        let also = also(&hidden)?;
        let on_host = stage(Stage::ReadBack, || results.all.f_internal_to_copy((Kind::Uint8, Device::Cpu), true))?;
        let launched = Launched { passed: Event::record(lane.stream())?, results: on_host, rows, predictions: count };
        Ok((launched, also))
    }
}

/// Where a batch's results are written: one piece of memory, so that one copy fetches them.
struct Results {
    all: Tensor,
    /// `[rows, 16]`, i8
    buckets: Tensor,
    /// `[predictions]`, f32
    logprobs: Tensor,
    /// `[predictions]`, f32
    eos_probabilities: Tensor,
}

impl Results {
    fn new(rows: usize, predictions: usize, device: Device) -> Result<Self, TchError> {
        let (buckets, floats) = (rows as i64 * TOP, (predictions * size_of::<f32>()) as i64);
        let all = Tensor::f_empty([buckets + 2 * floats], (Kind::Uint8, device))?;
        let part = |first, length, kind| all.f_narrow(0, first, length)?.f_view_dtype(kind);
        Ok(Self {
            buckets: part(0, buckets, Kind::Int8)?.f_view([rows as i64, TOP])?,
            logprobs: part(buckets, floats, Kind::Float)?,
            eos_probabilities: part(buckets + floats, floats, Kind::Float)?,
            all,
        })
    }
}

/// How one batch attends.
enum Way<'a> {
    Hopper(Box<PreparedAttention>),
    Varlen(ffi::VarlenKernel),
    PerSequence(AttentionPlan<'a>),
}

/// The layers of one batch.
struct Pass<'a> {
    kernels: &'a Kernels,
    gate_up: Option<GateUp>,
    network: &'a Network,
    layout: &'a Layout,
    lane: Lane,
    buffers: Buffers,
    way: Way<'a>,
    key_sources: Tensor,
    cos: Tensor,
    sin: Tensor,
    shape: HeadShape,
}

impl<'a> Pass<'a> {
    fn new(
        engine: &'a Engine,
        network: &'a Network,
        batch: &'a PackedBatch,
        layout: &'a Layout,
        lane: Lane,
        workspace: &Workspace,
    ) -> Result<Self, TchError> {
        let buffers = workspace.buffers(batch.len() as i64, layout.key_rows())?;
        let shape = HeadShape::of(&network.config);
        let way = match engine.attention {
            Attention::Hopper(own) => Way::Hopper(Box::new(own.prepare(&buffers.qkv, &buffers.keys_values, layout)?)),
            Attention::Varlen(kernel) => Way::Varlen(kernel),
            Attention::PerSequence => {
                Way::PerSequence(AttentionPlan::new(batch, shape, (network.kind, network.device))?)
            }
        };
        let [cos, sin] = stage(Stage::Embed, || {
            select_rows(&network.embedding, &layout.tokens()?, &buffers.x)?;
            network.rope.rotation(&layout.positions()?, network.kind)?.into_parts()
        })?;
        let key_sources = layout.key_sources()?;
        Ok(Self {
            kernels: &engine.kernels,
            gate_up: engine.gate_up,
            network,
            layout,
            lane,
            buffers,
            way,
            key_sources,
            cos,
            sin,
            shape,
        })
    }

    /// Hidden states behind the final norm, `[rows, hidden]`.
    fn hidden(&self) -> Result<Tensor, TchError> {
        let Buffers { x, normed, addend, .. } = &self.buffers;
        let norm = |addend: Option<&Tensor>, weight: &Tensor| {
            stage(Stage::Norm, || self.kernels.residual_norm(self.lane, x, addend, weight, normed))
        };
        let input_norms = self.network.layers.iter().map(|layer| &layer.input_norm);
        let mut norms = input_norms.chain([&self.network.norm]);
        if let Some(first) = norms.next() {
            norm(None, &first.weight)?;
        }
        // Each layer ends with the norm that follows it: the next layer's or the last one.
        for (layer, next) in self.network.layers.iter().zip(norms) {
            self.attend(layer)?;
            norm(Some(addend), &layer.post_norm.weight)?;
            self.feed_forward(layer)?;
            norm(Some(addend), &next.weight)?;
        }
        Ok(normed.shallow_clone())
    }

    /// From `normed` to `addend`.
    fn attend(&self, layer: &Layer) -> Result<(), TchError> {
        let Buffers { normed, addend, qkv, keys_values, .. } = &self.buffers;
        stage(Stage::Projection, || linear(qkv, normed, &layer.qkv))?;
        let angles = Angles { cos: &self.cos, sin: &self.sin };
        let (query_norm, key_norm) = match &layer.head_norms {
            Some((query, key)) => (Some(&query.weight), Some(&key.weight)),
            None => (None, None),
        };
        stage(Stage::Rotation, || {
            self.kernels.rotate_queries(self.lane, qkv, angles, query_norm)?;
            self.kernels.gather_keys(self.lane, qkv, &self.key_sources, angles, key_norm, keys_values)
        })?;
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        let query = qkv.f_view([-1, heads + 2 * kv_heads, head_dim])?.f_narrow(1, 0, heads)?;
        let attended = stage(Stage::Attention, || match &self.way {
            Way::Hopper(prepared) => prepared.attend(self.lane).map(Tensor::shallow_clone),
            Way::Varlen(kernel) => attention::attend(*kernel, &query, keys_values, self.layout, self.shape),
            Way::PerSequence(plan) => plan.attend(&query, &keys_values.f_select(1, 0)?, &keys_values.f_select(1, 1)?),
        })?;
        stage(Stage::Projection, || linear(addend, &attended, &layer.output))
    }

    /// From `normed` to `addend`.
    fn feed_forward(&self, layer: &Layer) -> Result<(), TchError> {
        let Buffers { normed, addend, gate_up, activated, .. } = &self.buffers;
        if let Some(own) = self.gate_up {
            stage(Stage::FeedForward, || own.launch(self.lane, normed, &layer.gate_up.weight, activated))?;
        } else {
            stage(Stage::FeedForward, || linear(gate_up, normed, &layer.gate_up))?;
            stage(Stage::Activation, || self.kernels.silu_up(self.lane, gate_up, activated))?;
        }
        stage(Stage::FeedForward, || linear(addend, activated, &layer.down))
    }
}

/// Rows of `x` by number, into memory that is there.
fn select_rows(x: &Tensor, rows: &Tensor, out: &Tensor) -> Result<(), TchError> {
    x.f_index_select_out(out, 0, rows).map(drop)
}

/// `out = x · weightᵀ + bias` into memory that is there.
fn linear(out: &Tensor, x: &Tensor, Linear { weight, bias }: &Linear) -> Result<(), TchError> {
    let transposed = weight.f_tr()?;
    match bias {
        Some(bias) => bias.f_addmm_out(out, x, &transposed),
        None => x.f_mm_out(out, &transposed),
    }
    .map(drop)
}

/// Reads logits of hidden states in chunks.
struct Head<'a> {
    kernels: &'a Kernels,
    network: &'a Network,
    layout: &'a Layout,
    lane: Lane,
    workspace: &'a Workspace,
    results: &'a Results,
}

impl Head<'_> {
    fn read(&self, hidden: &Tensor, predictions: usize) -> Result<(), TchError> {
        let transposed = self.network.head.f_tr()?;
        let chunk = usize::try_from(self.workspace.logit_rows()).unwrap_or_default().max(1);
        let mut first = 0;
        while first < predictions {
            let count = chunk.min(predictions - first);
            let [rows, targets, eos] = self.layout.predictions(first..first + count)?;
            let [chosen, logits] = self.workspace.head(count as i64)?;
            stage(Stage::Head, || {
                select_rows(hidden, &rows, &chosen)?;
                chosen.f_mm_out(&logits, &transposed).map(drop)
            })?;
            let part = |values: &Tensor| values.f_narrow(0, first as i64, count as i64);
            stage(Stage::LogSoftmax, || {
                let results = [part(&self.results.logprobs)?, part(&self.results.eos_probabilities)?];
                self.kernels.choose(self.lane, &logits, [&targets, &eos], results.each_ref())
            })?;
            first += count;
        }
        Ok(())
    }
}
