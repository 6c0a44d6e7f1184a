//! Faults to inject: what a process is told to do wrong, where, and when.
//!
//! The text stands in [`VARIABLE`]: `;`-separated faults, each `act@point[,slot=N][,epoch=N][,nth=N]`. Here is the grammar, as
//! a pure parser and its reverse; [`Armed`] is what a process asks at each point.

mod armed;
mod error;

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::Duration;

pub use armed::Armed;
pub use error::{FaultError, FaultProblem};

/// The variable that holds the faults of a process.
pub const VARIABLE: &str = "GRAIL_FAULT";

/// A place in the life of a process at which a fault may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Point {
    /// Before the model is loaded.
    Starting,
    /// After it, before anybody is told.
    Loaded,
    /// A peer has connected and is about to be greeted.
    Hello,
    /// The handshake is done, no request was read yet.
    Idle,
    /// A job was accepted; on the computing thread, before there is an answer.
    MidProof,
    /// The answer is computed and half of its frame's bytes are written.
    Replying,
    /// A reload was accepted; on the loading thread.
    Reload,
    /// A sign of life was asked for.
    Ping,
    /// A generation server was told to take other weights.
    Update,
    /// A generation server has drawn a sample and not answered yet.
    Sampled,
}

/// What a process does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Act {
    /// Ends by SIGKILL.
    Kill,
    /// Ends by SIGSEGV.
    Segv,
    /// Stops by SIGSTOP; SIGCONT lets it go on.
    Stop,
    /// Ends by SIGABRT.
    Abort,
    /// Ends with this exit code.
    Exit(u8),
    /// The thread blocks for ever; at [`Point::Ping`] no sign of life is given any more while proofs go on.
    Hang,
    /// The thread is late by this time, which is kept in milliseconds.
    Slow(Duration),
    /// A frame of random bytes; at [`Point::Sampled`] a token that the model does not have.
    Garbage,
    /// Half a frame, then the end of the connection.
    Truncated,
    /// A length prefix of 4 GiB.
    Oversize,
    /// A hello of another protocol version.
    WrongVersion,
    /// A hello with another token.
    WrongToken,
    /// A message of another incarnation.
    StaleEpoch,
    /// At [`Point::MidProof`] the hidden states are not finite; at [`Point::Replying`] the answer's logprobs are not.
    Nan,
    /// The device has no memory left.
    Oom,
    /// The device context is of no use any more.
    Poison,
    /// Success is told, and the old weights stay.
    Stale,
}

/// One fault: an act at a point, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fault {
    act: Act,
    point: Point,
    slot: Option<u32>,
    epoch: Option<u64>,
    nth: NonZeroU32,
}

/// The faults of [`VARIABLE`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FaultPlan {
    faults: Vec<Fault>,
}

impl Point {
    /// All points, in the order in which a process first reaches them: those of a proof worker, then those of a generation server.
    pub const ALL: [Self; 10] = [
        Self::Starting,
        Self::Loaded,
        Self::Hello,
        Self::Idle,
        Self::MidProof,
        Self::Replying,
        Self::Reload,
        Self::Ping,
        Self::Update,
        Self::Sampled,
    ];

    /// The name in the grammar.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Loaded => "loaded",
            Self::Hello => "hello",
            Self::Idle => "idle",
            Self::MidProof => "mid_proof",
            Self::Replying => "replying",
            Self::Reload => "reload",
            Self::Ping => "ping",
            Self::Update => "update",
            Self::Sampled => "sampled",
        }
    }

    /// Names of the acts that have a meaning here.
    #[must_use]
    pub fn acts(self) -> Vec<&'static str> {
        Act::EXAMPLES.into_iter().filter(|act| act.has_meaning_at(self)).map(Act::usage).collect()
    }

    const fn place(self) -> usize {
        self as usize
    }
}

impl Act {
    /// One of each kind.
    pub const EXAMPLES: [Self; 17] = [
        Self::Kill,
        Self::Segv,
        Self::Stop,
        Self::Abort,
        Self::Exit(0),
        Self::Hang,
        Self::Slow(Duration::ZERO),
        Self::Garbage,
        Self::Truncated,
        Self::Oversize,
        Self::WrongVersion,
        Self::WrongToken,
        Self::StaleEpoch,
        Self::Nan,
        Self::Oom,
        Self::Poison,
        Self::Stale,
    ];

