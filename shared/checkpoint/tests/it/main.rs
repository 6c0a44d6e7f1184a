//! Tests through the public API; one binary, because every further one is linked again.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod chains;
mod codec;
mod downloads;
mod faulty;
mod folders;
mod golden_installs;
mod housekeeping;
mod install;
mod interrupted;
mod mirror;
mod properties;
mod reconstruction;
mod signatures;
mod trainer;
mod vectors;
mod weights;
