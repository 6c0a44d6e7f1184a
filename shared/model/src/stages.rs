//! Where the time of a forward pass goes, when somebody asks.
//!
//! Off by default: a stage then costs one look at a thread-local flag. While it is on, each stage waits for the device before
//! and after itself, so that asynchronous work counts where it was ordered; the whole is slower for it.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use crate::device::Device;

/// A part of proving a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Tokens, positions and row numbers to the device.
    Upload,
    /// Embedding and rotation of the positions.
    Embed,
    /// Residuals and norms; part of what surrounds them where they are not a kernel of their own, like the next three.
    Norm,
    /// Query, key, value and output projections.
    Projection,
    /// Norms and rotation of queries and keys, and the gathering of keys and values.
    Rotation,
    /// Attention, with all around it where that has no stages of its own.
    Attention,
    /// Gate, up and down projections, with all around them where that has no stages of its own.
    FeedForward,
    /// `silu(gate) · up`.
    Activation,
    /// Logits, with the final norm and log-softmax where those have no stages of their own.
    Head,
    /// Log-softmax at the chosen tokens.
    LogSoftmax,
    /// Selection of the largest activations, buckets and sketches.
    Sketch,
    /// Values back to the host.
    ReadBack,
}

impl Stage {
    /// All stages in the order of a forward pass.
    pub const ALL: [Self; 12] = [
        Self::Upload,
        Self::Embed,
        Self::Norm,
        Self::Projection,
        Self::Rotation,
        Self::Attention,
        Self::FeedForward,
        Self::Activation,
        Self::Head,
        Self::LogSoftmax,
        Self::Sketch,
        Self::ReadBack,
    ];

    /// Short fixed name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Upload => "upload",
            Self::Embed => "embed",
            Self::Norm => "norm",
            Self::Projection => "projection",
            Self::Rotation => "rotation",
            Self::Attention => "attention",
            Self::FeedForward => "feed-forward",
            Self::Activation => "silu",
            Self::Head => "head/logprob",
            Self::LogSoftmax => "log-softmax",
            Self::Sketch => "sketch",
            Self::ReadBack => "read-back",
        }
    }
}

/// One time that a stage ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub stage: Stage,
    /// From the start of the recording.
    pub start: Duration,
    pub length: Duration,
    /// What other stages inside it took.
    pub inner: Duration,
}

impl Span {
    /// Without the stages inside it; the sum over all spans counts nothing twice.
    #[must_use]
    pub fn own(&self) -> Duration {
        self.length.saturating_sub(self.inner)
    }
}

struct Recorder {
    device: Device,
    began: Instant,
    spans: Vec<Span>,
    /// Of each open stage: what the stages inside it have taken.
    open: Vec<Duration>,
}

thread_local! {
    static IS_ON: Cell<bool> = const { Cell::new(false) };
    static RECORDER: RefCell<Option<Recorder>> = const { RefCell::new(None) };
}

/// Runs `work` on this thread and records the stages in it, ordered by their end; `device` is where it computes.
pub fn record<T>(device: Device, work: impl FnOnce() -> T) -> (T, Vec<Span>) {
    device.synchronize();
    let recorder = Recorder { device, began: Instant::now(), spans: Vec::new(), open: Vec::new() };
    RECORDER.with_borrow_mut(|place| *place = Some(recorder));
    IS_ON.set(true);
    let result = work();
    IS_ON.set(false);
    let spans = RECORDER.take().map(|recorder| recorder.spans).unwrap_or_default();
    (result, spans)
}

/// Runs `work` as a part of `stage`.
pub(crate) fn stage<T>(stage: Stage, work: impl FnOnce() -> T) -> T {
    if !IS_ON.get() {
        return work();
    }
    let started = RECORDER.with_borrow_mut(|recorder| {
        let recorder = recorder.as_mut()?;
        recorder.device.synchronize();
        recorder.open.push(Duration::ZERO);
        Some(Instant::now())
    });
    let result = work();
    if let Some(started) = started {
        RECORDER.with_borrow_mut(|recorder| {
            let Some(recorder) = recorder.as_mut() else { return };
            recorder.device.synchronize();
            let length = started.elapsed();
            let inner = recorder.open.pop().unwrap_or_default();
            if let Some(outer) = recorder.open.last_mut() {
                *outer += length;
            }
            let start = started.duration_since(recorder.began);
            recorder.spans.push(Span { stage, start, length, inner });
        });
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_recorded_only_while_somebody_asks() {
        assert_eq!(stage(Stage::Head, || 1), 1);
        let (result, spans) = record(Device::Cpu, || {
            stage(Stage::Upload, || ());
            stage(Stage::Sketch, || stage(Stage::ReadBack, || 2))
        });
        assert_eq!(result, 2);
        assert_eq!(
            spans.iter().map(|span| span.stage).collect::<Vec<_>>(),
            [Stage::Upload, Stage::ReadBack, Stage::Sketch]
        );
        let [_, inner, outer] = spans.as_slice() else { panic!("three") };
        assert_eq!((outer.inner, inner.inner), (inner.length, Duration::ZERO));
        assert!(outer.start <= inner.start && outer.own() <= outer.length);
        stage(Stage::Head, || ());
        assert!(record(Device::Cpu, || ()).1.is_empty(), "nothing is left from before");
    }
}
