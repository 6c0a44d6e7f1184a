//! From what an interpreter reports to a verdict, or to none.

use std::time::Duration;

use super::protocol::{Reply, SyntaxFound};
use crate::evaluator::{EvaluatorError, ProgramVerdict, Syntax, TestOutcome};

/// Seconds that a test has in the sandbox, counted as if the machine had nothing else to do. In the reference an alarm ends it after five: one that runs on until here was ended
/// there too, and one that ends between [`NEAR_ALARM`] and here may have been or not.
pub(super) const TEST_LIMIT_S: u64 = 8;
/// A test that ends by itself after this may not end in time on a validator.
const NEAR_ALARM: Duration = Duration::from_secs(4);
/// An alarm that rings before has rung because the machine was too busy to tell.
const NEAR_LIMIT: Duration = Duration::from_secs(7);
/// A program with a test that takes longer is run twice.
const LONG: Duration = Duration::from_millis(2_500);

/// Whether a program must be run a second time, by another interpreter, before its verdict counts. A program whose tests were
/// all ended by the alarm would only be ended again.
pub(super) fn needs_second_run(reply: &Reply) -> bool {
    let ended = || reply.tests.iter().filter(|test| !test.timed_out());
    (reply.unordered && ended().next().is_some()) || ended().any(|test| test.wall() > LONG)
}

/// The verdict of one run that was done.
pub(super) fn of_run(reply: &Reply) -> Result<ProgramVerdict, EvaluatorError> {
    let late = reply.tests.iter().position(|test| !test.timed_out() && test.wall() >= NEAR_ALARM);
    if let Some(index) = late {
        let seconds = reply.tests[index].wall().as_secs_f64();
        let detail = format!("test {index} took {seconds:.1} s, too near to the limit of 5 s");
        return Err(EvaluatorError::Undecidable { detail });
    }
    if let Some(index) = reply.tests.iter().position(|test| test.timed_out() && test.wall() < NEAR_LIMIT) {
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

/// The verdict of two runs, if they agree on what pays.
pub(super) fn of_both(first: ProgramVerdict, second: &ProgramVerdict) -> Result<ProgramVerdict, EvaluatorError> {
    let passed = |verdict: &ProgramVerdict| verdict.tests.iter().map(TestOutcome::has_passed).collect::<Vec<_>>();
    if first.syntax != second.syntax || passed(&first) != passed(second) {
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
    fn a_test_near_the_alarm_gives_no_verdict_and_one_beyond_it_failed() {
        assert!(of_run(&reply(&[(None, 3_999)], false)).is_ok());
        for late in [4_000, 7_999] {
            for error in [None, Some("ValueError")] {
                assert!(matches!(of_run(&reply(&[(error, late)], false)), Err(EvaluatorError::Undecidable { .. })));
            }
        }
        let verdict = of_run(&reply(&[(Some("Timeout"), 8_000), (None, 1)], false)).unwrap();
        assert_eq!(verdict.tests.iter().map(TestOutcome::has_passed).collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn an_alarm_on_a_busy_machine_says_nothing() {
        let error = of_run(&reply(&[(Some("Timeout"), 6_999)], false)).unwrap_err();
        assert!(error.to_string().contains("too busy"), "{error}");
        assert!(of_run(&reply(&[(Some("Timeout"), 7_500)], false)).is_ok());
    }

    #[test]
    fn what_may_come_out_otherwise_is_run_twice() {
        assert!(!needs_second_run(&reply(&[(None, 2_500)], false)));
        assert!(needs_second_run(&reply(&[(None, 2_501)], false)));
        assert!(needs_second_run(&reply(&[(None, 1)], true)));
        assert!(!needs_second_run(&reply(&[(Some("Timeout"), 8_000)], true)));
        assert!(needs_second_run(&reply(&[(Some("Timeout"), 8_000), (None, 1)], true)));
    }

    #[test]
    fn two_runs_must_agree_on_what_pays() {
        let verdict = |tests: &[(Option<&str>, u64)]| of_run(&reply(tests, false)).unwrap();
        let first = verdict(&[(None, 1), (Some("KeyError"), 2)]);
        let same = verdict(&[(None, 3), (Some("IndexError"), 4)]);
        assert_eq!(of_both(first.clone(), &same).unwrap(), first);
        assert!(of_both(first, &verdict(&[(None, 1), (None, 1)])).is_err());
    }
}
