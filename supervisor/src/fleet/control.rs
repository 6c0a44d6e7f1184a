//! What an operator sees of the children, and may tell them.

use std::sync::{Arc, Mutex, PoisonError};

use grail_ipc::messages::{Pong, SlotId};
use grail_process::ChildControl;
use grail_process::state::State;
use grail_protocol::ids::WeightsHash;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc};

use super::link::Target;
use super::workers::Order;
use crate::proofs::{Load, ProofQueue};

/// What a slot may be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SlotCommand {
    /// End the process and start another one.
    Restart,
    /// Finish what it has, then stay empty.
    Drain,
    /// Stay empty at once.
    Quarantine,
    /// Start again after a drain, a quarantine or too many deaths.
    Release,
}

impl std::fmt::Display for SlotCommand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Restart => "restart",
            Self::Drain => "drain",
            Self::Quarantine => "quarantine",
            Self::Release => "release",
        })
    }
}

/// A slot that does not do as told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SlotRefused {
    #[error("there is no slot {slot}: {count} run, counted from 0")]
    NoSuchSlot { slot: SlotId, count: usize },
    #[error("slot {slot} is {state} and holds no weights; its worker reads the checkpoint's folder when it starts")]
    HoldsNothing { slot: SlotId, state: &'static str },
    #[error("slot {slot} is {state}, so {command} has no meaning")]
    NotNow { slot: SlotId, state: &'static str, command: SlotCommand },
}

/// State of a slot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SlotStatus {
    pub slot: u32,
    /// `starting`, `ready`, `draining`, `stopping`, `dead`, `backoff` or `gave_up`.
    pub state: String,
    pub pid: Option<i32>,
    pub epoch: u64,
    pub device: Option<String>,
    pub weights: Option<WeightsHash>,
    /// Deaths since the supervisor started, and why the last one was.
    pub deaths: u64,
    pub last_death: Option<String>,
    /// More about the state, for instance why it was given up.
    pub detail: Option<String>,
    /// Groups and their tokens that it has now.
    pub jobs: usize,
    pub tokens: usize,
    /// Groups that this incarnation has proved.
    pub groups: u64,
    pub resident_bytes: Option<u64>,
}

/// State of the generation server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// State of its launcher, or `serving`.
    pub state: String,
    /// Of the launcher, and of the server under it.
    pub pid: Option<i32>,
    pub server_pid: Option<u32>,
    pub url: Option<String>,
    /// Label under which it answers.
    pub weights: Option<String>,
    pub deaths: u64,
    pub last_death: Option<String>,
    pub detail: Option<String>,
}

/// What is known of a child beside its state.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts {
    pub pid: Option<i32>,
    pub epoch: u64,
    pub device: Option<String>,
    pub weights: Option<WeightsHash>,
    pub deaths: u64,
    pub last_death: Option<String>,
    pub resident_bytes: Option<u64>,
    /// For a generation server.
    pub url: Option<String>,
    pub label: Option<String>,
    pub server_pid: Option<u32>,
    /// Incarnation that was told to end: what it loses is nobody's fault.
    pub told_to_end: Option<u64>,
}

/// [`Facts`] that several tasks keep.
#[derive(Debug, Clone, Default)]
pub(super) struct SharedFacts(Arc<Mutex<Facts>>);

