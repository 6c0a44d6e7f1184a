//! Continuous batching: requests wait in order, run together, leave one by one. Synchronous and without a clock of its own;
//! [`super::engine`] gives it a thread.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use grail_protocol::ids::TokenId;
use tokio::sync::oneshot;

use super::backend::{BackendError, DecodeBackend};
use super::draw::DrawStream;
use super::sampler::{Drawn, Generated, Sampler, Sampling};
use super::slots::{CachedPrompt, Shared, SlotTable, Taken};

/// Slots beyond `max_running_requests` for prompts of finished requests.
pub const SPARE_SLOTS: usize = 8;

/// One sample to generate.
#[derive(Debug)]
pub struct Job {
    pub rid: String,
    /// Not empty, in the vocabulary.
    pub prompt: Vec<TokenId>,
    /// What [`super::limits::Limits::budget`] left.
    pub max_new_tokens: usize,
    pub min_new_tokens: usize,
    pub sampling: Sampling,
    /// Every id that ends the sample; empty if EOS is ignored.
    pub stop_ids: Arc<BTreeSet<TokenId>>,
    /// Put in the place of a token that cannot be drawn because the logits are not finite.
    pub poison_replacement: TokenId,
    pub draws: DrawStream,
    pub return_logprob: bool,
    /// Dropped unanswered only when the model fails.
    pub reply: oneshot::Sender<Finished>,
}

/// Why a sample ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    Length,
    Stop(TokenId),
    /// The logits were not finite.
    Poison,
    AbortedRunning,
    AbortedWaiting,
}

/// A sample that ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    pub output: Vec<TokenId>,
    pub finish: Finish,
    /// One a token, if asked for.
    pub logprobs: Vec<f32>,
    pub cached_tokens: usize,
    pub retractions: u32,
    /// From submission to the first token.
    pub queue_time: Duration,
}

/// Which requests to abort.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AbortTarget {
    All,
    /// Every request whose name begins so.
    Prefix(String),
    /// The one request with this name.
    Exactly(String),
}

impl AbortTarget {
    fn hits(&self, rid: &str) -> bool {
        match self {
            Self::All => true,
            Self::Prefix(prefix) => rid.starts_with(prefix.as_str()),
            Self::Exactly(name) => rid == name,
        }
    }
}

/// How much is going on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    pub running: usize,
    pub waiting: usize,
    /// Tokens of the running requests.
    pub used_tokens: usize,
    /// Since the start.
    pub generated_tokens: u64,
    pub prompt_tokens: u64,
    pub cached_prompt_tokens: u64,
    pub retractions: u64,
}

#[derive(Debug)]
struct Sample {
    job: Job,
    output: Vec<TokenId>,
    generated: Generated,
    logprobs: Vec<f32>,
    cached_tokens: usize,
    retractions: u32,
    submitted: Instant,
    started: Option<Instant>,
    is_aborted: bool,
}

impl Sample {
    fn tokens(&self) -> usize {
        self.job.prompt.len() + self.output.len()
    }

    fn finish(self, finish: Finish) {
        let finished = Finished {
            output: self.output,
            finish,
            logprobs: self.logprobs,
            cached_tokens: self.cached_tokens,
            retractions: self.retractions,
            queue_time: self.started.unwrap_or_else(Instant::now).duration_since(self.submitted),
        };
        if self.job.reply.send(finished).is_err() {
            tracing::debug!(rid = %self.job.rid, "Nobody waits for the sample any more.");
        }
    }
}

#[derive(Debug)]
struct Running {
    sample: Sample,
    slot: usize,
}

/// Bounds of what runs at once.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub max_running: usize,
    /// Tokens of all running requests together.
    pub kv_tokens: usize,
}

/// The batch and the queue before it.
#[derive(Debug)]
pub struct Scheduler {
    backend: Box<dyn DecodeBackend>,
    bounds: Bounds,
    slots: SlotTable,
    running: Vec<Running>,
    waiting: VecDeque<Sample>,
    sampler: Sampler,
    batch: Vec<(usize, TokenId)>,
    logits: Vec<f32>,
    load: Load,
}

impl Scheduler {
    /// `bounds.max_running` is lowered to what the backend has slots for.
    #[must_use]
    pub fn new(backend: Box<dyn DecodeBackend>, bounds: Bounds) -> Self {
        let slots = backend.slots();
        Self {
            backend,
            bounds: Bounds { max_running: bounds.max_running.min(slots), ..bounds },
            slots: SlotTable::new(slots),
            running: Vec::new(),
            waiting: VecDeque::new(),
            sampler: Sampler::default(),
            batch: Vec::new(),
            logits: Vec::new(),
            load: Load::default(),
        }
    }

