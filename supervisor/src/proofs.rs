//! The proof workers as seen by the engine: jobs go in, proofs come out, whoever makes them.

use std::collections::{BTreeMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt;
use futures::future::BoxFuture;
use grail_ipc::jobs::{GroupProof, ProveJob};
use grail_ipc::messages::SlotId;
use tokio::sync::{mpsc, oneshot};

/// Requests that a worker holds at once, so that its device never waits for the pipe.
pub const IN_FLIGHT_PER_WORKER: usize = 2;
/// A group that was on this many workers when they died is not given to a third.
pub const MAX_DEATHS_OF_A_GROUP: u32 = 2;
/// A group that was declined this often, for instance for want of memory, is dropped.
pub const MAX_DECLINES_OF_A_GROUP: u32 = 3;

/// Proof of one group, and who made it.
#[derive(Debug, Clone)]
pub struct Proof {
    pub slot: SlotId,
    pub group: GroupProof,
}

/// A proof that could not be made.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ProofError {
    #[error("{code}: {detail}")]
    Group { code: String, detail: String },
    #[error("worker {slot} declined ({code}): {detail}")]
    Declined { slot: SlotId, code: String, detail: String },
    /// The group's results are not finite: the worker is as suspect as the group.
    #[error("{code}: {detail}")]
    Suspect { slot: SlotId, code: String, detail: String },
    /// `blameless` if the worker was ended for a reason that has nothing to do with its work.
    #[error("worker {slot} is lost: {cause}")]
    WorkerLost { slot: SlotId, cause: String, blameless: bool },
    #[error("group was on {deaths} workers that died; its inputs are poisonous")]
    Poisonous { deaths: u32 },
    #[error("no worker is left")]
    NoWorkers,
    #[error("the proof was abandoned by a defect of this program")]
    Abandoned,
}

/// Maker of proofs.
pub trait Prover: Send + Sync + std::fmt::Debug {
    /// Proves one group.
    fn prove(&self, job: Arc<ProveJob>) -> BoxFuture<'_, Result<Proof, ProofError>>;
}

/// A worker that takes requests, one incarnation of a slot.
pub trait Worker: Send + Sync + std::fmt::Debug {
    /// The slot it runs in.
    fn slot(&self) -> SlotId;

    /// Proves one group; [`ProofError::WorkerLost`] when the process is gone.
    fn prove(&self, job: Arc<ProveJob>) -> BoxFuture<'static, Result<Proof, ProofError>>;
}

/// Message to the dispatcher.
#[derive(Debug)]
enum Message {
    Job(Arc<ProveJob>, oneshot::Sender<Result<Proof, ProofError>>),
    Ready(Arc<dyn Worker>),
    Lost(SlotId),
    NoMoreWorkers,
}

/// What a worker has to do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    pub jobs: usize,
    pub tokens: usize,
    /// Groups that it has proved since it was started.
    pub proved: u64,
}

type Loads = Arc<Mutex<BTreeMap<SlotId, Load>>>;

/// The engine's end of the dispatcher.
#[derive(Debug, Clone)]
pub struct ProofQueue {
    sender: mpsc::UnboundedSender<Message>,
    loads: Loads,
}

impl ProofQueue {
    /// Starts a dispatcher without workers; it ends when the last clone of the queue is gone.
    #[must_use]
    pub fn start() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        let loads = Loads::default();
        let dispatcher = Dispatcher { loads: loads.clone(), ..Dispatcher::default() };
        tokio::spawn(dispatcher.run(receiver));
        Self { sender, loads }
    }

    /// What each worker that takes requests has to do.
    #[must_use]
    pub fn loads(&self) -> BTreeMap<SlotId, Load> {
        self.loads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A worker is ready for requests.
    pub fn worker_ready(&self, worker: Arc<dyn Worker>) {
        self.send(Message::Ready(worker));
    }

    /// The worker of `slot` takes no more requests. Those in flight are answered or fail by themselves; a failed one is sent
    /// elsewhere.
    pub fn worker_lost(&self, slot: SlotId) {
        self.send(Message::Lost(slot));
    }

    /// All slots have given up: waiting jobs fail instead of waiting for ever.
    pub fn no_more_workers(&self) {
        self.send(Message::NoMoreWorkers);
    }

    fn send(&self, message: Message) {
        // The dispatcher lives as long as any queue does; it is gone only when the runtime is being torn down.
        if self.sender.send(message).is_err() {
            tracing::debug!("The proof dispatcher has ended.");
        }
    }
}

