//! From what an interpreter reports to a verdict, or to none.
//!
//! A test has five seconds, as in the reference, and what the alarm raises then is raised inside of the program, which may
//! swallow it. A single, longer alarm would not do: a program may be in a `try` after five seconds and out of it after eight. So
//! a program with a test that the alarm ended is run once more, with eight seconds: what ends between four and eight seconds
//! may have ended in time on a validator or not, and what still runs failed there, too.

use std::time::Duration;

use super::protocol::{Record, Reply, SyntaxFound, TIMEOUT_CLASS};
use crate::evaluator::{EvaluatorError, ProgramVerdict, Syntax, TestOutcome};

/// Seconds that a test has, counted as if the machine had nothing else to do: the reference's alarm.
pub(super) const TEST_LIMIT_S: u64 = 5;
/// Seconds that it has when the alarm ended it the first time.
pub(super) const LONG_TEST_LIMIT_S: u64 = 8;
/// A test that ends by itself after this may not end in time on a validator.
const NEAR_ALARM: Duration = Duration::from_secs(4);
/// An alarm that rings earlier than this before the limit has rung because the machine was too busy to tell.
const EARLY: Duration = Duration::from_secs(1);
/// A program with a test that takes longer is run twice.
const LONG: Duration = Duration::from_millis(2_500);

/// The seconds per test of a second run, by another interpreter, that must come before the verdict counts; `None` if the first
/// run is enough.
pub(super) fn second_limit_s(reply: &Reply) -> Option<u64> {
    let is_long = |test: &Record| !test.timed_out() && test.wall() > LONG;
    if reply.tests.iter().any(Record::timed_out) {
        Some(LONG_TEST_LIMIT_S)
    } else if reply.unordered || reply.tests.iter().any(is_long) {
        Some(TEST_LIMIT_S)
    } else {
        None
    }
}

/// The verdict of one run that was done with `limit_s` seconds per test.
pub(super) fn of_run(reply: &Reply, limit_s: u64) -> Result<ProgramVerdict, EvaluatorError> {
    let late = reply.tests.iter().position(|test| !test.timed_out() && test.wall() >= NEAR_ALARM);
    if let Some(index) = late {
        let seconds = reply.tests[index].wall().as_secs_f64();
        let detail = format!("test {index} took {seconds:.1} s, too near to the limit of 5 s");
        return Err(EvaluatorError::Undecidable { detail });
    }
    let least = Duration::from_secs(limit_s) - EARLY;
    if let Some(index) = reply.tests.iter().position(|test| test.timed_out() && test.wall() < least) {
        let detail = format!("test {index} was ended before it had its time, because this machine is too busy");
        return Err(EvaluatorError::Undecidable { detail });
    }
    let syntax = match reply.syntax {
        Some(SyntaxFound::Valid) => Syntax::Valid,
        Some(SyntaxFound::Invalid) => Syntax::Invalid,
        Some(SyntaxFound::CompilerFailed) => Syntax::CompilerFailed,
        None => return Err(EvaluatorError::Undecidable { detail: "its syntax was not reported".to_owned() }),
    };
    let outcome =
        |test: &super::protocol::Record| TestOutcome { error_class: test.error_class.clone(), wall: test.wall() };
    Ok(ProgramVerdict { syntax, tests: reply.tests.iter().map(outcome).collect() })
}

/// How a test ended, as far as two runs must agree on it.
#[derive(PartialEq, Eq)]
enum End {
    Passed,
    Failed,
    TimedOut,
}

impl End {
    fn of(outcome: &TestOutcome) -> Self {
        match outcome.error_class.as_deref() {
            None => Self::Passed,
            Some(TIMEOUT_CLASS) => Self::TimedOut,
            Some(_) => Self::Failed,
        }
    }
}

