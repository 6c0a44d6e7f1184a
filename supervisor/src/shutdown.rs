//! Being told to stop: by signals and by operators, step by step, under one deadline.
//!
//! First the miner drains: no new group, what is under way is finished, sealed and uploaded. At the deadline, or when told
//! again, it goes now: what is spooled is sealed and uploaded, the rest is given up. Told a third time it goes at once; then the
//! spool holds everything for the next start.

use std::io;
use std::time::Duration;

use nix::sys::signal::Signal as Posix;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::engine::StopSignals;

/// How often the log names what is awaited.
const REPORT_PERIOD: Duration = Duration::from_secs(5);

/// How urgently the miner must end. It only ever rises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Urgency {
    /// Not at all.
    None,
    /// When all that is under way is in the store.
    Drain,
    /// When all that is spooled is in the store.
    Now,
    /// Without another step.
    AtOnce,
}

impl Urgency {
    const fn next(self) -> Self {
        match self {
            Self::None => Self::Drain,
            Self::Drain => Self::Now,
            Self::Now | Self::AtOnce => Self::AtOnce,
        }
    }
}

/// The one place where it is known how urgently the miner must end; cheap to clone.
#[derive(Debug, Clone)]
pub struct Shutdown {
    urgency: watch::Sender<Urgency>,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self { urgency: watch::Sender::new(Urgency::None) }
    }
}

impl Shutdown {
    /// How urgent it is.
    #[must_use]
    pub fn urgency(&self) -> Urgency {
        *self.urgency.borrow()
    }

    /// Makes it at least as urgent as `wanted`.
    pub fn raise(&self, wanted: Urgency) {
        self.urgency.send_if_modified(|urgency| {
            let rises = *urgency < wanted;
            *urgency = wanted.max(*urgency);
            rises
        });
    }

    /// Makes it one step more urgent.
    pub fn step(&self) {
        self.urgency.send_modify(|urgency| *urgency = urgency.next());
    }

    /// Waits until it is at least as urgent as `wanted`.
    pub async fn reached(&self, wanted: Urgency) {
        let mut urgency = self.urgency.subscribe();
        // `self` keeps the sender, so the wait cannot end without reason.
        drop(urgency.wait_for(|urgency| *urgency >= wanted).await.map(|urgency| *urgency));
    }

    /// Passes the urgency on to `signals`, makes it [`Urgency::Now`] when draining takes longer than `limit`, and names every
    /// few seconds what `awaited` says. Ends at [`Urgency::AtOnce`].
    pub async fn conduct(self, signals: StopSignals, limit: Duration, awaited: impl Fn() -> String) {
        self.reached(Urgency::Drain).await;
        tracing::info!(limit_s = limit.as_secs_f64(), awaited = awaited(), "Told to stop: no new groups.");
        signals.drain.cancel();
        let deadline = Instant::now() + limit;
        let mut reports = tokio::time::interval_at(Instant::now() + REPORT_PERIOD, REPORT_PERIOD);
        loop {
            tokio::select! {
                () = self.reached(Urgency::Now) => break,
                () = tokio::time::sleep_until(deadline) => {
                    tracing::warn!(awaited = awaited(), "The time for stopping is over.");
                    self.raise(Urgency::Now);
                }
                _ = reports.tick() => tracing::info!(awaited = awaited(), "Stopping."),
            }
        }
        tracing::warn!(
            awaited = awaited(),
            "Stopping now: what is spooled is sealed and uploaded, the rest is given up."
        );
        signals.now.cancel();
        loop {
            tokio::select! {
                () = self.reached(Urgency::AtOnce) => return,
                _ = reports.tick() => tracing::info!(awaited = awaited(), "Stopping now."),
            }
        }
    }
}

/// The signals that a miner minds.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// `None` where it was ignored from the start, as `nohup` has it.
    hangup: Option<Signal>,
    /// Minded only so that a file over the limit is an error of the write, not the end of the process.
    _file_too_large: Signal,
}

impl Signals {
    /// Minds the signals from now on.
    ///
    /// # Errors
    /// If the system refuses.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn install() -> io::Result<Self> {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let hangup = (!is_ignored(&status, Posix::SIGHUP)).then(|| signal(SignalKind::hangup())).transpose()?;
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup,
            _file_too_large: signal(SignalKind::from_raw(Posix::SIGXFSZ as i32))?,
        })
    }

    /// Every SIGINT and SIGTERM makes `shutdown` one step more urgent. SIGHUP, which a closed terminal sends, and an init
    /// system may send together with SIGTERM, only begins it.
    pub async fn watch(mut self, shutdown: Shutdown) {
        loop {
            let name = tokio::select! {
                _ = self.interrupt.recv() => "SIGINT",
                _ = self.terminate.recv() => "SIGTERM",
                () = received(self.hangup.as_mut()) => "SIGHUP",
            };
            tracing::info!(signal = name, "Received a signal.");
            if name == "SIGHUP" { shutdown.raise(Urgency::Drain) } else { shutdown.step() }
        }
    }
}

async fn received(signal: Option<&mut Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// Whether the process ignores `signal`, by its `/proc/self/status`.
fn is_ignored(status: &str, signal: Posix) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal as u32 - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn urgency_only_rises() {
        let shutdown = Shutdown::default();
        assert_eq!(shutdown.urgency(), Urgency::None);
        shutdown.raise(Urgency::Now);
        shutdown.raise(Urgency::Drain);
        assert_eq!(shutdown.urgency(), Urgency::Now);
        shutdown.step();
        shutdown.step();
        assert_eq!(shutdown.urgency(), Urgency::AtOnce);
    }

    #[tokio::test]
    async fn each_step_reaches_the_engine() {
        let (shutdown, signals) = (Shutdown::default(), StopSignals::default());
        let conducted = tokio::spawn(shutdown.clone().conduct(signals.clone(), LONG, || "a test".to_owned()));
        shutdown.step();
        signals.drain.cancelled().await;
        assert!(!signals.now.is_cancelled());
        shutdown.step();
        signals.now.cancelled().await;
        shutdown.step();
        conducted.await.unwrap();
    }

    #[tokio::test]
    async fn the_deadline_is_the_second_step() {
        let (shutdown, signals) = (Shutdown::default(), StopSignals::default());
        shutdown.raise(Urgency::Drain);
        let limit = Duration::from_millis(5);
        let conducted = tokio::spawn(shutdown.clone().conduct(signals.clone(), limit, || "a test".to_owned()));
        signals.now.cancelled().await;
        assert_eq!(shutdown.urgency(), Urgency::Now);
        assert!(!conducted.is_finished(), "only an order ends it at once");
        conducted.abort();
    }

    #[test]
    fn ignored_signals_are_read_from_the_status() {
        let status = "Name:\tx\nSigBlk:\t0000000000000001\nSigIgn:\t0000000001001001\n";
        assert!(is_ignored(status, Posix::SIGHUP));
        assert!(is_ignored(status, Posix::SIGPIPE));
        assert!(!is_ignored(status, Posix::SIGTERM));
        assert!(!is_ignored("", Posix::SIGHUP));
    }
}
