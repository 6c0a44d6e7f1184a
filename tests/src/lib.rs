//! Runs the real binaries for end-to-end tests.

pub mod binaries;
pub mod processes;
