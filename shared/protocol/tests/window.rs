//! The window file and the parts of the validator that need no model.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

#[path = "window/cheap.rs"]
mod cheap;
#[path = "window/foreign.rs"]
mod foreign;
#[path = "window/group_sampling.rs"]
mod group_sampling;
#[path = "window/mutations.rs"]
mod mutations;
#[path = "window/notes.rs"]
mod notes;
#[path = "window/round_trip.rs"]
mod round_trip;
#[path = "window/samples.rs"]
mod samples;
#[path = "window/structure.rs"]
mod structure;
