//! Why a text is no plan of faults, and what to write instead.

use super::{Act, Point, VARIABLE};

/// A text that is no plan of faults.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read {VARIABLE}={text:?}: fault {fault:?}: {problem}; or unset {VARIABLE} to inject none")]
pub struct FaultError {
    /// The whole text.
    pub text: String,
    /// The fault in it that is wrong.
    pub fault: String,
    pub problem: FaultProblem,
}

/// What is wrong with one fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultProblem {
    #[error("it is no UTF-8 text: write act@point[,slot=N][,epoch=N][,nth=N]")]
    NoText,
    #[error("it names no point: write act@point[,slot=N][,epoch=N][,nth=N]")]
    NoPoint,
    #[error("act {act:?} is none: {known} are", known = list(Act::EXAMPLES.map(Act::usage)))]
    UnknownAct { act: String },
    #[error("point {point:?} is none: {known} are", known = list(Point::ALL.map(Point::name)))]
    UnknownPoint { point: String },
    #[error("{key:?} is none of slot=N, epoch=N and nth=N")]
    UnknownKey { key: String },
    #[error("{key} is given twice: leave one out")]
    Repeated { key: &'static str },
    #[error("{key}={value:?} is no number that fits: {range}", range = range(.key))]
    BadNumber { key: &'static str, value: String },
    #[error("{act} has no meaning at {point}, where {known} have one", known = list(.point.acts()))]
    NoMeaning { act: Act, point: Point },
}

fn list(names: impl IntoIterator<Item = &'static str>) -> String {
    names.into_iter().collect::<Vec<_>>().join(", ")
}

fn range(key: &str) -> &'static str {
    match key {
        "exit" => "write a code from 0 to 255",
        "slow" => "write milliseconds",
        "nth" => "count from 1",
        _ => "count from 0",
    }
}
