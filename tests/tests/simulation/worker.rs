//! A worker without a process: it proves by arithmetic that the checks can repeat, and fails as the schedule says.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use grail_ipc::jobs::{GroupProof, MemberProof, ProveJob, ReloadOrder, RowFacts, VerifyJob};
use grail_ipc::messages::{Epoch, Failed, Hello, PROTOCOL_VERSION, Pong, Reloaded, RequestId, Severity, SlotId};
use grail_ipc::{LostConnection, RequestError};
use grail_process::cause::{DeathCause, ExitCause};
use grail_process::{Exit, Incarnation, NotReady, Process, Role, Signal, StartError, StopPlan};
use grail_protocol::constants::PRIME_Q;
use grail_protocol::ids::{TokenId, WeightsHash};
use grail_supervisor::fleet::{Heartbeat, SlotFacts, Target, WorkerLink, watch_worker};
use tokio::sync::{Mutex, Notify, watch};

use crate::schedule::{WorkerFault, derived};

/// A process that is only a state.
#[derive(Debug)]
pub struct SimProcess {
    pid: i32,
    exit: std::sync::Mutex<Option<Exit>>,
    /// Wakes those who wait in the order in which they came, so that a seed is repeatable; a watch would not.
    ended: Notify,
    /// It answers nothing, not even signals that can be ignored.
    frozen: AtomicBool,
}

impl SimProcess {
    fn end(&self, cause: ExitCause) {
        let mut exit = self.exit.lock().unwrap();
        if exit.is_none() {
            *exit = Some(Exit { cause, killed: 0, survivors: Vec::new() });
            self.ended.notify_waiters();
        }
    }

    fn has_ended(&self) -> bool {
        self.exit.lock().unwrap().is_some()
    }

    fn crash(&self) {
        self.end(ExitCause::Signal { signal: Signal::SIGSEGV, core: false });
    }

    async fn gone(&self) -> Exit {
        loop {
            let ended = self.ended.notified();
            if let Some(exit) = self.exit.lock().unwrap().clone() {
                return exit;
            }
            ended.await;
        }
    }

    async fn hang(&self) -> Exit {
        self.frozen.store(true, Ordering::Relaxed);
        self.gone().await
    }
}

impl Process for SimProcess {
    fn pid(&self) -> i32 {
        self.pid
    }

    async fn wait(&self) -> Exit {
        self.gone().await
    }

    async fn stop(&self, plan: &StopPlan) -> Result<Exit, grail_process::Unkillable> {
        if let Some(step) = plan.steps.first() {
            if self.frozen.load(Ordering::Relaxed) {
                tokio::time::sleep(step.grace).await;
            } else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                self.end(ExitCause::Code(0));
            }
        }
        self.end(ExitCause::Signal { signal: Signal::SIGKILL, core: false });
        Ok(self.gone().await)
    }

    fn last_lines(&self) -> Vec<String> {
        vec!["simulated".to_owned()]
    }

    fn was_oom_killed(&self) -> bool {
        false
    }
}

/// Starts simulated workers for one slot.
pub struct SimRole {
    pub seed: u64,
    pub slot: SlotId,
    pub target: watch::Receiver<Target>,
    pub facts: SlotFacts,
    pub heartbeat: Heartbeat,
    /// By incarnation.
    pub faults: Vec<Option<WorkerFault>>,
}

impl SimRole {
    fn fault(&self, incarnation: Incarnation) -> Option<WorkerFault> {
        let index = usize::try_from(incarnation.number).unwrap() - 1;
        self.faults.get(index).copied().flatten()
    }
}

impl Role for SimRole {
    type Process = SimProcess;
    type Link = Arc<SimLink>;

    async fn start(&mut self, incarnation: Incarnation) -> Result<SimProcess, StartError> {
        if self.fault(incarnation) == Some(WorkerFault::NotSpawned) {
            return Err("no such program".into());
        }
        let pid = i32::try_from(1_000 * (u64::from(self.slot.0) + 1) + incarnation.number).unwrap();
        Ok(SimProcess { pid, exit: std::sync::Mutex::new(None), ended: Notify::new(), frozen: AtomicBool::new(false) })
    }

