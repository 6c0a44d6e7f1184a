//! How far an installation is, for whoever wants to know.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use grail_protocol::ids::CheckpointWindow;

/// Bytes of an installation's downloads. Both numbers start again when another route is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The checkpoint that is wanted.
    pub window: CheckpointWindow,
    /// Bytes that are here, including those of an earlier attempt.
    pub received: u64,
    /// Bytes that the route takes, as the store lists them.
    pub total: u64,
}

/// Called with every piece that arrives, from several threads: it must be quick and must not wait.
#[derive(Clone)]
pub struct ProgressFn(Arc<dyn Fn(Progress) + Send + Sync>);

impl ProgressFn {
    /// Reports to `report`.
    pub fn new(report: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        Self(Arc::new(report))
    }
}

impl fmt::Debug for ProgressFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProgressFn")
    }
}

/// Counts the bytes of one route.
#[derive(Debug)]
pub(crate) struct Meter {
    window: CheckpointWindow,
    total: u64,
    received: AtomicU64,
    report: Option<ProgressFn>,
}

impl Meter {
    pub(crate) const fn new(window: CheckpointWindow, total: u64, report: Option<ProgressFn>) -> Self {
        Self { window, total, received: AtomicU64::new(0), report }
    }

    /// Counts for nobody.
    pub(crate) const fn silent() -> Self {
        Self::new(CheckpointWindow(0), 0, None)
    }

    pub(crate) fn add(&self, bytes: u64) {
        let received = self.received.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if let Some(ProgressFn(report)) = &self.report {
            report(Progress { window: self.window, received, total: self.total });
        }
    }

    /// Bytes that were counted turned out to be of no use.
    pub(crate) fn take_back(&self, bytes: u64) {
        self.received.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}
