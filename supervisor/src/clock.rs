//! Wall-clock time that never jumps: read once and carried on by the monotonic clock.
//!
//! Deadlines come from blocks, as points of wall-clock time; what is waited for is measured by the monotonic clock. So a step of the
//! system's clock in mid-window moves no deadline; it is noticed between windows.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// A clock; clones are the same clock.
#[derive(Debug, Clone)]
pub struct Clock {
    anchor: Arc<Mutex<Anchor>>,
    is_systems: bool,
}

#[derive(Debug, Clone, Copy)]
struct Anchor {
    wall: SystemTime,
    monotonic: Instant,
}

/// How far the system's clock stepped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Forward(Duration),
    Back(Duration),
}

/// Less than this is drift, not a step.
const LEAST_STEP: Duration = Duration::from_secs(1);

impl Clock {
    /// The system's clock.
    #[must_use]
    pub fn system() -> Self {
        Self { is_systems: true, ..Self::starting_at(SystemTime::now()) }
    }

    /// A clock that stands at `wall` now, for instance in a simulation.
    #[must_use]
    pub fn starting_at(wall: SystemTime) -> Self {
        Self { anchor: Arc::new(Mutex::new(Anchor { wall, monotonic: Instant::now() })), is_systems: false }
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> SystemTime {
        let anchor = self.anchor();
        anchor.wall + anchor.monotonic.elapsed()
    }

    /// When the monotonic clock will show what this one shows at `wall`; now if that has passed.
    #[must_use]
    pub fn instant_of(&self, wall: SystemTime) -> Instant {
        Instant::now() + wall.duration_since(self.now()).unwrap_or_default()
    }

    /// Takes over the system's time; tells if it has stepped meanwhile.
    pub fn resync(&self) -> Option<Step> {
        if !self.is_systems {
            return None;
        }
        self.set(SystemTime::now())
    }

    fn set(&self, wall: SystemTime) -> Option<Step> {
        let expected = self.now();
        *self.anchor.lock().unwrap_or_else(PoisonError::into_inner) = Anchor { wall, monotonic: Instant::now() };
        match wall.duration_since(expected) {
            Ok(ahead) => (ahead >= LEAST_STEP).then_some(Step::Forward(ahead)),
            Err(behind) => (behind.duration() >= LEAST_STEP).then_some(Step::Back(behind.duration())),
        }
    }

    fn anchor(&self) -> Anchor {
        *self.anchor.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    #[tokio::test(start_paused = true)]
    async fn it_follows_the_monotonic_clock() {
        let start = SystemTime::UNIX_EPOCH + HOUR;
        let clock = Clock::starting_at(start);
        tokio::time::advance(HOUR).await;
        assert_eq!(clock.now(), start + HOUR);
        assert_eq!(clock.instant_of(start + 3 * HOUR), Instant::now() + 2 * HOUR);
        assert_eq!(clock.instant_of(start), Instant::now());
    }

    #[tokio::test(start_paused = true)]
    async fn a_step_of_the_system_is_told_and_taken_over() {
        let clock = Clock::starting_at(SystemTime::UNIX_EPOCH + 10 * HOUR);
        assert_eq!(clock.set(clock.now() + Duration::from_millis(10)), None);
        assert_eq!(clock.set(clock.now() + HOUR), Some(Step::Forward(HOUR)));
        assert_eq!(clock.set(clock.now() - HOUR), Some(Step::Back(HOUR)));
        assert_eq!(clock.resync(), None, "it is not the system's");
    }
}
