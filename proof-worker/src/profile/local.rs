//! A profile of a model in this process.

use std::sync::Arc;
use std::time::{Duration, Instant};

use grail_ipc::jobs::ProveJob;
use grail_model::measure::{MatrixProduct, cuda_memory};
use grail_model::stages::{Span, Stage, record};
use grail_model::{Device, Dtype, Model, ModelConfig, ProofModel};

use super::Plan;
use super::report::{MatrixProductReport, StageReport, milliseconds};
use super::run::{Measured, Sample};
use super::trace::Event;
use crate::cli::ProfileArguments;
use crate::error::WorkerError;
use crate::prover::{ComputeError, Prover, Proving};
use crate::torch::{TorchLoader, TorchProver};

/// Rows of the measured matrix product: what fills a GPU takes a CPU minutes.
const GPU_PRODUCT: usize = 8_192;
const CPU_PRODUCT: usize = 1_024;

/// How long products follow each other without a pause to see what the card keeps up: its clock falls within a fraction of a
/// second when the power limit is reached.
const SUSTAINED: Duration = Duration::from_secs(1);

/// Seed of random weights.
const WEIGHTS_SEED: u32 = 1;

/// A model in this process, ready to prove.
pub(crate) struct Local {
    model: ProofModel,
    prover: TorchProver,
    /// As the command line named it.
    pub name: String,
    /// Rate of the yardstick before anything was proved, of a GPU.
    at_start_tflops: Option<f64>,
}