    /// Whether a process can do this at `point`.
    #[must_use]
    pub const fn has_meaning_at(self, point: Point) -> bool {
        match self {
            Self::Kill | Self::Segv | Self::Stop | Self::Abort | Self::Exit(_) | Self::Hang | Self::Slow(_) => true,
            Self::Garbage => {
                matches!(point, Point::Hello | Point::Idle | Point::Replying | Point::Ping | Point::Sampled)
            }
            Self::Truncated | Self::Oversize => {
                matches!(point, Point::Hello | Point::Idle | Point::Replying | Point::Ping)
            }
            Self::WrongVersion | Self::WrongToken => matches!(point, Point::Hello),
            Self::StaleEpoch => matches!(point, Point::Hello | Point::Replying | Point::Ping),
            Self::Nan => matches!(point, Point::MidProof | Point::Replying),
            Self::Oom | Self::Poison => matches!(point, Point::MidProof),
            Self::Stale => matches!(point, Point::Update),
        }
    }

    /// How it is written, with a name for its number.
    #[must_use]
    pub const fn usage(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Segv => "segv",
            Self::Stop => "stop",
            Self::Abort => "abort",
            Self::Exit(_) => "exit=CODE",
            Self::Hang => "hang",
            Self::Slow(_) => "slow=MS",
            Self::Garbage => "garbage",
            Self::Truncated => "truncated",
            Self::Oversize => "oversize",
            Self::WrongVersion => "wrong_version",
            Self::WrongToken => "wrong_token",
            Self::StaleEpoch => "stale_epoch",
            Self::Nan => "nan",
            Self::Oom => "oom",
            Self::Poison => "poison",
            Self::Stale => "stale",
        }
    }
}

impl Fault {
    /// `act` the first time that `point` is reached, in every slot and incarnation.
    ///
    /// # Errors
    /// [`FaultProblem::NoMeaning`] if the act cannot be done there.
    pub fn new(act: Act, point: Point) -> Result<Self, FaultProblem> {
        if !act.has_meaning_at(point) {
            return Err(FaultProblem::NoMeaning { act, point });
        }
        // What the grammar cannot say would not survive being handed on.
        let act = match act {
            Act::Slow(late) => Act::Slow(Duration::from_millis(milliseconds(late))),
            other => other,
        };
        Ok(Self { act, point, slot: None, epoch: None, nth: NonZeroU32::MIN })
    }

    /// Only in this slot.
    #[must_use]
    pub const fn slot(self, slot: u32) -> Self {
        Self { slot: Some(slot), ..self }
    }

    /// Only in this incarnation.
    #[must_use]
    pub const fn epoch(self, epoch: u64) -> Self {
        Self { epoch: Some(epoch), ..self }
    }

    /// Only the n-th time that the point is reached, counted from 1.
    #[must_use]
    pub const fn nth(self, nth: NonZeroU32) -> Self {
        Self { nth, ..self }
    }

    const fn is_for(&self, slot: u32, epoch: u64) -> bool {
        let slot_fits = match self.slot {
            Some(wanted) => wanted == slot,
            None => true,
        };
        let epoch_fits = match self.epoch {
            Some(wanted) => wanted == epoch,
            None => true,
        };
        slot_fits && epoch_fits
    }
}

impl FaultPlan {
    /// The plan in this process's [`VARIABLE`]; unset is a plan without faults.
    ///
    /// # Errors
    /// [`FaultError`] names the variable, its value and the remedy.
    pub fn from_environment() -> Result<Self, FaultError> {
        match std::env::var_os(VARIABLE) {
            None => Ok(Self::default()),
            Some(text) => match text.to_str() {
                Some(text) => text.parse(),
                None => {
                    let text = text.to_string_lossy().into_owned();
                    Err(FaultError { fault: text.clone(), text, problem: FaultProblem::NoText })
                }
            },
        }
    }

