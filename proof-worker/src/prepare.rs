//! The one thread that makes other weights ready while the computing thread proves.
//!
//! Orders are done one after the other, so nobody else reads the weights while they take over or change in place.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use grail_ipc::jobs::ReloadOrder;
use grail_ipc::messages::RequestId;
use grail_process::fault::{Armed, Point};
use grail_protocol::ids::WeightsHash;
use tokio::time::Instant;
use tracing::{debug, info};

use crate::compute::{Known, Outcome, Outcomes, Reload, Work, failed, panic_text};
use crate::error::WorkerError;
use crate::prover::{ComputeError, Prepared, Reloader, Retired, Way};

/// What follows once the weights are ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    Wait,
    TakeOver,
}

/// Weights that are wanted.
pub(crate) struct Order {
    pub id: RequestId,
    pub order: ReloadOrder,
    pub then: Then,
    /// When it was given.
    pub began: Instant,
    pub outcomes: Outcomes,
}

/// Weights that wait for their order to take over.
struct Staged {
    prepared: Box<dyn Prepared>,
    /// Whether they were read from their folder.
    anew: bool,
}

/// The thread's state. What holds tensors comes before the sender, whose end lets the computing thread end: libtorch must not be
/// torn down under them.
pub(crate) struct Preparer {
    staged: Option<Staged>,
    reloader: Box<dyn Reloader>,
    known: Arc<Known>,
    faults: Arc<Armed>,
    work: mpsc::Sender<Work>,
}

impl Preparer {
    pub(crate) fn new(
        reloader: Box<dyn Reloader>,
        known: Arc<Known>,
        faults: Arc<Armed>,
        work: mpsc::Sender<Work>,
    ) -> Self {
        Self { staged: None, reloader, known, faults, work }
    }

    /// Starts the thread; it ends when the sender that is returned is dropped.
    ///
    /// # Errors
    /// [`WorkerError::Start`].
    pub(crate) fn start(mut self) -> Result<mpsc::Sender<Order>, WorkerError> {
        let (orders, inbox) = mpsc::channel::<Order>();
        let life = move || {
            while let Ok(order) = inbox.recv() {
                self.obey(order);
            }
        };
        std::thread::Builder::new()
            .name("grail-reload".into())
            .spawn(life)
            .map_err(|source| WorkerError::Start { what: "start the loading thread", source })?;
        Ok(orders)
    }

    fn obey(&mut self, Order { id, order, then, began, outcomes }: Order) {
        if outcomes.is_closed() {
            debug!("Skipped an order whose sender has gone.");
            return;
        }
        let (outcome, retired) = match then {
            Then::Wait => match self.stage(&order) {
                Ok(weights) => (Outcome::Staged { id, weights }, None),
                Err(error) => (failed(id, error), None),
            },
            Then::TakeOver => match self.reload(&order, began) {
                Ok((reload, retired)) => (Outcome::Reloaded { id, reload }, retired),
                Err(error) => (failed(id, error), None),
            },
        };
        // Told before the old weights are freed.
        drop(outcomes.send(outcome));
        drop(retired);
    }

    /// Makes weights ready; the answer names those that the next order finds ready.
    fn stage(&mut self, order: &ReloadOrder) -> Result<WeightsHash, ComputeError> {
        let present = self.present()?;
        if present == order.weights && !order.anew {
            return Ok(present);
        }
        let started = Instant::now();
        let prepared = self.prepare(order)?;
        if !prepared.is_ready() {
            info!(weights = %order.weights, "The weights cannot lie ready; they will be changed in place when they are due.");
            return Ok(present);
        }
        let Way { from_changes, in_shadow } = prepared.way();
        info!(weights = %order.weights, from_changes, in_shadow, took = ?started.elapsed(), "Other weights are ready.");
        self.staged = Some(Staged { prepared, anew: order.anew });
        Ok(order.weights)
    }

    fn reload(&mut self, order: &ReloadOrder, began: Instant) -> Result<(Reload, Option<Retired>), ComputeError> {
        self.faults.pass(Point::Reload);
        if self.present()? == order.weights && !order.anew {
            let way = Way { from_changes: false, in_shadow: false };
            let reload = Reload { weights: order.weights, stall: Duration::ZERO, total: began.elapsed(), way };
            return Ok((reload, None));
        }
        let is_wanted = |staged: &Staged| staged.prepared.weights() == order.weights && (staged.anew || !order.anew);
        let prepared = match self.staged.take().filter(is_wanted) {
            Some(staged) => staged.prepared,
            None => self.prepare(order)?,
        };
        let (weights, way) = (prepared.weights(), prepared.way());
        let (done, taken_over) = mpsc::channel();
        let gone = || ComputeError::Reload { detail: "the computing thread is gone".to_owned() };
        self.work.send(Work::TakeOver { prepared, done }).map_err(|_| gone())?;
        let (retired, stall) = taken_over.recv().map_err(|_| gone())?;
        let reload = Reload { weights, stall, total: began.elapsed(), way };
        let retired = retired?;
        let Way { from_changes, in_shadow } = way;
        info!(%weights, ?stall, total = ?reload.total, from_changes, in_shadow, "Other weights are in place.");
        Ok((reload, Some(retired)))
    }

    fn present(&self) -> Result<WeightsHash, ComputeError> {
        self.known.weights().ok_or_else(|| ComputeError::Reload { detail: "no weights are loaded".to_owned() })
    }

    /// Frees what was ready before, since there is no memory for three, and makes the weights of `order` ready.
    fn prepare(&mut self, order: &ReloadOrder) -> Result<Box<dyn Prepared>, ComputeError> {
        self.staged = None;
        let folder = order.folder.display();
        let prepared = catch_unwind(AssertUnwindSafe(|| self.reloader.prepare(order))).unwrap_or_else(|panic| {
            Err(ComputeError::Reload { detail: format!("loading {folder} panicked: {}", panic_text(&*panic)) })
        })?;
        let (found, expected) = (prepared.weights(), order.weights);
        if found != expected {
            let detail = format!("folder {folder} holds weights {found}, the command names {expected}");
            return Err(ComputeError::Reload { detail });
        }
        Ok(prepared)
    }
}
