//! Tests through the public API; one binary, because every further one is linked again.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod chains;
mod downloads;
mod faulty;
mod golden_installs;
mod housekeeping;
mod install;
mod interrupted;
mod properties;
mod trainer;
mod vectors;
mod weights;