/// Groups that were begun together.
struct Batch<'j> {
    /// From the beginning of the pass.
    start: Duration,
    groups: &'j [&'j ProveJob],
    proving: Box<dyn Proving>,
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
        let loader = TorchLoader::on(arguments.device, arguments.dtype, arguments.threads)?
            .with_batch_tokens(arguments.batch_tokens);
        let (model, name) = match (&arguments.folder, arguments.shape) {
            (Some(folder), _) => (loader.load_model(folder)?, folder.display().to_string()),
            (None, Some(shape)) => {
                let model = Model::random(shape.config(), &loader.options(), WEIGHTS_SEED)
                    .map_err(|source| WorkerError::RandomModel { shape: shape.to_string(), source })?;
                (ProofModel::new(Arc::new(model)), format!("{shape} with random weights"))
            }
            (None, None) => {
                return Err(WorkerError::Bug { detail: "a profile without a model was let through".into() });
            }
        };
        let mut local = Self { prover: TorchProver::new(model.clone()), model, name, at_start_tflops: None };
        if local.device() != Device::Cpu {
            // What computes is made first: it looks at the memory that is free, and sets how products are computed.
            local.prover.batch_tokens();
            local.at_start_tflops = Some(local.product_tflops()?);
        }
        Ok(local)
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

    /// Proves all groups as often as the plan says, as a worker does that always has requests waiting: as many groups together as
    /// fit a batch, and the next batch begun while one is computed.
    ///
    /// # Errors
    /// [`WorkerError::Group`] with the group that could not be proved.
    pub(crate) fn measure(&self, plan: &Plan, jobs: &[ProveJob]) -> Result<Measured, WorkerError> {
        self.pass(&repeated(plan.warm_up, jobs))?;
        self.pass(&repeated(plan.repeats, jobs))
    }

    fn pass(&self, jobs: &[&ProveJob]) -> Result<Measured, WorkerError> {
        let began = Instant::now();
        let mut samples = Vec::with_capacity(jobs.len());
        let mut running: Option<Batch<'_>> = None;
        // Since when the device can have worked on the batch that is finished next.
        let mut free_since = Duration::ZERO;
        let mut rest = jobs;
        loop {
            let (groups, others) = rest.split_at(together(rest, self.prover.batch_tokens()));
            rest = others;
            let begun = (!groups.is_empty()).then(|| Batch {
                start: began.elapsed(),
                groups,
                proving: self.prover.begin(groups),
            });
            let is_last = begun.is_none();
            if let Some(batch) = std::mem::replace(&mut running, begun) {
                let start = batch.start.max(free_since);
                let groups = batch.groups;
                for (group, result) in groups.iter().zip(batch.proving.finish()) {
                    result.map_err(|error| refused(group, &error))?;
                }
                free_since = began.elapsed();
                // Groups that are proved together share the time.
                let length = (free_since - start) / u32::try_from(groups.len()).unwrap_or(u32::MAX);
                samples.extend(groups.iter().zip(0..).map(|(job, place)| Sample {
                    group: job.group,
                    lane: 0,
                    start: start + length * place,
                    length,
                }));
            }
            if is_last {
                return Ok(Measured { samples, wall: began.elapsed() });
            }
        }
    }

    /// Groups that are under way at once.
    pub(crate) fn in_flight(&self, jobs: &[ProveJob]) -> u32 {
        let jobs: Vec<&ProveJob> = jobs.iter().collect();
        match self.device() {
            Device::Cpu => 1,
            Device::Cuda(_) => 2 * u32::try_from(together(&jobs, self.prover.batch_tokens())).unwrap_or(u32::MAX),
        }
    }

    /// One more pass with a wait for the device around each stage. `offset` is where it begins in the trace.
    ///
    /// # Errors
    /// As [`Local::measure`].
    pub(crate) fn stages(&self, jobs: &[ProveJob], offset: Duration) -> Result<Staged, WorkerError> {
        let began = Instant::now();
        let (mut spans, mut events): (Vec<Span>, Vec<Event>) = (Vec::new(), Vec::new());
        let mut total = Duration::ZERO;
        let jobs: Vec<&ProveJob> = jobs.iter().collect();
        let mut rest = jobs.as_slice();
        while !rest.is_empty() {
            let (groups, others) = rest.split_at(together(rest, self.prover.batch_tokens()));
            rest = others;
            let start = offset + began.elapsed();
            let started = Instant::now();
            let (proved, recorded) = record(self.device(), || self.pass(groups));
            let length = started.elapsed();
            proved?;
            total += length;
            let numbers: Vec<String> = groups.iter().map(|job| job.group.to_string()).collect();
            let name = format!("group {} in stages", numbers.join(", "));
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

    /// The yardstick: a square product on the same device in the same precision, and what a GPU keeps up of it.
    ///
    /// # Errors
    /// [`WorkerError::Yardstick`].
    pub(crate) fn matrix_product(&self, is_sustained_too: bool) -> Result<MatrixProductReport, WorkerError> {
        let (size, tflops) = (self.product_size(), self.product_tflops()?);
        let sustained_tflops = match self.device() {
            Device::Cuda(_) if is_sustained_too => {
                let sustained = MatrixProduct::measure_sustained(self.device(), self.dtype(), size, SUSTAINED);
                Some(sustained.map_err(WorkerError::Yardstick)?.flop_per_second() / 1e12)
            }
            Device::Cpu | Device::Cuda(_) => None,
        };
        Ok(MatrixProductReport { size, tflops, at_start_tflops: self.at_start_tflops, sustained_tflops })
    }

    fn product_size(&self) -> usize {
        if self.device() == Device::Cpu { CPU_PRODUCT } else { GPU_PRODUCT }
    }

    fn product_tflops(&self) -> Result<f64, WorkerError> {
        let product = MatrixProduct::measure(self.device(), self.dtype(), self.product_size());
        Ok(product.map_err(WorkerError::Yardstick)?.flop_per_second() / 1e12)
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

fn repeated(times: u32, jobs: &[ProveJob]) -> Vec<&ProveJob> {
    (0..times).flat_map(|_| jobs).collect()
}

/// How many of the first groups fit one batch; a group that does not fit goes alone.
fn together(jobs: &[&ProveJob], budget: usize) -> usize {
    let mut tokens = 0;
    let fits = |job: &&&ProveJob| {
        tokens += job.tokens();
        tokens <= budget
    };
    jobs.iter().take_while(fits).count().max(1).min(jobs.len())
}

fn refused(job: &ProveJob, error: &ComputeError) -> WorkerError {
    WorkerError::Group { group: job.group, detail: error.to_string() }
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
    fn groups_go_together_as_far_as_they_fit() {
        let job = |tokens: usize| ProveJob {
            group: grail_protocol::ids::GroupIndex(0),
            weights: grail_protocol::ids::WeightsHash(0),
            randomness: vec![],
            eos_token: grail_protocol::ids::TokenId(0),
            prompt: vec![grail_protocol::ids::TokenId(0); tokens],
            completions: vec![],
        };
        let jobs = [job(6), job(4), job(1)];
        let jobs: Vec<&ProveJob> = jobs.iter().collect();
        for (budget, count) in [(0, 1), (6, 1), (9, 1), (10, 2), (11, 3), (50, 3)] {
            assert_eq!(together(&jobs, budget), count, "{budget}");
        }
        assert_eq!(together(&[], 10), 0);
    }

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
