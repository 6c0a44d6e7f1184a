//! The interpreters of one purpose with the queue before them.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::board::{Board, Job, Outcome, Seat, Work};
use super::protocol::{Reply, Status};
use super::role::{Ground, Purpose, Zygote};
use super::slot::{Note, Patience, Slot, tell_outcome};
use crate::evaluator::EvaluatorError;

/// How often a program is given to an interpreter when sandboxes fail.
const ATTEMPTS: u32 = 3;

/// One interpreter, as seen from outside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterpreterState {
    /// Process of its helper, which leads its session; `None` while there is none.
    pub pid: Option<i32>,
    /// Whether it takes work or has some.
    pub is_ready: bool,
    /// Why it is not started any more.
    pub given_up: Option<String>,
}

/// Interpreters of one purpose.
#[derive(Debug)]
pub(super) struct Fleet {
    purpose: Purpose,
    submit: mpsc::UnboundedSender<Job>,
    /// One for every job that may wait or run.
    room: Semaphore,
    states: watch::Receiver<Vec<InterpreterState>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    /// Ends the tasks.
    end: CancellationToken,
}

/// What came of the tries to evaluate one thing.
pub(super) enum Answer {
    Reply(Reply, usize),
    /// Pairs that shared a child got no answer together.
    NotShared,
}

impl Fleet {
    /// Starts `count` interpreters; at most `queue` jobs wait or run, whoever comes then waits to be let in.
    pub(super) fn start(
        ground: &Arc<Ground>,
        purpose: Purpose,
        count: usize,
        queue: usize,
        patience: Patience,
    ) -> Self {
        let (submit, submissions) = mpsc::unbounded_channel();
        let (tell, notes) = mpsc::unbounded_channel();
        let (publish, states) = watch::channel(vec![InterpreterState::default(); count]);
        let end = CancellationToken::new();
        let mut tasks = Vec::with_capacity(count + 1);
        let mut slots = Vec::with_capacity(count);
        for index in 0..count {
            let (give, jobs) = mpsc::unbounded_channel();
            let name = format!("{}-{index}", purpose.name());
            let role = Zygote { ground: Arc::clone(ground), purpose, name };
            let slot = Slot::start(index, role, patience, jobs, tell.clone());
            tasks.push(tokio::spawn(slot.run(end.clone())));
            slots.push(give);
        }
        let dispatcher = Dispatcher { board: Board::new(purpose, count), slots, publish };
        tasks.push(tokio::spawn(dispatcher.run(submissions, notes, end.clone())));
        Self { purpose, submit, room: Semaphore::new(queue), states, tasks: Mutex::new(tasks), end }
    }

    /// Where the interpreters are.
    pub(super) fn states(&self) -> watch::Receiver<Vec<InterpreterState>> {
        self.states.clone()
    }

    /// Has `work` evaluated, by another interpreter than `avoid`; tries again when a sandbox fails.
    pub(super) async fn evaluate(&self, work: &Work, avoid: Option<usize>) -> Result<Answer, EvaluatorError> {
        let failed = |attempts, detail| EvaluatorError::Sandbox { attempts, detail };
        let Ok(_place) = self.room.acquire().await else {
            return Err(failed(0, "the pool was shut down".to_owned()));
        };
        let mut detail = String::new();
        for attempt in 1..=ATTEMPTS {
            match self.submit(work.clone(), avoid).await {
                Some(Outcome::Answered { reply, slot }) if reply.status == Status::Done => {
                    return Ok(Answer::Reply(reply, slot));
                }
                Some(Outcome::Answered { reply, .. }) => {
                    return Err(EvaluatorError::Undecidable { detail: reply.detail });
                }
                Some(Outcome::NotShared) => return Ok(Answer::NotShared),
                Some(Outcome::NoInterpreter { detail }) => return Err(failed(attempt, detail)),
                Some(Outcome::Failed { detail: failure }) => {
                    debug!(purpose = self.purpose.name(), attempt, failure, "A sandbox failed.");
                    detail = failure;
                }
                None => return Err(failed(attempt, "the pool was shut down".to_owned())),
            }
        }
        warn!(purpose = self.purpose.name(), attempts = ATTEMPTS, detail, "Sandboxes failed; there is no verdict.");
        Err(failed(ATTEMPTS, detail))
    }

    async fn submit(&self, work: Work, avoid: Option<usize>) -> Option<Outcome> {
        let (reply, outcome) = oneshot::channel();
        self.submit.send(Job { work, avoid, reply }).ok()?;
        outcome.await.ok()
    }

    /// Ends all interpreters and waits until nothing is left of them.
    pub(super) async fn shut_down(&self) {
        self.room.close();
        self.end.cancel();
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        for task in tasks {
            if let Err(error) = task.await {
                warn!(%error, "A task of the evaluators failed.");
            }
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

/// Brings jobs and interpreters together.
struct Dispatcher {
    board: Board,
    slots: Vec<mpsc::UnboundedSender<Vec<Job>>>,
    publish: watch::Sender<Vec<InterpreterState>>,
}

impl Dispatcher {
    async fn run(
        mut self,
        mut submissions: mpsc::UnboundedReceiver<Job>,
        mut notes: mpsc::UnboundedReceiver<Note>,
        end: CancellationToken,
    ) {
        loop {
            tokio::select! {
                () = end.cancelled() => return,
                job = submissions.recv() => match job {
                    Some(job) => self.board.push(job),
                    None => return,
                },
                // A pool without interpreters never has one.
                Some(note) = notes.recv() => self.on_note(note),
            }
            self.assign();
        }
    }

    fn on_note(&mut self, note: Note) {
        let state = InterpreterState {
            pid: note.pid,
            is_ready: note.seat == Seat::Idle,
            given_up: if let Seat::GivenUp(reason) = &note.seat { Some(reason.clone()) } else { None },
        };
        self.board.set(note.slot, note.seat);
        self.publish.send_if_modified(|states| match states.get_mut(note.slot) {
            Some(known) if *known != state => {
                *known = state;
                true
            }
            _ => false,
        });
    }

    fn assign(&mut self) {
        if let Some(detail) = self.board.given_up() {
            for job in self.board.drain() {
                tell_outcome(job, Outcome::NoInterpreter { detail: detail.clone() });
            }
        }
        while let Some((slot, jobs)) = self.board.next() {
            let Some(Err(refused)) = self.slots.get(slot).map(|slot| slot.send(jobs)) else { continue };
            // Only at the end of the pool.
            for job in refused.0 {
                tell_outcome(job, Outcome::NoInterpreter { detail: "the pool was shut down".to_owned() });
            }
        }
    }
}