    /// Queues a sample.
    pub fn submit(&mut self, job: Job) {
        let sample = Sample {
            output: Vec::with_capacity(job.max_new_tokens.min(4096)),
            generated: Generated::default(),
            logprobs: Vec::new(),
            cached_tokens: 0,
            retractions: 0,
            submitted: Instant::now(),
            started: None,
            is_aborted: false,
            job,
        };
        if sample.job.max_new_tokens == 0 {
            sample.finish(Finish::Length);
        } else {
            self.waiting.push_back(sample);
        }
    }

    /// Ends waiting requests at once, running ones with their next token.
    pub fn abort(&mut self, target: &AbortTarget) {
        let (hit, kept) =
            std::mem::take(&mut self.waiting).into_iter().partition(|sample| target.hits(&sample.job.rid));
        self.waiting = kept;
        let hit: VecDeque<Sample> = hit;
        hit.into_iter().for_each(|sample| sample.finish(Finish::AbortedWaiting));
        for running in &mut self.running {
            running.sample.is_aborted |= target.hits(&running.sample.job.rid);
        }
    }

    /// Nothing runs and nothing waits.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Forgets the prompts of finished requests; refused while anything runs or waits.
    pub fn flush(&mut self) -> bool {
        if !self.is_idle() {
            return false;
        }
        for slot in self.slots.flush() {
            self.backend.release(slot);
        }
        true
    }

    /// Goes on with another model. The caller waits for idleness first: a sample never mixes two models.
    ///
    /// # Errors
    /// The new model itself if anything runs or waits.
    pub fn replace(&mut self, backend: Box<dyn DecodeBackend>) -> Result<(), Box<dyn DecodeBackend>> {
        if !self.is_idle() {
            return Err(backend);
        }
        self.slots = SlotTable::new(backend.slots());
        self.bounds.max_running = self.bounds.max_running.min(backend.slots());
        self.backend = backend;
        Ok(())
    }

    /// How much is going on.
    #[must_use]
    pub fn load(&self) -> Load {
        let used_tokens = self.running.iter().map(|running| running.sample.tokens()).sum();
        Load { running: self.running.len(), waiting: self.waiting.len(), used_tokens, ..self.load }
    }

    /// Admits what fits, then draws one token for every running request.
    ///
    /// # Errors
    /// [`BackendError`]: the model cannot go on. Requests stay unanswered until the scheduler is dropped.
    pub fn step(&mut self) -> Result<(), BackendError> {
        self.admit()?;
        self.retract_overflow();
        if self.running.is_empty() {
            return Ok(());
        }
        self.batch.clear();
        self.batch.extend(self.running.iter().map(|running| {
            let last = running.sample.output.last().copied();
            (running.slot, last.expect("a sample runs once its first token is drawn"))
        }));
        let mut logits = std::mem::take(&mut self.logits);
        self.backend.step(&self.batch, &mut logits)?;
        let vocab_size = self.backend.vocab_size();
        let mut still_running = Vec::with_capacity(self.running.len());
        for (mut running, row) in std::mem::take(&mut self.running).into_iter().zip(logits.chunks_exact_mut(vocab_size))
        {
            match self.draw(&mut running.sample, row) {
                None => still_running.push(running),
                Some(finish) => self.end(running, finish),
            }
        }
        self.running = still_running;
        self.logits = logits;
        Ok(())
    }

    /// First come, first served: the queue's head waits for room and nobody overtakes it.
    fn admit(&mut self) -> Result<(), BackendError> {
        while self.running.len() < self.bounds.max_running {
            let Some(head) = self.waiting.front() else { break };
            // One more for every running request, so that the next step does not retract what was just admitted.
            let used: usize = self.running.iter().map(|running| running.sample.tokens() + 1).sum();
            if !self.running.is_empty() && used + head.tokens() + 1 > self.bounds.kv_tokens {
                break;
            }
            let Some(sample) = self.waiting.pop_front() else { break };
            self.start(sample)?;
        }
        Ok(())
    }

