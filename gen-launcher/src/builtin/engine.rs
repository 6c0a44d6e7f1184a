//! The thread that decodes. It owns the scheduler, takes commands between two steps and sleeps only when nothing runs.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::backend::{BackendError, DecodeBackend};
use super::scheduler::{AbortTarget, Job, Load, Scheduler};

#[derive(Debug)]
enum Command {
    Submit(Box<Job>),
    Abort(AbortTarget),
    Flush(oneshot::Sender<bool>),
    Replace { backend: Box<dyn DecodeBackend>, replaced: oneshot::Sender<bool> },
    Stop,
}

/// The decode thread has ended, so that no command reaches it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the scheduler has ended")]
pub struct EngineGone;

/// Numbers that anybody may read at any time.
#[derive(Debug, Default)]
struct SharedLoad {
    running: AtomicUsize,
    waiting: AtomicUsize,
    used_tokens: AtomicUsize,
    generated_tokens: AtomicU64,
    prompt_tokens: AtomicU64,
    cached_prompt_tokens: AtomicU64,
    retractions: AtomicU64,
    /// Bits of a double.
    tokens_per_second: AtomicU64,
}

/// How often the rate of tokens is computed.
const RATE_PERIOD: Duration = Duration::from_secs(1);

/// Tokens a second over the last period.
#[derive(Debug)]
struct Rate {
    since: Instant,
    tokens: u64,
}

impl Rate {
    /// The new rate, if a period is over.
    fn update(&mut self, tokens: u64) -> Option<f64> {
        let elapsed = self.since.elapsed();
        if elapsed < RATE_PERIOD {
            return None;
        }
        #[expect(clippy::cast_precision_loss, reason = "a second's tokens are far below 2^53")]
        let rate = (tokens - self.tokens) as f64 / elapsed.as_secs_f64();
        *self = Self { since: Instant::now(), tokens };
        Some(rate)
    }
}

impl SharedLoad {
    fn publish(&self, load: Load) {
        self.running.store(load.running, Ordering::Relaxed);
        self.waiting.store(load.waiting, Ordering::Relaxed);
        self.used_tokens.store(load.used_tokens, Ordering::Relaxed);
        self.generated_tokens.store(load.generated_tokens, Ordering::Relaxed);
        self.prompt_tokens.store(load.prompt_tokens, Ordering::Relaxed);
        self.cached_prompt_tokens.store(load.cached_prompt_tokens, Ordering::Relaxed);
        self.retractions.store(load.retractions, Ordering::Relaxed);
    }
}

/// A way to talk to the decode thread.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    load: Arc<SharedLoad>,
}

/// The decode thread itself.
#[derive(Debug)]
pub struct Engine {
    handle: EngineHandle,
    thread: JoinHandle<Result<(), BackendError>>,
}

impl Engine {
    /// Starts the thread.
    ///
    /// * `step_time`: least duration of a step, to imitate slower hardware.
    /// * `ended`: dropped when the thread ends, for whatever reason.
    ///
    /// # Errors
    /// The operating system refuses another thread.
    pub fn start(
        scheduler: Scheduler,
        step_time: Option<Duration>,
        ended: oneshot::Sender<()>,
    ) -> std::io::Result<Self> {
        let (commands, received) = mpsc::channel();
        let load = Arc::new(SharedLoad::default());
        let shared = Arc::clone(&load);
        let thread = std::thread::Builder::new().name("decode".to_owned()).spawn(move || {
            let _ended = ended;
            decode(scheduler, &received, &shared, step_time)
        })?;
        Ok(Self { handle: EngineHandle { commands, load }, thread })
    }

    /// A way to talk to it.
    #[must_use]
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }

    /// Ends the thread and waits for it.
    ///
    /// # Errors
    /// What the model failed of, or that the thread panicked.
    pub fn join(self) -> Result<(), BackendError> {
        if self.handle.commands.send(Command::Stop).is_err() {
            tracing::debug!("The decode thread has ended already.");
        }
        self.thread.join().unwrap_or_else(|panic| {
            let text =
                panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            Err(BackendError { operation: "decode", detail: text.unwrap_or("panic").to_owned() })
        })
    }
}

impl EngineHandle {
    /// Queues a sample.
    ///
    /// # Errors
    /// [`EngineGone`]
    pub fn submit(&self, job: Job) -> Result<(), EngineGone> {
        self.send(Command::Submit(Box::new(job)))
    }

    /// Aborts what is there when the command arrives.
    ///
    /// # Errors
    /// [`EngineGone`]
    pub fn abort(&self, target: AbortTarget) -> Result<(), EngineGone> {
        self.send(Command::Abort(target))
    }

    /// Forgets cached prompts; false if anything runs or waits.
    ///
    /// # Errors
    /// [`EngineGone`]
    pub async fn flush(&self) -> Result<bool, EngineGone> {
        let (flushed, answer) = oneshot::channel();
        self.send(Command::Flush(flushed))?;
        answer.await.map_err(|_| EngineGone)
    }

    /// Goes on with another model; false if anything runs or waits.
    ///
    /// # Errors
    /// [`EngineGone`]
    pub async fn replace(&self, backend: Box<dyn DecodeBackend>) -> Result<bool, EngineGone> {
        let (replaced, answer) = oneshot::channel();
        self.send(Command::Replace { backend, replaced })?;
        answer.await.map_err(|_| EngineGone)
    }

