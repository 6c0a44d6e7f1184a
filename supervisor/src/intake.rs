//! How much is being generated: what decides whether another group is admitted.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use grail_protocol::constants::ROLLOUTS_PER_PROBLEM;
use tokio::sync::Notify;

/// Bounds of what is generated at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IntakeLimits {
    /// Requests that the generation server is kept at: a group is admitted when there is room for all of its samples.
    pub requests: usize,
    /// Most groups in generation; unset = as many as their requests allow.
    pub groups: Option<usize>,
}

/// Counts samples and groups from admission until the last of a group's samples is drawn.
#[derive(Debug, Default)]
pub struct Intake {
    samples: AtomicUsize,
    groups: AtomicUsize,
    changed: Notify,
}

impl Intake {
    /// Whether another group may begin.
    #[must_use]
    pub fn has_room(&self, limits: IntakeLimits) -> bool {
        let (samples, groups) = (self.samples.load(Ordering::Relaxed), self.groups.load(Ordering::Relaxed));
        // A server that takes fewer requests than a group has samples works on one group.
        let is_free = groups == 0 || samples + ROLLOUTS_PER_PROBLEM <= limits.requests;
        is_free && limits.groups.is_none_or(|most| groups < most.max(1))
    }

    /// Counts a group and its samples.
    #[must_use]
    pub fn admit(self: &Arc<Self>) -> Admitted {
        self.groups.fetch_add(1, Ordering::Relaxed);
        Admitted {
            samples: (0..ROLLOUTS_PER_PROBLEM).map(|_| SampleGuard::new(self)).collect(),
            group: GroupGuard(self.clone()),
        }
    }

    /// Waits until fewer samples are being drawn than when this last returned.
    pub async fn drawn(&self) {
        self.changed.notified().await;
    }
}

/// A group that is being generated; dropped, whatever the reason, its part is free again.
#[derive(Debug)]
pub struct Admitted {
    /// One a sample, to be dropped when it is drawn.
    pub samples: Vec<SampleGuard>,
    /// To be dropped when all of them are.
    pub group: GroupGuard,
}

/// Counts a sample for as long as it lives.
#[derive(Debug)]
pub struct SampleGuard(Arc<Intake>);

impl SampleGuard {
    fn new(intake: &Arc<Intake>) -> Self {
        intake.samples.fetch_add(1, Ordering::Relaxed);
        Self(intake.clone())
    }
}

impl Drop for SampleGuard {
    fn drop(&mut self) {
        self.0.samples.fetch_sub(1, Ordering::Relaxed);
        self.0.changed.notify_one();
    }
}

/// Counts a group for as long as it lives.
#[derive(Debug)]
pub struct GroupGuard(Arc<Intake>);

impl Drop for GroupGuard {
    fn drop(&mut self) {
        self.0.groups.fetch_sub(1, Ordering::Relaxed);
        self.0.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_begins_when_there_is_room_for_all_of_its_samples() {
        let (intake, limits) = (Arc::new(Intake::default()), IntakeLimits { requests: 40, groups: None });
        let mut first = intake.admit();
        assert!(intake.has_room(limits));
        let second = intake.admit();
        assert!(!intake.has_room(limits), "32 of 40 requests are taken");
        first.samples.truncate(8);
        assert!(intake.has_room(limits), "24 are");
        assert!(!intake.has_room(IntakeLimits { groups: Some(2), ..limits }), "its last samples are still drawn");
        drop(first);
        assert!(intake.has_room(IntakeLimits { groups: Some(2), ..limits }));
        drop(second);
        assert!(intake.has_room(IntakeLimits { requests: 1, groups: Some(0) }), "one group always is");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_hears_of_every_sample() {
        let intake = Arc::new(Intake::default());
        let mut admitted = intake.admit();
        drop(admitted.samples.pop());
        intake.drawn().await;
        let waiting = tokio::time::timeout(std::time::Duration::from_secs(1), intake.drawn());
        assert!(waiting.await.is_err(), "nothing was drawn since");
        drop(admitted);
        intake.drawn().await;
    }
}
