//! The life of one child as a pure function: what happened, when, and what to do about it.
//!
//! ```text
//! Dead ─► Starting ─► Ready ─► Draining ─► Stopping ─► Dead
//!            ▲  └──────┴──────────┴───────► Stopping ─► Backoff ─┐    (a fault)
//!            │  └──────┴──────────────────► Backoff, GaveUp, Dead │    (it died by itself)
//!            └────────────────────────────────────────────────────┘
//! ```
//!
//! `GaveUp` is the quarantine: an operator releases the child, or a timer does where another try may go better.

use std::fmt;
use std::time::{Duration, Instant};

use crate::cause::{DeathCause, Disposition};
use crate::restart::{Intensity, RestartLimit, RestartPolicy, Verdict};

/// Where a child is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Its process was asked for and is not ready yet.
    Starting,
    /// It works.
    Ready,
    /// It finishes what it has and takes nothing more.
    Draining,
    /// It was told to end and has not ended yet.
    Stopping,
    /// There is no process, and none is wanted.
    Dead,
    /// There is no process; the next is started when the delay is over.
    Backoff { delay: Duration },
    /// There is no process: the child is in quarantine until somebody, or its timer, releases it.
    GaveUp(GiveUp),
}

impl State {
    /// Whether a process may exist.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        matches!(self, Self::Starting | Self::Ready | Self::Draining | Self::Stopping)
    }

    /// Short fixed name, for status and counters.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Dead => "dead",
            Self::Backoff { .. } => "backoff",
            Self::GaveUp(_) => "gave_up",
        }
    }
}

/// Why a child is not started again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GiveUp {
    /// It died too often.
    TooOften { cause: DeathCause, intensity: Intensity },
    /// It would die the same way again.
    Hopeless { cause: DeathCause },
    /// It ran out of memory with the smaller budget, too.
    OutOfMemoryAgain,
    /// An operator said so.
    Quarantined,
}

impl GiveUp {
    /// Whether a later start may go better, so that a timer may release the child.
    #[must_use]
    pub fn passes_with_time(&self) -> bool {
        matches!(self, Self::TooOften { .. } | Self::OutOfMemoryAgain)
    }
}

impl fmt::Display for GiveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooOften { cause, intensity } => {
                write!(f, "died more than {} times in {:?}, last: {cause}", intensity.most, intensity.period)
            }
            Self::Hopeless { cause } => write!(f, "{cause}; another start would end the same way"),
            Self::OutOfMemoryAgain => f.write_str("ran out of memory again with the smaller budget"),
            Self::Quarantined => f.write_str("an operator put it into quarantine"),
        }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The child is wanted; also what releases one that was given up.
    Wanted,
    /// It said that it is ready.
    Ready,
    /// Its process is gone, or never came to be.
    Gone(DeathCause),
    /// Its watcher found a fault while the process lives.
    Fault(DeathCause),
    /// The delay of [`Command::Wait`] is over.
    DelayOver,
    /// It shall finish what it has, and then end for good.
    Drain,
    /// It has nothing left to do.
    Drained,
    /// It shall end for good.
    Stop,
    /// It shall end and be started again; this counts as no death.
    Restart,
    /// It shall end and stay away until it is wanted again.
    Quarantine,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Start a process; `incarnation` rises with each one.
    Spawn { incarnation: u64, reduced: bool },
    /// Tell the process to accept nothing more.
    Drain,
    /// End the process: politely, then not.
    Stop,
    /// End the process, which is broken: it need not be asked.
    Kill,
    /// Come back with [`Event::DelayOver`].
    Wait { delay: Duration },
}

/// The state of one child with what its restarts depend on.
#[derive(Debug, Clone)]
pub struct Machine {
    state: State,
    policy: RestartPolicy,
    limit: RestartLimit,
    incarnation: u64,
    /// Deaths in a row, for the delay.
    attempt: u32,
    /// Whether it runs with a smaller budget because it ran out of memory.
    reduced: bool,
    ready_since: Option<Instant>,
    /// Some incarnation was ready.
    has_been_ready: bool,
    ending: Ending,
}