impl Prover for ProofQueue {
    fn prove(&self, job: Arc<ProveJob>) -> BoxFuture<'_, Result<Proof, ProofError>> {
        let (answer, waiting) = oneshot::channel();
        self.send(Message::Job(job, answer));
        async { waiting.await.unwrap_or(Err(ProofError::Abandoned)) }.boxed()
    }
}

#[derive(Debug)]
struct Pending {
    job: Arc<ProveJob>,
    deaths: u32,
    declined: u32,
    /// The worker that declined it last: another one is asked if there is any.
    avoid: Option<SlotId>,
    /// Nothing finite came out once; the second time, by another worker, it is the group's fault.
    is_suspect: bool,
    answer: oneshot::Sender<Result<Proof, ProofError>>,
}

#[derive(Debug)]
struct Lane {
    worker: Arc<dyn Worker>,
    load: Load,
    /// It has a job that was on a worker that died: nothing beside it shares the blame should it happen again.
    is_alone: bool,
}

impl Lane {
    fn has_room(&self, pending: &Pending) -> bool {
        let room = if pending.deaths > 0 { 1 } else { IN_FLIGHT_PER_WORKER };
        !self.is_alone && self.load.jobs < room
    }
}

/// One task owns all lanes and the queue: least loaded lane by tokens, two jobs a lane.
#[derive(Debug, Default)]
struct Dispatcher {
    lanes: Vec<Lane>,
    waiting: VecDeque<Pending>,
    closed: bool,
    loads: Loads,
}

/// A job that came back from a worker.
#[derive(Debug)]
struct Finished {
    worker: Arc<dyn Worker>,
    pending: Pending,
    result: Result<Proof, ProofError>,
}

impl Dispatcher {
    async fn run(mut self, mut messages: mpsc::UnboundedReceiver<Message>) {
        let mut running = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                biased;
                message = messages.recv() => match message {
                    Some(message) => self.take(message),
                    None => return,
                },
                Some(finished) = running.join_next(), if !running.is_empty() => match finished {
                    Ok(finished) => self.finish(finished),
                    Err(error) => tracing::error!(%error, "A proof task ended abnormally."),
                },
            }
            while let Some((worker, pending)) = self.next() {
                running.spawn(async move {
                    let proving = AssertUnwindSafe(worker.prove(pending.job.clone())).catch_unwind().await;
                    // A defect here costs the group a try, not the lane its place.
                    let result = proving.unwrap_or(Err(ProofError::Abandoned));
                    Finished { worker, pending, result }
                });
            }
            let loads = self.lanes.iter().map(|lane| (lane.worker.slot(), lane.load)).collect();
            *self.loads.lock().unwrap_or_else(PoisonError::into_inner) = loads;
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Job(job, answer) => {
                self.waiting.push_back(Pending { job, deaths: 0, declined: 0, avoid: None, is_suspect: false, answer })
            }
            Message::Ready(worker) => {
                self.closed = false;
                self.lanes.retain(|lane| lane.worker.slot() != worker.slot());
                self.lanes.push(Lane { worker, load: Load::default(), is_alone: false });
            }
            Message::Lost(slot) => self.lanes.retain(|lane| lane.worker.slot() != slot),
            Message::NoMoreWorkers => self.closed = true,
        }
        if self.closed && self.lanes.is_empty() {
            for pending in self.waiting.drain(..) {
                answer(pending, Err(ProofError::NoWorkers));
            }
        }
    }

    fn has_other_than(&self, slot: SlotId) -> bool {
        self.lanes.iter().any(|lane| lane.worker.slot() != slot)
    }

    /// The next job that some lane has room for, and its lane.
    fn next(&mut self) -> Option<(Arc<dyn Worker>, Pending)> {
        // A window that was given up drops its futures; their jobs need no proof any more.
        self.waiting.retain(|pending| !pending.answer.is_closed());
        // One lane is kept for a job that needs it to itself: later jobs would fill each lane that empties.
        let mut reserved = None;
        let (place, lane) = self.waiting.iter().enumerate().find_map(|(place, pending)| {
            let suits = |lane: &&Lane| {
                let slot = lane.worker.slot();
                reserved != Some(slot) && (pending.avoid != Some(slot) || !self.has_other_than(slot))
            };
            let suiting = || self.lanes.iter().filter(suits);
            // Of idle lanes the one that has proved least: where proofs are fast all lanes are idle, and one would get all.
            let with_room =
                suiting().filter(|lane| lane.has_room(pending)).min_by_key(|lane| (lane.load.tokens, lane.load.proved));
            if with_room.is_none() && pending.deaths > 0 && reserved.is_none() {
                reserved =
                    suiting().min_by_key(|lane| (lane.load.jobs, lane.load.tokens)).map(|lane| lane.worker.slot());
            }
            Some((place, with_room?.worker.clone()))
        })?;
        let pending = self.waiting.remove(place)?;
        let lane = self.lanes.iter_mut().find(|known| Arc::ptr_eq(&known.worker, &lane))?;
        lane.load.jobs += 1;
        lane.load.tokens += pending.job.tokens();
        lane.is_alone = pending.deaths > 0;
        Some((lane.worker.clone(), pending))
    }

    fn finish(&mut self, finished: Finished) {
        let Finished { worker, mut pending, result } = finished;
        // Another incarnation of the slot may have taken the lane since.
        if let Some(lane) = self.lanes.iter_mut().find(|lane| Arc::ptr_eq(&lane.worker, &worker)) {
            lane.load.jobs -= 1;
            lane.is_alone &= lane.load.jobs > 0;
            lane.load.tokens -= pending.job.tokens();
            lane.load.proved += u64::from(result.is_ok());
        }
        match result {
            Err(ProofError::WorkerLost { slot, cause, blameless }) => {
                self.lanes.retain(|lane| !Arc::ptr_eq(&lane.worker, &worker));
                pending.deaths += u32::from(!blameless);
                tracing::warn!(%slot, group = %pending.job.group, deaths = pending.deaths, cause, "A group lost its worker.");
                if pending.deaths >= MAX_DEATHS_OF_A_GROUP {
                    let deaths = pending.deaths;
                    answer(pending, Err(ProofError::Poisonous { deaths }));
                } else if self.closed && self.lanes.is_empty() {
                    answer(pending, Err(ProofError::NoWorkers));
                } else {
                    self.waiting.push_front(pending);
                }
            }
            Err(ProofError::Declined { slot, .. }) if pending.declined + 1 < MAX_DECLINES_OF_A_GROUP => {
                pending.declined += 1;
                pending.avoid = Some(slot);
                self.waiting.push_front(pending);
            }
            Err(ProofError::Suspect { slot, .. }) if !pending.is_suspect && self.has_other_than(slot) => {
                (pending.is_suspect, pending.avoid) = (true, Some(slot));
                self.waiting.push_front(pending);
            }
            result => answer(pending, result),
        }
    }
}

