//! The faults of one process while it runs.

use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{Signal, raise};
use tracing::{error, warn};

use super::{Act, Fault, Point};

/// Faults of this incarnation, and how often each point was reached.
#[derive(Debug, Default)]
pub struct Armed {
    faults: Vec<Fault>,
    reached: [AtomicU32; Point::ALL.len()],
}

impl Armed {
    pub(super) fn new(faults: Vec<Fault>) -> Self {
        Self { faults, reached: Default::default() }
    }

    /// Counts that `point` is reached, and says what must be done there now.
    ///
    /// Where a process has faults of the same point and count, the first one holds.
    pub fn reach(&self, point: Point) -> Option<Act> {
        let count = self.reached[point.place()].fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let due = self.faults.iter().find(|fault| fault.point == point && fault.nth.get() == count)?;
        warn!(fault = %due, "Injecting a fault.");
        Some(due.act)
    }

    /// [`Armed::reach`] where only the process itself can go wrong: does what is due.
    pub fn pass(&self, point: Point) {
        if let Some(act) = self.reach(point) {
            act.befall_process();
        }
    }
}

impl Act {
    /// Whether it happens to the process or the thread, whatever that does at the time.
    #[must_use]
    pub const fn is_of_process(self) -> bool {
        matches!(self, Self::Kill | Self::Segv | Self::Stop | Self::Abort | Self::Exit(_) | Self::Hang | Self::Slow(_))
    }

    /// Does what happens to the process or the thread; nothing for an act of another kind.
    ///
    /// Returns only from [`Act::Slow`], and from [`Act::Stop`] after SIGCONT.
    pub fn befall_process(self) {
        match self {
            Self::Kill => end_by(Signal::SIGKILL),
            Self::Segv => end_by(Signal::SIGSEGV),
            Self::Stop => signal_self(Signal::SIGSTOP),
            Self::Abort => std::process::abort(),
            Self::Exit(code) => exit(code),
            Self::Hang => loop {
                std::thread::park();
            },
            Self::Slow(late) => std::thread::sleep(late),
            _ => {}
        }
    }
}

fn signal_self(signal: Signal) {
    if let Err(error) = raise(signal) {
        error!(%signal, %error, "Cannot send this process a signal.");
    }
}

/// The first SIGSEGV may only take away the handler by which the standard library reports a stack overflow.
fn end_by(signal: Signal) {
    signal_self(signal);
    signal_self(signal);
}

#[expect(
    clippy::exit,
    reason = "a fault ends the process from wherever it is; no program reaches this without being told"
)]
fn exit(code: u8) {
    std::process::exit(code.into());
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::time::Duration;

    use super::super::FaultPlan;
    use super::*;

    #[test]
    fn a_fault_is_due_once_at_its_count_in_its_slot_and_incarnation() {
        let second = NonZeroU32::new(2).unwrap();
        let plan = FaultPlan::from_iter([
            Fault::new(Act::Kill, Point::Idle).unwrap().nth(second),
            Fault::new(Act::Abort, Point::Ping).unwrap().slot(1),
            Fault::new(Act::Hang, Point::Ping).unwrap().epoch(7),
        ]);
        let ours = plan.armed(0, 7);
        let idle: Vec<Option<Act>> = (0..3).map(|_| ours.reach(Point::Idle)).collect();
        assert_eq!(idle, [None, Some(Act::Kill), None]);
        assert_eq!(ours.reach(Point::Ping), Some(Act::Hang));
        assert_eq!(plan.armed(0, 6).reach(Point::Ping), None);
        assert_eq!(plan.armed(1, 7).reach(Point::Ping), Some(Act::Abort), "the first one holds");
    }

    #[test]
    fn what_is_no_act_of_a_process_does_nothing_to_it() {
        for act in Act::EXAMPLES.into_iter().filter(|act| !act.is_of_process()) {
            act.befall_process();
        }
        Act::Slow(Duration::ZERO).befall_process();
    }
}