/// What follows when the process that is being stopped is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ending {
    /// What its exit says.
    ByItself,
    /// Nothing more.
    ForGood,
    /// The next one at once.
    ThenAgain,
    /// Nothing until it is released.
    Quarantine,
    /// What the fault says for which it was stopped.
    Fault(DeathCause),
}

impl Machine {
    /// A child that is dead until it is wanted. `last_incarnation` was used before, 0 if none was.
    #[must_use]
    pub fn new(policy: RestartPolicy, last_incarnation: u64) -> Self {
        Self {
            state: State::Dead,
            limit: RestartLimit::new(policy.intensities.clone()),
            policy,
            incarnation: last_incarnation,
            attempt: 0,
            reduced: false,
            ready_since: None,
            has_been_ready: false,
            ending: Ending::ByItself,
        }
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Number of the last process that was started.
    #[must_use]
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Whether the present process runs with a smaller budget.
    #[must_use]
    pub fn is_reduced(&self) -> bool {
        self.reduced
    }

    /// Why a process that is gone died: for what it was stopped, else what its exit says.
    #[must_use]
    pub fn cause_of_death(&self, by_exit: DeathCause) -> DeathCause {
        match &self.ending {
            Ending::ForGood | Ending::ThenAgain | Ending::Quarantine => DeathCause::Requested,
            Ending::Fault(cause) => cause.clone(),
            Ending::ByItself if self.state == State::Draining => DeathCause::Requested,
            Ending::ByItself => by_exit,
        }
    }

    /// Takes an event at `now` (never earlier than the last); `chance` in `0.0..1.0` shortens a delay. What has no meaning in
    /// the present state changes nothing.
    pub fn on(&mut self, event: Event, now: Instant, chance: f64) -> Option<Command> {
        match (event, &self.state) {
            (Event::Wanted, State::Dead | State::GaveUp(_)) => {
                self.limit.reset();
                self.attempt = 0;
                self.reduced = false;
                Some(self.spawn())
            }
            (Event::DelayOver, State::Backoff { .. }) => Some(self.spawn()),
            // The timer of the quarantine: it starts as a new child does.
            (Event::DelayOver, State::GaveUp(reason)) if reason.passes_with_time() => {
                self.on(Event::Wanted, now, chance)
            }
            (Event::Ready, State::Starting) => {
                self.ready_since = Some(now);
                self.has_been_ready = true;
                self.state = State::Ready;
                None
            }
            (Event::Drain, State::Ready) => {
                self.state = State::Draining;
                Some(Command::Drain)
            }
            (Event::Drain | Event::Stop, State::Starting)
            | (Event::Drained, State::Draining)
            | (Event::Stop, State::Ready | State::Draining) => Some(self.stop(Ending::ForGood)),
            (Event::Stop | Event::Drain, State::Stopping) => {
                self.ending = Ending::ForGood;
                None
            }
            (Event::Stop | Event::Drain, State::Backoff { .. } | State::GaveUp(_)) => {
                self.state = State::Dead;
                None
            }
            (Event::Quarantine, State::Starting | State::Ready | State::Draining) => {
                Some(self.stop(Ending::Quarantine))
            }
            (Event::Quarantine, State::Stopping) => {
                if self.ending != Ending::ForGood {
                    self.ending = Ending::Quarantine;
                }
                None
            }
            (Event::Quarantine, State::Backoff { .. } | State::Dead | State::GaveUp(_)) => {
                self.state = State::GaveUp(GiveUp::Quarantined);
                None
            }
            (Event::Restart, State::Starting | State::Ready) => Some(self.stop(Ending::ThenAgain)),
            (Event::Restart, State::Backoff { .. }) => Some(self.spawn()),
            (Event::Fault(cause), State::Starting | State::Ready) => {
                self.stop(Ending::Fault(cause));
                Some(Command::Kill)
            }
            // It was to end anyway.
            (Event::Fault(_), State::Draining) => {
                self.stop(Ending::ForGood);
                Some(Command::Kill)
            }
            (Event::Gone(cause), State::Starting | State::Ready | State::Draining | State::Stopping) => {
                self.gone(cause, now, chance)
            }
            _ => None,
        }
    }

    fn spawn(&mut self) -> Command {
        self.incarnation += 1;
        self.ready_since = None;
        self.ending = Ending::ByItself;
        self.state = State::Starting;
        Command::Spawn { incarnation: self.incarnation, reduced: self.reduced }
    }

    fn stop(&mut self, ending: Ending) -> Command {
        self.ending = ending;
        self.state = State::Stopping;
        Command::Stop
    }

    fn gone(&mut self, cause: DeathCause, now: Instant, chance: f64) -> Option<Command> {
        let ready_since = self.ready_since.take();
        let was_draining = self.state == State::Draining;
        let cause = match std::mem::replace(&mut self.ending, Ending::ByItself) {
            Ending::ForGood => {
                self.state = State::Dead;
                return None;
            }
            Ending::ThenAgain => return Some(self.spawn()),
            Ending::Quarantine => return self.give_up(GiveUp::Quarantined),
            Ending::ByItself if was_draining => {
                self.state = State::Dead;
                return None;
            }
            Ending::ByItself => cause,
            Ending::Fault(fault) => fault,
        };
        if ready_since.is_some_and(|ready| now.duration_since(ready) >= self.policy.backoff.forgiven_after) {
            self.attempt = 0;
            self.reduced = false;
        }
        match cause.disposition() {
            Disposition::Never if !self.may_go_better(&cause) => return self.give_up(GiveUp::Hopeless { cause }),
            Disposition::RestartReduced if self.reduced => return self.give_up(GiveUp::OutOfMemoryAgain),
            Disposition::RestartReduced => self.reduced = true,
            Disposition::Restart | Disposition::Never => {}
        }
        if let Verdict::GiveUp(intensity) = self.limit.record(now) {
            return self.give_up(GiveUp::TooOften { cause, intensity });
        }
        let delay = self.policy.backoff.delay(self.attempt, chance);
        self.attempt = self.attempt.saturating_add(1);
        self.state = State::Backoff { delay };
        Some(Command::Wait { delay })
    }

    /// Whether the same start may end another way, against what the child said: it once did. A GPU may be away for a moment, and a file
    /// may not be readable for one.
    fn may_go_better(&self, cause: &DeathCause) -> bool {
        self.has_been_ready && matches!(cause, DeathCause::Exit(_))
    }

    fn give_up(&mut self, reason: GiveUp) -> Option<Command> {
        let release = self.policy.quarantine.filter(|_| reason.passes_with_time());
        self.state = State::GaveUp(reason);
        release.map(|delay| Command::Wait { delay })
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::Signal;
    use proptest::prelude::*;

    use super::*;
    use crate::cause::ExitCause;

    fn killed() -> DeathCause {
        DeathCause::Exit(ExitCause::Signal { signal: Signal::SIGSEGV, core: false })
    }

    fn usage() -> DeathCause {
        DeathCause::Exit(ExitCause::Code(2))
    }

    fn machine() -> Machine {
        Machine::new(RestartPolicy::default(), 0)
    }

    /// Runs events at the same instant and gives the last command.
    fn run(machine: &mut Machine, now: Instant, events: impl IntoIterator<Item = Event>) -> Option<Command> {
        events.into_iter().map(|event| machine.on(event, now, 0.0)).last().flatten()
    }

    #[test]
    fn a_quiet_life() {
        let (mut machine, now) = (machine(), Instant::now());
        let spawn = Command::Spawn { incarnation: 1, reduced: false };
        assert_eq!(run(&mut machine, now, [Event::Wanted]), Some(spawn));
        assert_eq!((run(&mut machine, now, [Event::Ready]), machine.state().name()), (None, "ready"));
        assert_eq!(run(&mut machine, now, [Event::Drain]), Some(Command::Drain));
        assert_eq!(run(&mut machine, now, [Event::Drained]), Some(Command::Stop));
        assert_eq!(run(&mut machine, now, [Event::Gone(killed())]), None);
        assert_eq!(machine.state(), &State::Dead);
    }

    #[test]
    fn a_death_waits_longer_each_time_until_work_forgives() {
        let (mut machine, mut now) = (machine(), Instant::now());
        run(&mut machine, now, [Event::Wanted]);
        let mut delays = Vec::new();
        for _ in 0..3 {
            delays.push(run(&mut machine, now, [Event::Ready, Event::Gone(killed())]).unwrap());
            run(&mut machine, now, [Event::DelayOver]);
        }
        let wait = |milliseconds| Command::Wait { delay: Duration::from_millis(milliseconds) };
        assert_eq!(delays, [wait(200), wait(400), wait(800)]);
        run(&mut machine, now, [Event::Ready]);
        now += Duration::from_secs(60);
        assert_eq!(run(&mut machine, now, [Event::Gone(killed())]), Some(wait(200)));
    }

    #[test]
    fn too_many_deaths_give_up_until_released() {
        let (mut machine, now) = (machine(), Instant::now());
        run(&mut machine, now, [Event::Wanted]);
        for _ in 0..5 {
            run(&mut machine, now, [Event::Gone(killed()), Event::DelayOver]);
        }
        let release = Command::Wait { delay: Duration::from_secs(600) };
        assert_eq!(run(&mut machine, now, [Event::Gone(killed())]), Some(release));
        let State::GaveUp(reason @ GiveUp::TooOften { .. }) = machine.state() else { panic!("{:?}", machine.state()) };
        assert_eq!(reason.to_string(), "died more than 5 times in 60s, last: killed by SIGSEGV");
        assert_eq!(run(&mut machine, now, [Event::Restart]), None);
        assert_eq!(run(&mut machine, now, [Event::Wanted]), Some(Command::Spawn { incarnation: 7, reduced: false }));
        assert!(matches!(run(&mut machine, now, [Event::Gone(killed())]), Some(Command::Wait { .. })));
    }

    #[test]
    fn a_timer_releases_what_time_may_heal_and_nothing_else() {
        let quarantine = Some(Duration::from_secs(600));
        let policy = RestartPolicy { intensities: vec![], quarantine, ..RestartPolicy::default() };
        let now = Instant::now();
        let flapping = RestartPolicy {
            intensities: vec![Intensity { most: 0, period: Duration::from_secs(1) }],
            ..policy.clone()
        };
        let mut machine = Machine::new(flapping, 0);
        let wait = Command::Wait { delay: Duration::from_secs(600) };
        assert_eq!(run(&mut machine, now, [Event::Wanted, Event::Gone(killed())]), Some(wait));
        assert!(matches!(machine.state(), State::GaveUp(GiveUp::TooOften { .. })));
        let again = Command::Spawn { incarnation: 2, reduced: false };
        assert_eq!(run(&mut machine, now, [Event::DelayOver]), Some(again));

        let mut machine = Machine::new(policy, 0);
        assert_eq!(run(&mut machine, now, [Event::Wanted, Event::Gone(usage())]), None);
        assert_eq!(run(&mut machine, now, [Event::DelayOver]), None);
        assert!(matches!(machine.state(), State::GaveUp(GiveUp::Hopeless { .. })));
    }

    #[test]
    fn an_operator_puts_a_child_away_and_brings_it_back() {
        let (mut machine, now) = (machine(), Instant::now());
        run(&mut machine, now, [Event::Wanted]);
        assert_eq!(run(&mut machine, now, [Event::Ready, Event::Quarantine]), Some(Command::Stop));
        assert_eq!(machine.cause_of_death(killed()), DeathCause::Requested);
        assert_eq!(run(&mut machine, now, [Event::Gone(killed())]), None);
        assert_eq!(machine.state(), &State::GaveUp(GiveUp::Quarantined));
        assert_eq!(run(&mut machine, now, [Event::DelayOver]), None);
        let again = Command::Spawn { incarnation: 2, reduced: false };
        assert_eq!(run(&mut machine, now, [Event::Wanted]), Some(again));
    }

    #[test]
    fn what_is_hopeless_is_not_tried_again() {
        let versions = DeathCause::VersionMismatch { ours: 1, theirs: 2 };
        for (events, cause) in [
            (vec![Event::Gone(usage())], usage()),
            (vec![Event::Fault(versions.clone()), Event::Gone(killed())], versions),
        ] {
            let (mut machine, now) = (machine(), Instant::now());
            run(&mut machine, now, [Event::Wanted]);
            assert_eq!(run(&mut machine, now, events), None);
            assert_eq!(machine.state(), &State::GaveUp(GiveUp::Hopeless { cause }));
        }
    }

    #[test]
    fn what_once_went_well_is_tried_again_within_the_limits() {
        let (mut machine, now) = (machine(), Instant::now());
        run(&mut machine, now, [Event::Wanted, Event::Ready, Event::Gone(killed()), Event::DelayOver]);
        for _ in 0..4 {
            assert!(matches!(run(&mut machine, now, [Event::Gone(usage())]), Some(Command::Wait { .. })));
            run(&mut machine, now, [Event::DelayOver]);
        }
        run(&mut machine, now, [Event::Gone(usage())]);
        assert!(matches!(machine.state(), State::GaveUp(reason) if reason.passes_with_time()), "{:?}", machine.state());
        let versions = DeathCause::VersionMismatch { ours: 1, theirs: 2 };
        run(&mut machine, now, [Event::Wanted, Event::Fault(versions.clone()), Event::Gone(killed())]);
        assert_eq!(machine.state(), &State::GaveUp(GiveUp::Hopeless { cause: versions }));
    }

    #[test]
    fn work_forgives_a_shortage_of_memory() {
        let (mut machine, mut now) = (machine(), Instant::now());
        let short = [Event::Ready, Event::Gone(DeathCause::OutOfMemory)];
        run(&mut machine, now, [Event::Wanted]);
        run(&mut machine, now, short);
        assert_eq!(run(&mut machine, now, [Event::DelayOver]), Some(Command::Spawn { incarnation: 2, reduced: true }));
        run(&mut machine, now, [Event::Ready]);
        now += Duration::from_secs(60);
        assert!(matches!(run(&mut machine, now, [Event::Gone(DeathCause::OutOfMemory)]), Some(Command::Wait { .. })));
        assert_eq!(run(&mut machine, now, [Event::DelayOver]), Some(Command::Spawn { incarnation: 3, reduced: true }));
        run(&mut machine, now, [Event::Ready]);
        now += Duration::from_secs(60);
        run(&mut machine, now, [Event::Gone(killed())]);
        assert_eq!(run(&mut machine, now, [Event::DelayOver]), Some(Command::Spawn { incarnation: 4, reduced: false }));
    }

    #[test]
    fn out_of_memory_gets_one_more_try_with_less() {
        let (mut machine, now) = (machine(), Instant::now());
        run(&mut machine, now, [Event::Wanted, Event::Ready, Event::Fault(DeathCause::OutOfMemory)]);
        run(&mut machine, now, [Event::Gone(usage())]);
        assert_eq!(run(&mut machine, now, [Event::DelayOver]), Some(Command::Spawn { incarnation: 2, reduced: true }));
        run(&mut machine, now, [Event::Ready, Event::Gone(DeathCause::OutOfMemory)]);
        assert_eq!(machine.state(), &State::GaveUp(GiveUp::OutOfMemoryAgain));
    }

    #[test]
    fn a_fault_decides_over_the_signal_that_ended_it() {
        let (mut machine, now) = (machine(), Instant::now());
        run(&mut machine, now, [Event::Wanted, Event::Ready]);
        assert_eq!(run(&mut machine, now, [Event::Fault(DeathCause::HeartbeatLost)]), Some(Command::Kill));
        assert!(matches!(run(&mut machine, now, [Event::Gone(usage())]), Some(Command::Wait { .. })), "not hopeless");
    }

    #[test]
    fn a_restart_on_request_counts_as_no_death() {
        let (mut machine, now) = (machine(), Instant::now());
        run(&mut machine, now, [Event::Wanted]);
        for incarnation in 2..40 {
            assert_eq!(run(&mut machine, now, [Event::Ready, Event::Restart]), Some(Command::Stop));
            let spawn = Command::Spawn { incarnation, reduced: false };
            assert_eq!(run(&mut machine, now, [Event::Gone(killed())]), Some(spawn));
        }
    }

    fn events() -> impl Strategy<Value = Event> {
        let cause = prop_oneof![
            Just(killed()),
            Just(usage()),
            Just(DeathCause::OutOfMemory),
            Just(DeathCause::StartHung),
            Just(DeathCause::VersionMismatch { ours: 1, theirs: 2 }),
        ];
        prop_oneof![
            3 => Just(Event::Wanted),
            4 => Just(Event::Ready),
            6 => cause.clone().prop_map(Event::Gone),
            2 => cause.prop_map(Event::Fault),
            4 => Just(Event::DelayOver),
            1 => Just(Event::Drain),
            1 => Just(Event::Drained),
            1 => Just(Event::Stop),
            1 => Just(Event::Restart),
            1 => Just(Event::Quarantine),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn any_order_of_events_keeps_the_promises(
            events in prop::collection::vec((events(), 0_u64..40_000), 1..120), chance in 0.0_f64..1.0,
        ) {
            let mut machine = machine();
            let mut now = Instant::now();
            let mut process_exists = false;
            let mut wanted = false;
            let mut last_incarnation = 0;
            for (event, gap) in events {
                now += Duration::from_millis(gap);
                let before = machine.state().clone();
                // The world: only a process that exists can say that it is ready, or go.
                if matches!(event, Event::Ready | Event::Gone(_) | Event::Drained) && !process_exists {
                    continue;
                }
                match event {
                    Event::Wanted if matches!(before, State::Dead | State::GaveUp(_)) => wanted = true,
                    Event::Stop | Event::Drain | Event::Quarantine => wanted = false,
                    Event::DelayOver if matches!(&before, State::GaveUp(reason) if reason.passes_with_time()) => wanted = true,
                    Event::Gone(_) => process_exists = false,
                    _ => {}
                }
                match machine.on(event.clone(), now, chance) {
                    Some(Command::Spawn { incarnation, .. }) => {
                        prop_assert!(!process_exists, "two processes after {event:?} in {before:?}");
                        prop_assert!(wanted, "started what nobody wants after {event:?} in {before:?}");
                        prop_assert!(incarnation > last_incarnation);
                        last_incarnation = incarnation;
                        process_exists = true;
                    }
                    Some(Command::Stop | Command::Kill | Command::Drain) => prop_assert!(process_exists),
                    Some(Command::Wait { delay }) => {
                        prop_assert!(!process_exists && wanted);
                        let waits = match machine.state() {
                            State::Backoff { delay: backoff } => *backoff == delay,
                            State::GaveUp(reason) => reason.passes_with_time(),
                            _ => false,
                        };
                        prop_assert!(waits, "{:?} with a delay", machine.state());
                    }
                    None => {}
                }
                prop_assert_eq!(machine.state().is_alive(), process_exists);
                if !wanted {
                    let put_away = State::GaveUp(GiveUp::Quarantined);
                    let ends = matches!(machine.state(), State::Dead | State::Draining | State::Stopping)
                        || *machine.state() == put_away;
                    prop_assert!(ends, "{:?} although it is not wanted", machine.state());
                }
                if let State::GaveUp(reason) = &before {
                    let wakes = matches!(event, Event::Wanted | Event::Stop | Event::Drain | Event::Quarantine)
                        || event == Event::DelayOver && reason.passes_with_time();
                    let stays = wakes || machine.state() == &before;
                    prop_assert!(stays, "{event:?} woke what was given up");
                }
            }
            // Whatever happened, it can be ended.
            machine.on(Event::Stop, now, chance);
            if process_exists {
                prop_assert_eq!(machine.state(), &State::Stopping);
                machine.on(Event::Gone(killed()), now, chance);
            }
            prop_assert_eq!(machine.state(), &State::Dead);
        }
    }
}