/// The verdict of two runs, if they agree on what pays and on what the alarm ended.
pub(super) fn of_both(first: ProgramVerdict, second: &ProgramVerdict) -> Result<ProgramVerdict, EvaluatorError> {
    let ends = |verdict: &ProgramVerdict| verdict.tests.iter().map(End::of).collect::<Vec<_>>();
    if first.syntax != second.syntax || ends(&first) != ends(second) {
        let detail = "two runs came to different results".to_owned();
        return Err(EvaluatorError::Undecidable { detail });
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::super::protocol::{Record, Status};
    use super::*;

    fn reply(tests: &[(Option<&str>, u64)], unordered: bool) -> Reply {
        let record = |(error, milliseconds): &(Option<&str>, u64)| Record {
            error_class: error.map(ToOwned::to_owned),
            wall_us: milliseconds * 1_000,
        };
        Reply {
            id: 1,
            status: Status::Done,
            detail: String::new(),
            syntax: Some(SyntaxFound::Valid),
            tests: tests.iter().map(record).collect(),
            unordered,
            forks: 1,
            rss_kib: 1,
        }
    }

    #[test]
    fn a_test_near_the_alarm_gives_no_verdict() {
        assert!(of_run(&reply(&[(None, 3_999)], false), TEST_LIMIT_S).is_ok());
        for (late, limit_s) in [(4_000, TEST_LIMIT_S), (4_999, TEST_LIMIT_S), (7_999, LONG_TEST_LIMIT_S)] {
            for error in [None, Some("ValueError")] {
                let found = of_run(&reply(&[(error, late)], false), limit_s);
                assert!(matches!(found, Err(EvaluatorError::Undecidable { .. })));
            }
        }
    }

    #[test]
    fn an_alarm_on_a_busy_machine_says_nothing() {
        for (limit_s, early, late) in [(TEST_LIMIT_S, 3_999, 4_500), (LONG_TEST_LIMIT_S, 6_999, 7_500)] {
            let error = of_run(&reply(&[(Some("Timeout"), early)], false), limit_s).unwrap_err();
            assert!(error.to_string().contains("too busy"), "{error}");
            assert!(of_run(&reply(&[(Some("Timeout"), late)], false), limit_s).is_ok());
        }
    }

    #[test]
    fn what_may_come_out_otherwise_is_run_twice() {
        let second = |tests: &[(Option<&str>, u64)], unordered| second_limit_s(&reply(tests, unordered));
        assert_eq!(second(&[(None, 2_500)], false), None);
        assert_eq!(second(&[(None, 2_501)], false), Some(5));
        assert_eq!(second(&[(Some("KeyError"), 2_501)], false), Some(5));
        assert_eq!(second(&[(None, 1)], true), Some(5));
        assert_eq!(second(&[(Some("KeyError"), 1)], true), Some(5));
        assert_eq!(second(&[(Some("Timeout"), 5_000)], false), Some(8));
        assert_eq!(second(&[(Some("Timeout"), 5_000), (None, 2_501)], true), Some(8));
    }

    #[test]
    fn what_the_alarm_ended_fails_if_it_still_runs_after_eight_seconds() {
        let of = |tests: &[(Option<&str>, u64)], limit_s| of_run(&reply(tests, false), limit_s);
        let first = of(&[(Some("Timeout"), 5_000), (None, 1)], TEST_LIMIT_S).unwrap();
        let same = of(&[(Some("Timeout"), 8_000), (None, 2)], LONG_TEST_LIMIT_S).unwrap();
        let verdict = of_both(first.clone(), &same).unwrap();
        assert_eq!(verdict.tests.iter().map(TestOutcome::has_passed).collect::<Vec<_>>(), [false, true]);
        // It ended between: before or after the alarm, as the validator's machine is.
        assert!(of(&[(None, 6_000), (None, 2)], LONG_TEST_LIMIT_S).is_err());
        for sooner in [None, Some("KeyError")] {
            let second = of(&[(sooner, 3_000), (None, 2)], LONG_TEST_LIMIT_S).unwrap();
            assert!(of_both(first.clone(), &second).is_err());
        }
    }

    #[test]
    fn two_runs_must_agree_on_what_pays() {
        let verdict = |tests: &[(Option<&str>, u64)]| of_run(&reply(tests, false), TEST_LIMIT_S).unwrap();
        let first = verdict(&[(None, 1), (Some("KeyError"), 2)]);
        let same = verdict(&[(None, 3), (Some("IndexError"), 4)]);
        assert_eq!(of_both(first.clone(), &same).unwrap(), first);
        assert!(of_both(first, &verdict(&[(None, 1), (None, 1)])).is_err());
    }
}
