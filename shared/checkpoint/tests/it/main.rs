//! Tests through the public API; one binary, because every further one is linked again.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod codec;
mod faulty;
mod folders;
mod install;
mod mirror;
mod properties;
mod reconstruction;
mod vectors;
mod weights;