    /// How much is going on, as of the last step.
    #[must_use]
    pub fn load(&self) -> Load {
        Load {
            running: self.load.running.load(Ordering::Relaxed),
            waiting: self.load.waiting.load(Ordering::Relaxed),
            used_tokens: self.load.used_tokens.load(Ordering::Relaxed),
            generated_tokens: self.load.generated_tokens.load(Ordering::Relaxed),
            prompt_tokens: self.load.prompt_tokens.load(Ordering::Relaxed),
            cached_prompt_tokens: self.load.cached_prompt_tokens.load(Ordering::Relaxed),
            retractions: self.load.retractions.load(Ordering::Relaxed),
        }
    }

    /// Tokens generated a second, over the last second of work; 0 while nothing runs.
    #[must_use]
    pub fn tokens_per_second(&self) -> f64 {
        f64::from_bits(self.load.tokens_per_second.load(Ordering::Relaxed))
    }

    fn send(&self, command: Command) -> Result<(), EngineGone> {
        self.commands.send(command).map_err(|_| EngineGone)
    }
}

/// Whether the thread goes on.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    GoOn,
    Stop,
}

fn decode(
    mut scheduler: Scheduler,
    commands: &mpsc::Receiver<Command>,
    shared: &SharedLoad,
    step_time: Option<Duration>,
) -> Result<(), BackendError> {
    let mut rate = Rate { since: Instant::now(), tokens: 0 };
    loop {
        if scheduler.is_idle() {
            shared.publish(scheduler.load());
            shared.tokens_per_second.store(0, Ordering::Relaxed);
            match commands.recv() {
                Ok(command) => {
                    if apply(&mut scheduler, command) == Next::Stop {
                        return Ok(());
                    }
                }
                // The last handle is gone: nobody can ask for anything.
                Err(mpsc::RecvError) => return Ok(()),
            }
        }
        while let Ok(command) = commands.try_recv() {
            if apply(&mut scheduler, command) == Next::Stop {
                return Ok(());
            }
        }
        let begun = Instant::now();
        scheduler.step()?;
        let load = scheduler.load();
        shared.publish(load);
        if let Some(rate) = rate.update(load.generated_tokens) {
            shared.tokens_per_second.store(rate.to_bits(), Ordering::Relaxed);
        }
        if let Some(rest) = step_time.and_then(|least| least.checked_sub(begun.elapsed())) {
            std::thread::sleep(rest);
        }
    }
}

fn apply(scheduler: &mut Scheduler, command: Command) -> Next {
    match command {
        Command::Submit(job) => scheduler.submit(*job),
        Command::Abort(target) => scheduler.abort(&target),
        Command::Flush(flushed) => drop(flushed.send(scheduler.flush())),
        Command::Replace { backend, replaced } => drop(replaced.send(scheduler.replace(backend).is_ok())),
        Command::Stop => return Next::Stop,
    }
    Next::GoOn
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use grail_protocol::ids::TokenId;

    use super::super::backend::fake::FakeBackend;
    use super::super::draw::DrawStream;
    use super::super::sampler::Sampling;
    use super::super::scheduler::{Bounds, Finish, Finished};
    use super::*;

    fn engine(backend: FakeBackend) -> (Engine, oneshot::Receiver<()>) {
        let scheduler = Scheduler::new(Box::new(backend), Bounds { max_running: 2, kv_tokens: 1_000_000 });
        let (ended, has_ended) = oneshot::channel();
        (Engine::start(scheduler, None, ended).unwrap(), has_ended)
    }

    fn job(rid: &str, max_new_tokens: usize) -> (Job, oneshot::Receiver<Finished>) {
        let (reply, answer) = oneshot::channel();
        let job = Job {
            rid: rid.to_owned(),
            prompt: vec![TokenId(1)],
            max_new_tokens,
            min_new_tokens: 0,
            sampling: Sampling::default(),
            stop_ids: Arc::new(BTreeSet::new()),
            poison_replacement: TokenId(0),
            draws: DrawStream::of_seed(1),
            return_logprob: false,
            reply,
        };
        (job, answer)
    }

    #[tokio::test]
    async fn commands_reach_a_thread_that_is_busy() {
        let (engine, has_ended) = engine(FakeBackend::new(4));
        let handle = engine.handle();
        let (endless, endless_answer) = job("endless", 100_000);
        let (short, short_answer) = job("short", 3);
        handle.submit(endless).unwrap();
        handle.submit(short).unwrap();
        assert_eq!(short_answer.await.unwrap().finish, Finish::Length);
        assert!(!handle.flush().await.unwrap());
        assert!(!handle.replace(Box::new(FakeBackend::new(4))).await.unwrap());
        handle.abort(AbortTarget::Prefix("end".to_owned())).unwrap();
        assert_eq!(endless_answer.await.unwrap().finish, Finish::AbortedRunning);
        assert!(handle.flush().await.unwrap());
        assert!(handle.replace(Box::new(FakeBackend::new(4))).await.unwrap());
        engine.join().unwrap();
        assert!(has_ended.await.is_err());
        assert_eq!(handle.flush().await, Err(EngineGone));
    }

    #[tokio::test]
    async fn a_broken_model_ends_the_thread_with_its_reason() {
        let mut backend = FakeBackend::new(4);
        backend.fail_at_step = Some(3);
        let (engine, has_ended) = engine(backend);
        let (job, answer) = job("r", 100);
        engine.handle().submit(job).unwrap();
        assert!(answer.await.is_err());
        assert!(has_ended.await.is_err());
        assert_eq!(engine.join().unwrap_err().to_string(), "step failed: told to fail");
    }
}