    /// Whether nothing is to go wrong.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.faults.is_empty()
    }

    /// The faults of one incarnation of one slot.
    #[must_use]
    pub fn armed(&self, slot: u32, epoch: u64) -> Armed {
        Armed::new(self.faults.iter().filter(|fault| fault.is_for(slot, epoch)).copied().collect())
    }
}

impl FromIterator<Fault> for FaultPlan {
    fn from_iter<I: IntoIterator<Item = Fault>>(faults: I) -> Self {
        Self { faults: faults.into_iter().collect() }
    }
}

impl From<Fault> for FaultPlan {
    fn from(fault: Fault) -> Self {
        Self::from_iter([fault])
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(code) => write!(f, "exit={code}"),
            Self::Slow(late) => write!(f, "slow={}", milliseconds(*late)),
            other => f.write_str(other.usage()),
        }
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.act, self.point)?;
        if let Some(slot) = self.slot {
            write!(f, ",slot={slot}")?;
        }
        if let Some(epoch) = self.epoch {
            write!(f, ",epoch={epoch}")?;
        }
        if self.nth != NonZeroU32::MIN {
            write!(f, ",nth={}", self.nth)?;
        }
        Ok(())
    }
}

impl fmt::Display for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, fault) in self.faults.iter().enumerate() {
            let separator = if place == 0 { "" } else { ";" };
            write!(f, "{separator}{fault}")?;
        }
        Ok(())
    }
}

impl FromStr for FaultPlan {
    type Err = FaultError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let parsed = text.split(';').map(|fault| {
            let refused = |problem| FaultError { text: text.to_owned(), fault: fault.trim().to_owned(), problem };
            fault.parse().map_err(refused)
        });
        parsed.collect()
    }
}

impl FromStr for Fault {
    type Err = FaultProblem;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split(',').map(str::trim);
        let (act, point) = parts.next().and_then(|part| part.split_once('@')).ok_or(FaultProblem::NoPoint)?;
        let mut fault = Self::new(act.parse()?, point.parse()?)?;
        let (mut slot, mut epoch, mut nth) = (None, None, None);
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            match key {
                "slot" => once(&mut slot, "slot", value)?,
                "epoch" => once(&mut epoch, "epoch", value)?,
                "nth" => once(&mut nth, "nth", value)?,
                other => return Err(FaultProblem::UnknownKey { key: other.to_owned() }),
            }
        }
        (fault.slot, fault.epoch) = (slot, epoch);
        if let Some(nth) = nth {
            fault.nth = nth;
        }
        Ok(fault)
    }
}

fn once<T: FromStr>(place: &mut Option<T>, key: &'static str, value: &str) -> Result<(), FaultProblem> {
    if place.is_some() {
        return Err(FaultProblem::Repeated { key });
    }
    *place = Some(number(key, value)?);
    Ok(())
}

fn number<T: FromStr>(key: &'static str, value: &str) -> Result<T, FaultProblem> {
    // `parse` would take a sign, which the reverse never writes.
    let digits = Some(value).filter(|value| value.bytes().all(|byte| byte.is_ascii_digit()));
    digits.and_then(|value| value.parse().ok()).ok_or_else(|| FaultProblem::BadNumber { key, value: value.to_owned() })
}

impl FromStr for Act {
    type Err = FaultProblem;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        if let Some(code) = text.strip_prefix("exit=") {
            return Ok(Self::Exit(number("exit", code)?));
        }
        if let Some(late) = text.strip_prefix("slow=") {
            return Ok(Self::Slow(Duration::from_millis(number("slow", late)?)));
        }
        Self::EXAMPLES
            .into_iter()
            .find(|act| act.usage() == text)
            .ok_or_else(|| FaultProblem::UnknownAct { act: text.to_owned() })
    }
}

