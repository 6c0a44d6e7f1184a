//! What was measured, whoever computed.

use std::time::Duration;

use grail_protocol::ids::GroupIndex;

use super::trace::Event;

/// One group that was proved.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub group: GroupIndex,
    /// Which of the requests in flight it was.
    pub lane: u32,
    /// From the beginning of the timed passes.
    pub start: Duration,
    pub length: Duration,
}

/// All timed passes.
#[derive(Debug)]
pub(crate) struct Measured {
    pub samples: Vec<Sample>,
    pub wall: Duration,
}

impl Measured {
    pub(crate) fn events(&self) -> Vec<Event> {
        let event = |sample: &Sample| Event {
            name: format!("group {}", sample.group),
            category: "group",
            lane: sample.lane,
            start: sample.start,
            length: sample.length,
        };
        self.samples.iter().map(event).collect()
    }
}
