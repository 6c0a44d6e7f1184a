//! Waiting for a state, never for a time.

use std::time::{Duration, Instant};

use crate::binaries::LIMIT;

const PAUSE: Duration = Duration::from_millis(20);

/// Looks until it is so; the limit only ends a test that has failed.
///
/// # Panics
/// If it never comes.
pub fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "never came: {what}");
        std::thread::sleep(PAUSE);
    }
}
