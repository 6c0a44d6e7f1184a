//! What can be asked of the fleet from outside, and told to it.

use grail_ipc::messages::SlotId;
use grail_protocol::ids::WeightsHash;
use serde::{Deserialize, Serialize};

use super::Fleet;

/// Cheap clone; valid before the fleet is started and after it ended.
#[derive(Debug, Clone)]
pub struct FleetHandle {
    count: u32,
}

/// An order for one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SlotCommand {
    Restart,
    Drain,
    Quarantine,
    Release,
}

/// An order that is not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SlotRefused {
    #[error("there is no slot {slot}: this fleet has {count}, counted from 0")]
    NoSuchSlot { slot: SlotId, count: u32 },
    #[error("slot {slot} is {state}; {command:?} has no meaning there")]
    NotNow { slot: SlotId, state: String, command: SlotCommand },
}

/// One slot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SlotStatus {
    pub slot: u32,
    pub state: String,
    pub pid: Option<i32>,
    pub epoch: u64,
    pub device: Option<String>,
    pub weights: Option<WeightsHash>,
    pub deaths: u64,
    pub last_death: Option<String>,
    pub detail: Option<String>,
    pub jobs: usize,
    pub tokens: usize,
    pub groups: u64,
    pub resident_bytes: Option<u64>,
}

/// The generation server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServerStatus {
    pub state: String,
    pub pid: Option<i32>,
    pub url: Option<String>,
    pub weights: Option<String>,
    pub deaths: u64,
    pub last_death: Option<String>,
    pub detail: Option<String>,
}

impl Fleet {
    /// What can be asked of this fleet and told to it, from any task.
    #[must_use]
    pub fn handle(&self) -> FleetHandle {
        FleetHandle { count: self.settings.workers.slots }
    }
}

impl FleetHandle {
    #[cfg(test)]
    pub(crate) fn for_tests(count: u32) -> Self {
        Self { count }
    }

    /// All slots.
    #[must_use]
    pub fn slots(&self) -> Vec<SlotStatus> {
        Vec::new()
    }

    /// The generation server.
    #[must_use]
    pub fn server(&self) -> Option<ServerStatus> {
        None
    }

    /// Gives `slot` an order.
    ///
    /// # Errors
    /// [`SlotRefused`].
    pub fn command(&self, slot: SlotId, command: SlotCommand) -> Result<(), SlotRefused> {
        if slot.0 >= self.count {
            return Err(SlotRefused::NoSuchSlot { slot, count: self.count });
        }
        Err(SlotRefused::NotNow { slot, state: "not started".to_owned(), command })
    }
}