    fn ready(
        &mut self,
        process: Arc<SimProcess>,
        incarnation: Incarnation,
    ) -> impl Future<Output = Result<Self::Link, NotReady>> + Send + 'static {
        let (slot, seed) = (self.slot, self.seed);
        let fault = self.fault(incarnation);
        // A worker reads the folder when it starts, whatever is wanted when it is ready.
        let wanted = self.target.borrow().weights;
        let weights = if fault == Some(WorkerFault::ForeignFolder) { WeightsHash(wanted.0 ^ 1) } else { wanted };
        async move {
            let loading = derived(&[seed, 1, slot.0.into(), incarnation.number]) % 8_000;
            tokio::time::sleep(Duration::from_millis(500 + loading)).await;
            match fault {
                Some(WorkerFault::DiesStarting) => {
                    process.crash();
                    std::future::pending::<()>().await;
                }
                Some(WorkerFault::HangsStarting) => drop(process.hang().await),
                Some(WorkerFault::OldVersion) => {
                    return Err(NotReady(DeathCause::VersionMismatch { ours: PROTOCOL_VERSION, theirs: 0 }));
                }
                _ => {}
            }
            let hello = Hello {
                protocol: PROTOCOL_VERSION,
                build: "simulated".to_owned(),
                slot,
                epoch: Epoch(incarnation.number),
                token: Vec::new(),
                pid: u32::try_from(process.pid).unwrap(),
                device: "simulated".to_owned(),
                weights: Some(weights),
            };
            Ok(Arc::new(SimLink {
                seed,
                hello,
                process,
                fault,
                started: AtomicU64::new(0),
                weights: std::sync::Mutex::new(weights),
                compute: Mutex::new(()),
            }))
        }
    }

    fn watch(&mut self, link: &Self::Link) -> impl Future<Output = DeathCause> + Send + 'static {
        watch_worker(link.clone(), self.heartbeat, self.facts.clone())
    }
}

/// The connection to a simulated worker.
#[derive(Debug)]
pub struct SimLink {
    seed: u64,
    hello: Hello,
    process: Arc<SimProcess>,
    fault: Option<WorkerFault>,
    /// Groups that it began.
    started: AtomicU64,
    weights: std::sync::Mutex<WeightsHash>,
    /// One group after the other.
    compute: Mutex<()>,
}

impl SimLink {
    fn weights(&self) -> WeightsHash {
        *self.weights.lock().unwrap()
    }

    fn failed(&self, severity: Severity, code: &str) -> RequestError {
        RequestError::Failed(Failed {
            id: RequestId(0),
            epoch: self.hello.epoch,
            severity,
            code: code.to_owned(),
            detail: "simulated".to_owned(),
        })
    }

    async fn answer(&self, job: &ProveJob) -> Result<GroupProof, RequestError> {
        let _turn = self.compute.lock().await;
        let nth = self.started.fetch_add(1, Ordering::Relaxed) + 1;
        let took = 500 + derived(&[self.seed, 2, nth, self.hello.slot.0.into(), job.tokens() as u64]) % 9_000;
        tokio::time::sleep(Duration::from_millis(took)).await;
        match self.fault {
            Some(WorkerFault::Dies { nth: at }) if nth == at => self.process.crash(),
            Some(WorkerFault::AnswersAfterDeath { nth: at }) if nth == at => {
                self.process.crash();
                tokio::time::sleep(Duration::from_millis(took * 3)).await;
                return Ok(proof(job, self.weights()));
            }
            Some(WorkerFault::HangsProving { nth: at }) if nth == at => std::future::pending().await,
            Some(WorkerFault::Freezes { nth: at }) if nth == at => drop(self.process.hang().await),
            Some(WorkerFault::Nonsense { nth: at }) if nth == at => {
                return Err(RequestError::WrongKind { found: "nonsense".to_owned() });
            }
            Some(WorkerFault::OutOfMemory { nth: at }) if nth >= at => {
                return Err(self.failed(Severity::Retryable, "out_of_memory"));
            }
            Some(WorkerFault::NotFinite { nth: at }) if nth == at => {
                return Err(self.failed(Severity::FatalForGroup, "non_finite"));
            }
            _ => {}
        }
        if job.weights != self.weights() {
            return Err(self.failed(Severity::Retryable, "wrong_weights"));
        }
        Ok(proof(job, self.weights()))
    }

