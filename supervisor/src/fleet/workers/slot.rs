//! One slot: what its process does reaches those who want to know, and its worker is brought to the weights that are wanted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use grail_ipc::messages::{Reloaded, SlotId};
use grail_process::cause::DeathCause;
use grail_process::state::GiveUp;
use grail_process::{
    ChildControl, ChildEvent, ChildPolicy, Events, Incarnation, Role, StopPlan, Supervised, supervise, with_causes,
};
use tokio::sync::{Semaphore, mpsc, watch};

use super::live::{LiveWorker, Refused};
use super::{Observers, SlotLimits};
use crate::fleet::control::SharedFacts;
use crate::fleet::link::{Target, WorkerLink};
use crate::journal::Event;

/// How long a worker that is to take other weights waits for those before it.
const TURN_PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Slot<L: WorkerLink> {
    pub id: SlotId,
    pub child: Supervised,
    pub live: watch::Receiver<Option<Arc<LiveWorker<L>>>>,
    pub facts: SharedFacts,
    pub orders: mpsc::UnboundedSender<Order>,
}

/// What a slot is told about its weights.
#[derive(Debug, Clone)]
pub(in crate::fleet) enum Order {
    /// Others are wanted: the target has changed.
    Roll,
    /// These will be wanted soon.
    Stage(Arc<Target>),
    /// Read the present ones from their folder again.
    ReadAnew,
}

/// What all slots share of a roll.
#[derive(Debug)]
pub(super) struct Rolling {
    pub target: watch::Receiver<Target>,
    pub orders: mpsc::UnboundedReceiver<Order>,
    /// One slot reloads at a time.
    pub turn: Arc<Semaphore>,
    /// One slot makes ready at a time; no reload waits for that.
    pub staging_turn: Arc<Semaphore>,
}

impl<L: WorkerLink> Slot<L> {
    pub(super) fn start<R: Role<Link = Arc<L>>>(
        id: SlotId,
        role: R,
        (orders, rolling): (mpsc::UnboundedSender<Order>, Rolling),
        limits: &SlotLimits,
        facts: SharedFacts,
        observers: &Observers,
    ) -> Self {
        let policy = ChildPolicy {
            name: format!("worker-{id}"),
            start_limit: limits.start,
            restart: limits.restart.clone(),
            stop: StopPlan::terminate(Duration::from_secs(5)),
            kill: StopPlan::kill(),
            last_incarnation: 0,
            jitter_seed: limits.jitter_seed.map(|seed| seed.wrapping_add(u64::from(id.0))),
        };
        let (child, events) = supervise(role, policy);
        let (publish, live) = watch::channel(None);
        let follower = Follower {
            slot: id,
            control: child.control(),
            facts: facts.clone(),
            publish,
            observers: observers.clone(),
            limits: limits.clone(),
            rolling,
            change: None,
            staging: None,
            is_offered: false,
            reads_anew: false,
            next: None,
            refusals: 0,
        };
        tokio::spawn(follower.run::<R>(events));
        Self { id, child, live, facts, orders }
    }
}

/// Brings a slot's events to those who want to know, and its worker to the weights that are wanted: only with them it gets work.
struct Follower<L: WorkerLink> {
    slot: SlotId,
    control: ChildControl,
    facts: SharedFacts,
    publish: watch::Sender<Option<Arc<LiveWorker<L>>>>,
    observers: Observers,
    limits: SlotLimits,
    rolling: Rolling,
    /// The reload or its preparation under way.
    change: Option<BoxFuture<'static, Change<L>>>,
    /// If that is a preparation: whether its turn has come.
    staging: Option<Arc<AtomicBool>>,
    /// Whether the queue gives work to the live worker.
    is_offered: bool,
    /// An operator wants the weights to be read again.
    reads_anew: bool,
    /// Weights that will be wanted soon.
    next: Option<Arc<Target>>,
    /// Times in a row that the slot's workers did not take the weights that are wanted.
    refusals: u32,
}

/// What became of a request to a worker about its weights.
struct Change<L: WorkerLink> {
    worker: Arc<LiveWorker<L>>,
    outcome: Outcome,
}