    /// Fills a slot with the sample and draws its next token.
    fn start(&mut self, mut sample: Sample) -> Result<(), BackendError> {
        let is_first_start = sample.output.is_empty();
        let tokens: Vec<TokenId> = sample.job.prompt.iter().chain(&sample.output).copied().collect();
        let (slot, shared) = self.take_slot(&tokens);
        let begun = shared.as_ref().map_or(0, |shared| shared.tokens);
        if let Some(shared) = &shared {
            self.backend.copy_prefix(shared.slot, slot, begun)?;
        }
        let whole = shared.and_then(|shared| shared.whole);
        let mut row = match &whole {
            Some(prompt) => prompt.logits.clone(),
            None => self.backend.prefill(slot, &tokens[begun..])?,
        };
        if is_first_start {
            // The last token of a prompt always counts as computed, as in SGLang.
            sample.cached_tokens = begun.min(tokens.len() - 1);
            self.load.prompt_tokens += tokens.len() as u64;
            self.load.cached_prompt_tokens += sample.cached_tokens as u64;
            let prompt = whole.unwrap_or_else(|| Arc::new(CachedPrompt { tokens, logits: row.clone() }));
            self.slots.hold(slot, prompt);
        }
        sample.started.get_or_insert_with(Instant::now);
        match self.draw(&mut sample, &mut row) {
            None => {
                // In order of slots, so that a step sees neighbours as neighbours.
                let place = self.running.partition_point(|running| running.slot < slot);
                self.running.insert(place, Running { sample, slot });
            }
            Some(finish) => self.end(Running { sample, slot }, finish),
        }
        Ok(())
    }

    /// An empty slot, and what of the sequence can be copied from another.
    fn take_slot(&mut self, tokens: &[TokenId]) -> (usize, Option<Shared>) {
        let shared = self.slots.find(tokens);
        let source = shared.as_ref().map(|shared| shared.slot);
        let (taken, shared) = match self.slots.take(source) {
            Some(taken) => (taken, shared),
            // All others are busy: the source itself is the last one, and has to go.
            None => (self.slots.take(None).expect("there are at least as many slots as running requests"), None),
        };
        match taken {
            Taken::Empty(slot) => (slot, shared),
            Taken::Evicted(slot) => {
                self.backend.release(slot);
                (slot, shared)
            }
        }
    }

    /// Draws the sample's next token; says whether the sample ends with it.
    fn draw(&mut self, sample: &mut Sample, row: &mut [f32]) -> Option<Finish> {
        let position = sample.output.len();
        if position < sample.job.min_new_tokens {
            for stop in sample.job.stop_ids.iter() {
                if let Some(logit) = row.get_mut(stop.0 as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let uniform = sample.job.draws.uniform(position as u64);
        let drawn = self.sampler.draw(row, &sample.job.sampling, &sample.generated, uniform);
        let is_poisoned = drawn.is_err();
        let Drawn { token, logprob } =
            drawn.unwrap_or(Drawn { token: sample.job.poison_replacement, logprob: f32::NEG_INFINITY });
        sample.output.push(token);
        sample.generated.add(token);
        if sample.job.return_logprob {
            sample.logprobs.push(logprob);
        }
        self.load.generated_tokens += 1;
        // The order of these tests is SGLang's: an abort, then the length, which so comes before an EOS in the last place.
        if sample.is_aborted {
            Some(Finish::AbortedRunning)
        } else if is_poisoned {
            Some(Finish::Poison)
        } else if sample.output.len() >= sample.job.max_new_tokens {
            Some(Finish::Length)
        } else if sample.job.stop_ids.contains(&token) {
            Some(Finish::Stop(token))
        } else {
            None
        }
    }

    /// Sends requests back to the queue until one more token of each fits, those with the least output first.
    fn retract_overflow(&mut self) {
        loop {
            let used: usize = self.running.iter().map(|running| running.sample.tokens() + 1).sum();
            if used <= self.bounds.kv_tokens || self.running.len() <= 1 {
                return;
            }
            let least = (0..self.running.len()).min_by_key(|index| {
                let sample = &self.running[*index].sample;
                (sample.output.len(), std::cmp::Reverse(sample.submitted))
            });
            let Some(least) = least else { return };
            let Running { mut sample, slot } = self.running.remove(least);
            self.give_back(slot);
            sample.retractions += 1;
            self.load.retractions += 1;
            tracing::warn!(rid = %sample.job.rid, used, "KV cache pool is full. Retract requests.");
            if sample.is_aborted {
                sample.finish(Finish::AbortedWaiting);
            } else {
                self.waiting.push_front(sample);
            }
        }
    }

    fn end(&mut self, running: Running, finish: Finish) {
        self.give_back(running.slot);
        running.sample.finish(finish);
    }

    fn give_back(&mut self, slot: usize) {
        if self.slots.give_back(slot) {
            self.backend.release(slot);
        }
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