impl SharedFacts {
    pub fn read(&self) -> Facts {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn change(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Takes what a sign of life says.
    pub fn heard(&self, pong: &Pong) {
        self.change(|facts| {
            facts.resident_bytes = Some(pong.resident_bytes);
            facts.weights = pong.weights;
        });
    }
}

/// One slot as seen from outside.
#[derive(Debug, Clone)]
pub(super) struct SlotControl {
    pub id: SlotId,
    pub child: ChildControl,
    pub facts: SharedFacts,
    pub orders: mpsc::UnboundedSender<Order>,
}

impl SlotControl {
    fn status(&self, load: Load) -> SlotStatus {
        let (state, facts) = (self.child.state(), self.facts.read());
        let alive = state.is_alive();
        SlotStatus {
            slot: self.id.0,
            state: state.name().to_owned(),
            pid: facts.pid.filter(|_| alive),
            epoch: facts.epoch,
            device: facts.device,
            weights: facts.weights.filter(|_| alive),
            deaths: facts.deaths,
            last_death: facts.last_death,
            detail: detail(&state),
            jobs: load.jobs,
            tokens: load.tokens,
            groups: load.proved,
            resident_bytes: facts.resident_bytes.filter(|_| alive),
        }
    }

    fn command(&self, command: SlotCommand) -> Result<(), SlotRefused> {
        let state = self.child.state();
        let has_meaning = match (command, &state) {
            (SlotCommand::Restart, State::Starting | State::Ready | State::Backoff { .. }) => true,
            (SlotCommand::Drain, State::Starting | State::Ready | State::Backoff { .. }) => true,
            (SlotCommand::Quarantine, State::Stopping | State::GaveUp(grail_process::state::GiveUp::Quarantined)) => {
                false
            }
            (SlotCommand::Quarantine, _) => true,
            (SlotCommand::Release, State::Dead | State::GaveUp(_)) => true,
            _ => false,
        };
        if !has_meaning {
            return Err(SlotRefused::NotNow { slot: self.id, state: state.name(), command });
        }
        if matches!(command, SlotCommand::Restart | SlotCommand::Quarantine) {
            self.facts.change(|facts| facts.told_to_end = Some(facts.epoch));
        }
        match command {
            SlotCommand::Restart => self.child.restart(),
            SlotCommand::Drain => self.child.drain(),
            SlotCommand::Quarantine => self.child.quarantine(),
            SlotCommand::Release => self.child.release(),
        }
        Ok(())
    }
}

fn detail(state: &State) -> Option<String> {
    match state {
        State::Backoff { delay } => Some(format!("starts again within {delay:?}")),
        State::GaveUp(reason) => Some(reason.to_string()),
        _ => None,
    }
}

/// The generation server as seen from outside.
#[derive(Debug, Clone)]
pub(super) struct ServerControl {
    pub child: ChildControl,
    pub facts: SharedFacts,
    /// Has the server read its weights again.
    pub again: Arc<Notify>,
}

impl ServerControl {
    fn status(&self) -> ServerStatus {
        let (state, facts) = (self.child.state(), self.facts.read());
        let serves = facts.label.is_some();
        ServerStatus {
            state: if serves { "serving" } else { state.name() }.to_owned(),
            pid: facts.pid.filter(|_| state.is_alive()),
            server_pid: facts.server_pid.filter(|_| serves),
            url: facts.url.filter(|_| serves),
            weights: facts.label,
            deaths: facts.deaths,
            last_death: facts.last_death,
            detail: detail(&state),
        }
    }
}

/// Children that run now.
#[derive(Debug, Default)]
pub(super) struct Controls {
    pub slots: Vec<SlotControl>,
    pub server: Option<ServerControl>,
}

/// The fleet as seen from outside. Cheap to clone; valid before the fleet is started and after it has ended.
#[derive(Debug, Clone)]
pub struct FleetHandle {
    pub(super) controls: Arc<Mutex<Controls>>,
    pub(super) queue: ProofQueue,
}

impl FleetHandle {
    /// A fleet that has no children.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    #[cfg(test)]
    pub(crate) fn without_children() -> Self {
        Self { controls: Arc::default(), queue: ProofQueue::start() }
    }

    /// State of every slot.
    #[must_use]
    pub fn slots(&self) -> Vec<SlotStatus> {
        let loads = self.queue.loads();
        let load = |slot: &SlotControl| loads.get(&slot.id).copied().unwrap_or_default();
        self.controls().slots.iter().map(|slot| slot.status(load(slot))).collect()
    }

    /// State of the generation server, if there is one.
    #[must_use]
    pub fn server(&self) -> Option<ServerStatus> {
        self.controls().server.as_ref().map(ServerControl::status)
    }

    /// Tells a slot what to do; it is begun when this returns.
    ///
    /// # Errors
    /// [`SlotRefused`].
    pub fn command(&self, slot: SlotId, command: SlotCommand) -> Result<(), SlotRefused> {
        let controls = self.controls();
        let count = controls.slots.len();
        let known = controls.slots.iter().find(|known| known.id == slot);
        known.ok_or(SlotRefused::NoSuchSlot { slot, count })?.command(command)
    }

    /// Has all workers make `target` ready, one after the other, while they prove.
    pub fn stage(&self, target: Target) {
        let target = Arc::new(target);
        for slot in &self.controls().slots {
            // A slot that has ended needs no weights.
            drop(slot.orders.send(Order::Stage(target.clone())));
        }
    }

    /// Has the worker of `slot`, or all workers and the generation server, read the present checkpoint from its folder again.
    ///
    /// # Errors
    /// [`SlotRefused`].
    pub fn read_anew(&self, slot: Option<SlotId>) -> Result<(), SlotRefused> {
        let controls = self.controls();
        let count = controls.slots.len();
        let chosen: Vec<&SlotControl> =
            controls.slots.iter().filter(|known| slot.is_none_or(|slot| known.id == slot)).collect();
        if let (Some(slot), true) = (slot, chosen.is_empty()) {
            return Err(SlotRefused::NoSuchSlot { slot, count });
        }
        for known in chosen {
            match (slot, known.child.state()) {
                (_, State::Ready) => drop(known.orders.send(Order::ReadAnew)),
                (Some(slot), state) => return Err(SlotRefused::HoldsNothing { slot, state: state.name() }),
                // Those that are not there read the folder when they come.
                (None, _) => {}
            }
        }
        if let (None, Some(server)) = (slot, &controls.server) {
            server.again.notify_one();
        }
        Ok(())
    }

    fn controls(&self) -> std::sync::MutexGuard<'_, Controls> {
        self.controls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