enum Outcome {
    Reloaded(Result<Reloaded, Refused>),
    /// With success or without: weights that are not ready beforehand take longer when they are due.
    Staged,
}

impl<L: WorkerLink> Follower<L> {
    async fn run<R: Role<Link = Arc<L>>>(mut self, mut events: Events<R>) {
        loop {
            tokio::select! {
                biased;
                event = events.recv() => match event {
                    Some(event) => self.take::<R>(event),
                    None => return,
                },
                change = under_way(&mut self.change) => {
                    (self.change, self.staging) = (None, None);
                    self.changed(change);
                }
                // Without orders the fleet is being ended; the last events still count.
                Some(order) = self.rolling.orders.recv() => self.obey(order),
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Roll => {
                // What was to be made ready for this roll is of no use behind it.
                let due = self.rolling.target.borrow().checkpoint;
                self.next.take_if(|next| next.checkpoint <= due);
            }
            Order::Stage(target) => self.next = Some(target),
            Order::ReadAnew => self.reads_anew = true,
        }
        self.bring_to_target();
    }

    fn take<R: Role<Link = Arc<L>>>(&mut self, event: ChildEvent<Arc<L>, R::Process>) {
        match event {
            ChildEvent::Started { incarnation, pid } => self.facts.change(|facts| {
                (facts.pid, facts.epoch, facts.weights) = (Some(pid), incarnation.number, None);
            }),
            ChildEvent::Ready { incarnation, link, .. } => self.ready(incarnation, link),
            ChildEvent::Draining { .. } => self.drain(),
            ChildEvent::Died { incarnation, cause, last_lines, .. } => self.died(incarnation, &cause, &last_lines),
            ChildEvent::GaveUp(reason) if reason != GiveUp::Quarantined => {
                self.note(Event::WorkerGivenUp { slot: self.slot.0, reason: reason.to_string() });
            }
            _ => {}
        }
    }

    /// Gives the live worker work if it has the wanted weights, else has it take them.
    fn bring_to_target(&mut self) {
        let Some(worker) = self.publish.borrow().clone() else { return };
        let target = self.rolling.target.borrow().clone();
        let has_them = worker.weights() == Some(target.weights);
        if !has_them {
            self.withdraw();
        }
        if !has_them && self.staging.as_ref().is_some_and(|begun| !begun.load(Ordering::Relaxed)) {
            // What still waits for its turn comes too late.
            (self.change, self.staging) = (None, None);
        }
        if self.change.is_some() {
            // Looked at again when that one is over.
            return;
        }
        if has_them && !self.reads_anew {
            self.refusals = 0;
            if !self.is_offered {
                self.is_offered = true;
                self.observers.queue.worker_ready(Arc::new(worker.clone()));
            }
            return self.stage_next(worker);
        }
        self.withdraw();
        let order = target.order(std::mem::take(&mut self.reads_anew));
        let (turn, limit) = (self.rolling.turn.clone(), self.limits.reload);
        let reload = async move {
            // One after the other reads fastest; but a worker that hangs must not hold up those that are well.
            let _turn = tokio::time::timeout(TURN_PATIENCE, turn.acquire()).await;
            let result = worker.reload(order, limit).await;
            Change { worker, outcome: Outcome::Reloaded(result) }
        };
        self.change = Some(reload.boxed());
    }

    /// Has the worker make ready what will be wanted soon, once, while it proves.
    fn stage_next(&mut self, worker: Arc<LiveWorker<L>>) {
        let Some(next) = self.next.clone().filter(|next| worker.is_to_stage(next.weights)) else { return };
        let (turn, limit) = (self.rolling.staging_turn.clone(), self.limits.reload);
        let begun = Arc::new(AtomicBool::new(false));
        self.staging = Some(begun.clone());
        let stage = async move {
            // The semaphore is never closed.
            let _turn = turn.acquire().await;
            begun.store(true, Ordering::Relaxed);
            worker.stage(&next, limit).await;
            Change { worker, outcome: Outcome::Staged }
        };
        self.change = Some(stage.boxed());
    }

    fn changed(&mut self, Change { worker, outcome }: Change<L>) {
        let is_live = self.publish.borrow().as_ref().is_some_and(|live| Arc::ptr_eq(live, &worker));
        match outcome {
            Outcome::Reloaded(Ok(reloaded)) if is_live => {
                self.note(Event::WorkerRolled {
                    slot: self.slot.0,
                    epoch: worker.incarnation,
                    weights: reloaded.weights,
                    stall_us: reloaded.stall_us,
                    from_changes: reloaded.from_changes,
                    in_shadow: reloaded.in_shadow,
                });
                // Whoever waits for a slot with these weights looks again.
                self.publish.send_modify(|_| {});
                self.bring_to_target();
            }
            Outcome::Reloaded(Err(Refused { reason, proves_on: true })) if is_live => {
                tracing::error!(slot = %self.slot, reason,
                    "A worker cannot read its checkpoint again; it proves on with the weights that it has.");
                self.bring_to_target();
            }
            Outcome::Reloaded(Err(Refused { reason, .. })) if is_live => {
                tracing::error!(slot = %self.slot, reason, "A worker did not take the checkpoint; starting it anew.");
                self.facts.change(|facts| facts.told_to_end = Some(worker.incarnation));
                self.refusals += 1;
                if self.refusals > 1 {
                    // Another start did not help. Within the limits of deaths it is tried again, and then the slot is given up.
                    let detail = format!("it does not take the checkpoint: {reason}");
                    self.control.fault(worker.incarnation, DeathCause::Broken { detail });
                } else {
                    self.control.restart();
                }
            }
            Outcome::Reloaded(_) | Outcome::Staged => self.bring_to_target(),
        }
    }

    /// Takes the live worker out of the queue.
    fn withdraw(&mut self) {
        self.is_offered = false;
        self.observers.queue.worker_lost(self.slot);
    }

    fn note(&self, event: Event) {
        drop(self.observers.journal.send(event));
    }

    fn ready(&mut self, incarnation: Incarnation, link: Arc<L>) {
        let hello = link.hello();
        self.facts.change(|facts| {
            (facts.device, facts.weights) = (Some(hello.device.clone()), hello.weights);
        });
        self.note(Event::WorkerReady { slot: self.slot.0, pid: hello.pid, epoch: incarnation.number });
        let worker =
            LiveWorker::new(self.slot, incarnation, link, self.control.clone(), self.facts.clone(), self.limits.prove);
        let worker = Arc::new(worker);
        self.publish.send_replace(Some(worker));
        self.bring_to_target();
    }

    fn drain(&mut self) {
        self.withdraw();
        let Some(worker) = self.publish.borrow().clone() else { return self.control.drained() };
        let (control, limit, facts) = (self.control.clone(), self.limits.drain, self.facts.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(limit, worker.link.drain()).await {
                Ok(Ok(())) => tracing::info!(slot = %worker.slot, "Worker is drained."),
                Ok(Err(error)) => tracing::warn!(slot = %worker.slot, error = with_causes(&error), "Drain failed."),
                Err(_) => tracing::warn!(slot = %worker.slot, ?limit, "Worker did not drain in time."),
            }
            // What it still has is cut off by us.
            facts.change(|facts| facts.told_to_end = Some(worker.incarnation));
            control.drained();
        });
    }

    fn died(&mut self, incarnation: u64, cause: &DeathCause, last_lines: &[String]) {
        self.withdraw();
        // What the dead worker was asked for must not keep the next one waiting.
        (self.change, self.staging) = (None, None);
        if let Some(worker) = self.publish.send_replace(None) {
            worker.note_death();
        }
        if *cause == DeathCause::Requested {
            return;
        }
        self.facts.change(|facts| {
            facts.deaths += 1;
            facts.last_death = Some(cause.to_string());
        });
        for line in last_lines.iter().rev().take(5).rev() {
            tracing::warn!(slot = %self.slot, incarnation, line, "Last lines of the dead worker.");
        }
        self.note(Event::WorkerLost { slot: self.slot.0, epoch: incarnation, cause: cause.to_string() });
    }
}

async fn under_way<L: WorkerLink>(change: &mut Option<BoxFuture<'static, Change<L>>>) -> Change<L> {
    match change {
        Some(change) => change.await,
        None => std::future::pending().await,
    }
}
