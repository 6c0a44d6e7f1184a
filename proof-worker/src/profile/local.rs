//! A profile of a model in this process.

use std::sync::Arc;
use std::time::{Duration, Instant};

use grail_ipc::jobs::ProveJob;
use grail_model::measure::{MatrixProduct, cuda_memory};
use grail_model::stages::{Span, Stage, record};
use grail_model::{Device, Dtype, LoadOptions, Model, ModelConfig, ProofModel};

use super::Plan;
use super::report::{MatrixProductReport, StageReport, milliseconds};
use super::run::{Measured, Sample};
use super::trace::Event;
use crate::cli::ProfileArguments;
use crate::error::WorkerError;
use crate::prover::Prover;
use crate::torch::{TorchLoader, TorchProver};

/// Rows of the measured matrix product: what fills a GPU takes a CPU minutes.
const GPU_PRODUCT: usize = 8_192;
const CPU_PRODUCT: usize = 1_024;

/// Seed of random weights.
const WEIGHTS_SEED: u32 = 1;

/// A model in this process, ready to prove.
pub(crate) struct Local {
    model: ProofModel,
    prover: TorchProver,
    /// As the command line named it.
    pub name: String,
}

/// The pass in which stages were timed.
pub(crate) struct Staged {
    pub stages: Vec<StageReport>,
    pub events: Vec<Event>,
}

impl Local {
    /// Loads the folder, or fills the shape with random weights.
    ///
    /// # Errors
    /// As the loader; [`WorkerError::RandomModel`] if a shape does not fit the device.
    pub(crate) fn load(arguments: &ProfileArguments) -> Result<Self, WorkerError> {
        let loader = TorchLoader::on(arguments.device, arguments.dtype, arguments.threads)?;
        let (model, name) = match (&arguments.folder, arguments.shape) {
            (Some(folder), _) => (loader.load_model(folder)?, folder.display().to_string()),
            (None, Some(shape)) => {
                let options = LoadOptions { dtype: arguments.dtype, ..LoadOptions::on(arguments.device) };
                let model = Model::random(shape.config(), &options, WEIGHTS_SEED)
                    .map_err(|source| WorkerError::RandomModel { shape: shape.to_string(), source })?;
                (ProofModel::new(Arc::new(model)), format!("{shape} with random weights"))
            }
            (None, None) => {
                return Err(WorkerError::Bug { detail: "a profile without a model was let through".into() });
            }
        };
        Ok(Self { prover: TorchProver::new(model.clone()), model, name })
    }

    pub(crate) fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    pub(crate) fn device(&self) -> Device {
        self.model.device()
    }

    pub(crate) fn dtype(&self) -> Dtype {
        self.model.dtype()
    }

    pub(crate) fn weights(&self) -> grail_protocol::ids::WeightsHash {
        self.model.weights_hash()
    }

    /// Proves all groups as often as the plan says, one after the other.
    ///
    /// # Errors
    /// [`WorkerError::Group`] with the group that could not be proved.
    pub(crate) fn measure(&self, plan: &Plan, jobs: &[ProveJob]) -> Result<Measured, WorkerError> {
        for _ in 0..plan.warm_up {
            for job in jobs {
                self.prove(job)?;
            }
        }
        let began = Instant::now();
        let mut samples = Vec::new();
        for _ in 0..plan.repeats {
            for job in jobs {
                let started = Instant::now();
                self.prove(job)?;
                let (start, length) = (started.duration_since(began), started.elapsed());
                samples.push(Sample { group: job.group, lane: 0, start, length });
            }
        }
        Ok(Measured { samples, wall: began.elapsed() })
    }

