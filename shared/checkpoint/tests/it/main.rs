//! Tests through the public API; one binary, because every further one is linked again.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod faulty;
mod install;
mod properties;
mod vectors;
mod weights;