    /// `answer`, unless the process dies before.
    async fn unless_gone<T>(&self, answer: impl Future<Output = Result<T, RequestError>>) -> Result<T, RequestError> {
        tokio::select! {
            biased;
            _ = self.process.gone() => Err(RequestError::Lost(LostConnection::PeerHungUp)),
            answer = answer => answer,
        }
    }
}

impl WorkerLink for SimLink {
    fn hello(&self) -> &Hello {
        &self.hello
    }

    fn prove(&self, job: Arc<ProveJob>) -> BoxFuture<'_, Result<GroupProof, RequestError>> {
        async move {
            // An answer that was under way when the process died arrives all the same.
            if matches!(self.fault, Some(WorkerFault::AnswersAfterDeath { .. })) && !self.process.has_ended() {
                return self.answer(&job).await;
            }
            self.unless_gone(self.answer(&job)).await
        }
        .boxed()
    }

    fn stage(&self, order: ReloadOrder) -> BoxFuture<'_, Result<WeightsHash, RequestError>> {
        // It has no memory for two copies.
        async move { Ok(self.hello.weights.unwrap_or(order.weights)) }.boxed()
    }

    fn verify<'l>(&'l self, _: &'l VerifyJob) -> BoxFuture<'l, Result<Vec<RowFacts>, RequestError>> {
        async { Err(self.failed(Severity::Retryable, "bad_request")) }.boxed()
    }

    fn reload(&self, order: ReloadOrder) -> BoxFuture<'_, Result<Reloaded, RequestError>> {
        let reload = async move {
            tokio::time::sleep(Duration::from_millis(700)).await;
            match self.fault {
                Some(WorkerFault::DiesReloading) => self.process.crash(),
                Some(WorkerFault::HangsReloading) => std::future::pending().await,
                Some(WorkerFault::RefusesReload | WorkerFault::ForeignFolder) => {
                    return Err(self.failed(Severity::Retryable, "reload_failed"));
                }
                _ => {}
            }
            // Between two groups.
            let _turn = self.compute.lock().await;
            *self.weights.lock().unwrap() = order.weights;
            Ok(Reloaded {
                id: RequestId(0),
                epoch: self.hello.epoch,
                weights: order.weights,
                stall_us: 0,
                total_us: 0,
                from_changes: false,
                in_shadow: true,
            })
        };
        async move { self.unless_gone(reload).await }.boxed()
    }

    fn ping(&self) -> BoxFuture<'_, Result<Pong, RequestError>> {
        let pong = async {
            if self.process.frozen.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
            Ok(Pong {
                id: RequestId(0),
                epoch: self.hello.epoch,
                weights: Some(self.weights()),
                queued: 0,
                resident_bytes: 0,
                groups: 0,
                rollouts: 0,
            })
        };
        async move { self.unless_gone(pong).await }.boxed()
    }

    fn drain(&self) -> BoxFuture<'_, Result<(), RequestError>> {
        let drain = async {
            let _turn = self.compute.lock().await;
            Ok(())
        };
        async move { self.unless_gone(drain).await }.boxed()
    }

    fn closed(&self) -> BoxFuture<'_, LostConnection> {
        async {
            self.process.gone().await;
            LostConnection::PeerHungUp
        }
        .boxed()
    }
}

/// The proof that any worker with `weights` makes of a job.
pub fn proof(job: &ProveJob, weights: WeightsHash) -> GroupProof {
    let members = job.completions.iter().map(|completion| MemberProof {
        sketches: sketches(completion, job.prompt.len(), weights),
        logprobs: completion.iter().map(|token| -0.5 - (token.0 % 7) as f32).collect(),
        eos_probability: 0.5,
    });
    GroupProof {
        group: job.group,
        weights,
        prompt_sketches: sketches(&job.prompt, 0, weights),
        members: members.collect(),
        compute: Duration::ZERO,
    }
}

/// Sketches of `tokens` from `position` on.
pub fn sketches(tokens: &[TokenId], position: usize, weights: WeightsHash) -> Vec<u32> {
    let low = u64::try_from(weights.0 & u128::from(u64::MAX)).unwrap();
    let sketch = |(offset, token): (usize, &TokenId)| {
        let value = derived(&[low, (position + offset) as u64, token.0.into()]) % u64::from(PRIME_Q);
        u32::try_from(value).unwrap()
    };
    tokens.iter().enumerate().map(sketch).collect()
}