    /// One more pass with a wait for the device around each stage. `offset` is where it begins in the trace.
    ///
    /// # Errors
    /// As [`Local::measure`].
    pub(crate) fn stages(&self, jobs: &[ProveJob], offset: Duration) -> Result<Staged, WorkerError> {
        let began = Instant::now();
        let (mut spans, mut events): (Vec<Span>, Vec<Event>) = (Vec::new(), Vec::new());
        let mut total = Duration::ZERO;
        for job in jobs {
            let start = offset + began.elapsed();
            let started = Instant::now();
            let (proved, recorded) = record(self.device(), || self.prove(job));
            let length = started.elapsed();
            proved?;
            total += length;
            let name = format!("group {} in stages", job.group);
            events.push(Event { name, category: "group", lane: 1, start, length });
            events.extend(recorded.iter().map(|span| Event {
                name: span.stage.name().to_owned(),
                category: "stage",
                lane: 1,
                start: start + span.start,
                length: span.length,
            }));
            spans.extend(recorded);
        }
        Ok(Staged { stages: table(&spans, total, jobs.len()), events })
    }

    fn prove(&self, job: &ProveJob) -> Result<(), WorkerError> {
        let failed =
            |error: crate::prover::ComputeError| WorkerError::Group { group: job.group, detail: error.to_string() };
        self.prover.prove(job).map(drop).map_err(failed)
    }

    /// The yardstick: a square product on the same device in the same precision.
    ///
    /// # Errors
    /// [`WorkerError::Yardstick`].
    pub(crate) fn matrix_product(&self) -> Result<MatrixProductReport, WorkerError> {
        let size = if self.device() == Device::Cpu { CPU_PRODUCT } else { GPU_PRODUCT };
        let product = MatrixProduct::measure(self.device(), self.dtype(), size).map_err(WorkerError::Yardstick)?;
        Ok(MatrixProductReport { size, tflops: product.flop_per_second() / 1e12 })
    }

    /// Used and total bytes of a GPU; a note where they cannot be had.
    pub(crate) fn device_memory(&self) -> Result<Option<(u64, u64)>, &'static str> {
        match self.device() {
            Device::Cpu => Ok(None),
            Device::Cuda(0) => match cuda_memory() {
                Some(memory) => Ok(Some((memory.used_bytes, memory.total_bytes))),
                None => Err("device memory is left out: the CUDA runtime does not say"),
            },
            Device::Cuda(_) => {
                Err("device memory is left out: it is read for cuda:0 only; choose with CUDA_VISIBLE_DEVICES")
            }
        }
    }
}

/// Each stage's own time, and what is left.
fn table(spans: &[Span], total: Duration, groups: usize) -> Vec<StageReport> {
    let row = |stage: &'static str, time: Duration| StageReport {
        stage,
        ms_per_group: milliseconds(time) / groups.max(1) as f64,
        share: time.as_secs_f64() / total.as_secs_f64().max(f64::MIN_POSITIVE),
    };
    let own = |stage: Stage| spans.iter().filter(|span| span.stage == stage).map(Span::own).sum::<Duration>();
    let ran = |stage: &Stage| spans.iter().any(|span| span.stage == *stage);
    let mut rows: Vec<StageReport> =
        Stage::ALL.into_iter().filter(ran).map(|stage| row(stage.name(), own(stage))).collect();
    let staged: Duration = spans.iter().map(Span::own).sum();
    rows.push(row("other", total.saturating_sub(staged)));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up_and_nested_stages_count_once() {
        let ms = Duration::from_millis;
        let span = |stage, length, inner| Span { stage, start: Duration::ZERO, length: ms(length), inner: ms(inner) };
        let spans = [
            span(Stage::Attention, 30, 0),
            span(Stage::ReadBack, 5, 0),
            span(Stage::Head, 25, 5),
            span(Stage::Attention, 10, 0),
        ];
        let rows = table(&spans, ms(80), 2);
        let of = |name: &str| rows.iter().find(|row| row.stage == name).unwrap().ms_per_group;
        assert_eq!([of("attention"), of("head/logprob"), of("read-back"), of("other")], [20.0, 10.0, 2.5, 7.5]);
        assert!((rows.iter().map(|row| row.share).sum::<f64>() - 1.0).abs() < 1e-9);
    }
}
