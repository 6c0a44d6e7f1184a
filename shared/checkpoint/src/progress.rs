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

    /// A counter for one file of the route.
    pub(crate) const fn file(&self) -> FileMeter<'_> {
        FileMeter { route: self, counted: AtomicU64::new(0) }
    }

    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

/// Counts the bytes of one file, for itself and for its route.
#[derive(Debug)]
pub(crate) struct FileMeter<'a> {
    route: &'a Meter,
    counted: AtomicU64,
}

impl FileMeter<'_> {
    pub(crate) fn add(&self, bytes: u64) {
        self.counted.fetch_add(bytes, Ordering::Relaxed);
        let route = self.route;
        let received = route.received.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        if let Some(ProgressFn(report)) = &route.report {
            report(Progress { window: route.window, received, total: route.total });
        }
    }

    /// What was counted so far turned out to be of no use.
    pub(crate) fn forget(&self) {
        let counted = self.counted.swap(0, Ordering::Relaxed);
        self.route.received.fetch_sub(counted, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn a_file_that_is_fetched_again_counts_once() {
        let seen: Arc<Mutex<Vec<u64>>> = Arc::default();
        let report = ProgressFn::new({
            let seen = seen.clone();
            move |progress| seen.lock().unwrap().push(progress.received)
        });
        let route = Meter::new(CheckpointWindow(30), 12, Some(report));
        let (first, second) = (route.file(), route.file());
        first.add(5);
        second.add(2);
        first.forget();
        first.forget();
        first.add(10);
        assert_eq!((route.received(), seen.lock().unwrap().as_slice()), (12, [5, 7, 12].as_slice()));
    }
}