impl FromStr for Point {
    type Err = FaultProblem;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        Self::ALL
            .into_iter()
            .find(|point| point.name() == text)
            .ok_or_else(|| FaultProblem::UnknownPoint { point: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn act() -> impl Strategy<Value = Act> {
        (0..Act::EXAMPLES.len(), any::<u8>(), any::<u32>()).prop_map(|(kind, code, late)| match Act::EXAMPLES[kind] {
            Act::Exit(_) => Act::Exit(code),
            Act::Slow(_) => Act::Slow(Duration::from_millis(late.into())),
            other => other,
        })
    }

    fn fault() -> impl Strategy<Value = Fault> {
        let point = (0..Point::ALL.len()).prop_map(|place| Point::ALL[place]);
        let when = (any::<Option<u32>>(), any::<Option<u64>>(), any::<NonZeroU32>());
        (act(), point, when).prop_filter_map("no such fault", |(act, point, (slot, epoch, nth))| {
            let fault = Fault::new(act, point).ok()?;
            Some(Fault { slot, epoch, nth, ..fault })
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(faults in prop::collection::vec(fault(), 0..6)) {
            let plan = FaultPlan::from_iter(faults);
            prop_assert_eq!(plan.to_string().parse::<FaultPlan>().unwrap(), plan);
        }

        #[test]
        fn any_text_is_read_or_refused_and_never_panics(text in "[a-z@=,;_ 0-9+-]{0,40}") {
            if let Ok(plan) = text.parse::<FaultPlan>() {
                prop_assert_eq!(plan.to_string().parse::<FaultPlan>().unwrap(), plan);
            }
        }
    }

    #[test]
    fn the_grammar_is_the_documented_one() {
        let nth = |number| NonZeroU32::new(number).unwrap();
        let kill = Fault::new(Act::Kill, Point::MidProof).unwrap().slot(1).epoch(2).nth(nth(3));
        let late = Fault::new(Act::Slow(Duration::from_millis(250)), Point::Replying).unwrap();
        let plan = FaultPlan::from_iter([kill, late]);
        assert_eq!(plan.to_string(), "kill@mid_proof,slot=1,epoch=2,nth=3;slow=250@replying");
        let loosely = " kill @ mid_proof , nth=3, epoch=2,slot=1 ; slow=250@replying ";
        assert_eq!(loosely.parse::<FaultPlan>().unwrap(), plan);
        assert!("".parse::<FaultPlan>().unwrap().is_empty());
    }

    #[test]
    fn a_text_without_meaning_is_refused_with_the_remedy() {
        for (text, expected) in [
            ("kill", "names no point: write act@point"),
            ("kill@mid_proof;;", "names no point"),
            ("explode@idle", "act \"explode\" is none: kill, segv, stop, abort, exit=CODE, hang, slow=MS, garbage"),
            (
                "kill@lunch",
                "point \"lunch\" is none: starting, loaded, hello, idle, mid_proof, replying, reload, ping, update, sampled are",
            ),
            ("stale@reload", "stale has no meaning at reload"),
            ("exit@idle", "act \"exit\" is none"),
            ("exit=256@idle", "exit=\"256\" is no number that fits"),
            ("slow=+1@idle", "slow=\"+1\" is no number that fits"),
            ("kill@idle,nth=0", "nth=\"0\" is no number that fits"),
            ("kill@idle,slot=-1", "slot=\"-1\""),
            ("kill@idle,slot=1,slot=1", "slot is given twice"),
            ("kill@idle,often", "\"often\" is none of slot=N, epoch=N and nth=N"),
            ("wrong_token@idle", "wrong_token has no meaning at idle, where kill, segv, stop, abort, exit=CODE, hang"),
            ("oom@starting", "oom has no meaning at starting"),
        ] {
            let error = text.parse::<FaultPlan>().unwrap_err().to_string();
            assert!(error.contains("GRAIL_FAULT") && error.contains(&format!("{text:?}")), "{error}");
            assert!(error.contains(expected), "{error}");
            assert!(error.ends_with("or unset GRAIL_FAULT to inject none"), "{error}");
        }
    }

    #[test]
    fn every_act_has_a_meaning_somewhere_and_no_point_is_without() {
        for act in Act::EXAMPLES {
            assert!(Point::ALL.into_iter().any(|point| act.has_meaning_at(point)), "{act}");
        }
        for point in Point::ALL {
            assert!(point.acts().contains(&"kill"), "{point}");
        }
        assert!(!Point::Starting.acts().contains(&"garbage"));
        assert!(Point::Hello.acts().contains(&"wrong_token"));
    }
}