fn answer(pending: Pending, result: Result<Proof, ProofError>) {
    if pending.answer.send(result).is_err() {
        tracing::debug!(group = %pending.job.group, "Nobody waits for this proof any more.");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use grail_protocol::ids::{GroupIndex, TokenId, WeightsHash};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    /// What a worker does with every job.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Deed {
        Proves,
        Dies,
        /// Nothing finite comes out.
        Spoils,
    }

    /// Answers at once.
    #[derive(Debug)]
    struct FakeWorker {
        slot: SlotId,
        deed: Deed,
        proved: AtomicUsize,
        groups: Mutex<Vec<GroupIndex>>,
    }

    impl FakeWorker {
        fn new(slot: u32, deed: Deed) -> Arc<Self> {
            Arc::new(Self { slot: SlotId(slot), deed, proved: AtomicUsize::new(0), groups: Mutex::default() })
        }
    }

    impl Worker for FakeWorker {
        fn slot(&self) -> SlotId {
            self.slot
        }

        fn prove(&self, job: Arc<ProveJob>) -> BoxFuture<'static, Result<Proof, ProofError>> {
            self.groups.lock().unwrap().push(job.group);
            self.proved.fetch_add(1, Ordering::Relaxed);
            let (slot, deed) = (self.slot, self.deed);
            async move {
                tokio::task::yield_now().await;
                match deed {
                    Deed::Proves => {}
                    Deed::Dies => {
                        return Err(ProofError::WorkerLost { slot, cause: "killed".into(), blameless: false });
                    }
                    Deed::Spoils => {
                        return Err(ProofError::Suspect { slot, code: "non_finite".into(), detail: "NaN".into() });
                    }
                }
                let (group, weights) = (job.group, job.weights);
                let (prompt_sketches, members, compute) = (Vec::new(), Vec::new(), Duration::ZERO);
                Ok(Proof { slot, group: GroupProof { group, weights, prompt_sketches, members, compute } })
            }
            .boxed()
        }
    }

    fn job(group: i64) -> Arc<ProveJob> {
        Arc::new(ProveJob {
            group: GroupIndex(group),
            weights: WeightsHash(1),
            randomness: vec![1],
            eos_token: TokenId(0),
            prompt: vec![TokenId(1); 4],
            completions: vec![vec![TokenId(2); 32]],
        })
    }

    #[tokio::test]
    async fn both_workers_get_work() {
        let queue = ProofQueue::start();
        let workers = [FakeWorker::new(0, Deed::Proves), FakeWorker::new(1, Deed::Proves)];
        for worker in &workers {
            queue.worker_ready(worker.clone());
        }
        futures::future::try_join_all((0..40).map(|group| queue.prove(job(group)))).await.unwrap();
        for worker in &workers {
            assert!(worker.proved.load(Ordering::Relaxed) >= 10, "{worker:?}");
        }
    }

    #[tokio::test]
    async fn idle_workers_take_turns() {
        let queue = ProofQueue::start();
        let workers = [FakeWorker::new(0, Deed::Proves), FakeWorker::new(1, Deed::Proves)];
        for worker in &workers {
            queue.worker_ready(worker.clone());
        }
        for group in 0..10 {
            queue.prove(job(group)).await.unwrap();
        }
        assert_eq!(workers.map(|worker| worker.proved.load(Ordering::Relaxed)), [5, 5]);
    }

    #[tokio::test]
    async fn a_group_of_a_dead_worker_goes_to_another_one() {
        let queue = ProofQueue::start();
        queue.worker_ready(FakeWorker::new(0, Deed::Dies));
        let proof = queue.prove(job(7));
        let survivor = FakeWorker::new(1, Deed::Proves);
        queue.worker_ready(survivor.clone());
        assert_eq!(proof.await.unwrap().slot, SlotId(1));
        assert_eq!(*survivor.groups.lock().unwrap(), [GroupIndex(7)]);
    }

    #[tokio::test]
    async fn a_group_that_kills_two_workers_is_poisonous() {
        let queue = ProofQueue::start();
        queue.worker_ready(FakeWorker::new(0, Deed::Dies));
        queue.worker_ready(FakeWorker::new(1, Deed::Dies));
        assert!(matches!(queue.prove(job(0)).await, Err(ProofError::Poisonous { deaths: 2 })));
    }

    #[tokio::test]
    async fn a_group_that_lost_its_worker_does_not_wait_behind_a_backlog() {
        let queue = ProofQueue::start();
        let survivor = FakeWorker::new(1, Deed::Proves);
        queue.worker_ready(FakeWorker::new(0, Deed::Dies));
        queue.worker_ready(survivor.clone());
        futures::future::try_join_all((0..60).map(|group| queue.prove(job(group)))).await.unwrap();
        let groups = survivor.groups.lock().unwrap();
        let late = groups.iter().rposition(|group| group.0 <= 3).unwrap();
        assert!(late < 20, "the dead worker's two groups were among the first four: {groups:?}");
    }

    #[tokio::test]
    async fn what_is_not_finite_is_proved_by_another_worker_if_there_is_one() {
        let queue = ProofQueue::start();
        let (sick, well) = (FakeWorker::new(0, Deed::Spoils), FakeWorker::new(1, Deed::Proves));
        queue.worker_ready(sick.clone());
        assert!(matches!(queue.prove(job(0)).await, Err(ProofError::Suspect { .. })), "nobody else is there");
        assert_eq!(sick.proved.load(Ordering::Relaxed), 1, "asked once");
        queue.worker_ready(well.clone());
        futures::future::try_join_all((1..9).map(|group| queue.prove(job(group)))).await.unwrap();
        assert!(sick.proved.load(Ordering::Relaxed) > 1);

        let queue = ProofQueue::start();
        queue.worker_ready(sick);
        queue.worker_ready(FakeWorker::new(2, Deed::Spoils));
        let error = queue.prove(job(9)).await.unwrap_err();
        assert!(matches!(error, ProofError::Suspect { slot: SlotId(2), .. }), "two of them agree: {error}");
    }

    #[tokio::test]
    async fn jobs_fail_when_no_worker_will_come_back() {
        let queue = ProofQueue::start();
        let proof = queue.prove(job(0));
        queue.no_more_workers();
        assert!(matches!(proof.await, Err(ProofError::NoWorkers)));
    }
}
