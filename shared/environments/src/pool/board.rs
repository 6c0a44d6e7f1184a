//! Which job goes to which interpreter, as a pure function.

use std::collections::VecDeque;

use tokio::sync::oneshot;

use super::protocol::Reply;
use super::role::Purpose;
use crate::evaluator::Program;

/// The most plain pairs that share a child.
const MOST_SHARED: usize = 16;

/// What is to be evaluated.
#[derive(Clone, Debug)]
pub(super) enum Work {
    Program {
        program: Program,
        /// Seconds that each of its tests has.
        limit_s: u64,
    },
    Pair {
        left: String,
        right: String,
        /// It may share its child with others.
        shares: bool,
    },
}

/// One thing to evaluate and who waits for it.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) work: Work,
    /// An interpreter that has had it: another one is wanted.
    pub(super) avoid: Option<usize>,
    pub(super) reply: oneshot::Sender<Outcome>,
}

/// What became of a job.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The interpreter of slot `slot` answered; of a shared answer, `tests` holds only the job's own record.
    Answered { reply: Reply, slot: usize },
    /// The interpreter failed; nothing is known of the program.
    Failed { detail: String },
    /// Pairs that shared a child got no answer together; alone one may.
    NotShared,
    /// No interpreter is left, and none will be started soon.
    NoInterpreter { detail: String },
}

/// Where an interpreter is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seat {
    /// It starts, or waits to be started.
    Starting,
    Idle,
    Busy,
    /// It died too often.
    GivenUp(String),
}

/// Jobs that wait and interpreters that may take them.
#[derive(Debug)]
pub(super) struct Board {
    purpose: Purpose,
    queue: VecDeque<Job>,
    seats: Vec<Seat>,
}

impl Board {
    pub(super) fn new(purpose: Purpose, seats: usize) -> Self {
        Self { purpose, queue: VecDeque::new(), seats: vec![Seat::Starting; seats] }
    }

    pub(super) fn push(&mut self, job: Job) {
        self.queue.push_back(job);
    }

    pub(super) fn set(&mut self, slot: usize, seat: Seat) {
        if let Some(found) = self.seats.get_mut(slot) {
            *found = seat;
        }
    }

    /// The next job, with those that share its child, and the interpreter that takes it.
    pub(super) fn next(&mut self) -> Option<(usize, Vec<Job>)> {
        self.queue.retain(|job| !job.reply.is_closed());
        let (index, slot) =
            self.queue.iter().enumerate().find_map(|(index, job)| Some((index, self.seat_for(job.avoid)?)))?;
        let idle = self.seats.iter().filter(|seat| **seat == Seat::Idle).count();
        let job = self.queue.remove(index)?;
        let mut jobs = vec![job];
        if matches!(jobs[0].work, Work::Pair { shares: true, .. }) {
            self.add_sharing(&mut jobs, idle);
        }
        self.set(slot, Seat::Busy);
        Some((slot, jobs))
    }

    /// Adds what may share the first job's child, and leaves the other idle interpreters their part.
    fn add_sharing(&mut self, jobs: &mut Vec<Job>, idle: usize) {
        let shares = |job: &Job| matches!(job.work, Work::Pair { shares: true, .. });
        let waiting = self.queue.iter().filter(|job| shares(job)).count();
        let part = (waiting + 1).div_ceil(idle.max(1)).min(MOST_SHARED);
        let mut index = 0;
        while jobs.len() < part && index < self.queue.len() {
            if shares(&self.queue[index]) {
                jobs.extend(self.queue.remove(index));
            } else {
                index += 1;
            }
        }
    }

    /// An idle interpreter other than `avoid`; that one only if no other will ever be had.
    fn seat_for(&self, avoid: Option<usize>) -> Option<usize> {
        let idle = |slot: &usize| self.seats[*slot] == Seat::Idle;
        let others = || (0..self.seats.len()).filter(|slot| Some(*slot) != avoid);
        if others().all(|slot| matches!(self.seats[slot], Seat::GivenUp(_))) {
            return avoid.filter(idle);
        }
        others().find(idle)
    }

    /// Why there is no interpreter; `None` while one is or may come.
    pub(super) fn given_up(&self) -> Option<String> {
        let reasons: Option<Vec<&String>> =
            self.seats.iter().map(|seat| if let Seat::GivenUp(reason) = seat { Some(reason) } else { None }).collect();
        Some(match reasons?.first() {
            Some(reason) => format!("no evaluator is left: {reason}"),
            None => format!("this pool was started without interpreters for {}", self.purpose.work()),
        })
    }

    /// Takes all jobs that wait.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Job> {
        self.queue.drain(..)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(name: &str, shares: bool, avoid: Option<usize>) -> (Job, oneshot::Receiver<Outcome>) {
        let (reply, answer) = oneshot::channel();
        let work = Work::Pair { left: name.to_owned(), right: String::new(), shares };
        (Job { work, avoid, reply }, answer)
    }

    /// Puts jobs on a board and keeps their receivers alive.
    fn board(seats: &[Seat], jobs: &[(&str, bool, Option<usize>)]) -> (Board, Vec<oneshot::Receiver<Outcome>>) {
        let mut board = Board::new(Purpose::Formulas, seats.len());
        for (slot, seat) in seats.iter().enumerate() {
            board.set(slot, seat.clone());
        }
        let mut answers = Vec::new();
        for (name, shares, avoid) in jobs {
            let (job, answer) = pair(name, *shares, *avoid);
            board.push(job);
            answers.push(answer);
        }
        (board, answers)
    }

    fn names(next: Option<(usize, Vec<Job>)>) -> Option<(usize, String)> {
        let (slot, jobs) = next?;
        let name = |job: &Job| match &job.work {
            Work::Pair { left, .. } => left.clone(),
            Work::Program { program, .. } => program.code.to_string(),
        };
        Some((slot, jobs.iter().map(name).collect::<Vec<_>>().join(" ")))
    }

    #[test]
    fn jobs_go_in_order_to_whoever_is_idle() {
        let (mut board, _answers) = board(
            &[Seat::Starting, Seat::Idle, Seat::Idle],
            &[("a", false, None), ("b", false, None), ("c", false, None)],
        );
        assert_eq!(names(board.next()), Some((1, "a".into())));
        assert_eq!(names(board.next()), Some((2, "b".into())));
        assert_eq!(names(board.next()), None);
        board.set(0, Seat::Idle);
        assert_eq!(names(board.next()), Some((0, "c".into())));
    }

    #[test]
    fn a_second_run_waits_for_another_interpreter_unless_none_will_come() {
        let (mut board, _answers) =
            board(&[Seat::Idle, Seat::Busy], &[("again", false, Some(0)), ("next", false, None)]);
        assert_eq!(names(board.next()), Some((0, "next".into())));
        board.set(0, Seat::Idle);
        assert_eq!(names(board.next()), None);
        board.set(1, Seat::GivenUp("died".into()));
        assert_eq!(names(board.next()), Some((0, "again".into())));
    }

    #[test]
    fn plain_pairs_share_a_child_and_leave_others_their_part() {
        let jobs: Vec<(&str, bool, Option<usize>)> =
            vec![("a", true, None), ("x", false, None), ("b", true, None), ("c", true, None), ("d", true, None)];
        let (mut board, _answers) = board(&[Seat::Idle, Seat::Idle], &jobs);
        assert_eq!(names(board.next()), Some((0, "a b".into())));
        assert_eq!(names(board.next()), Some((1, "x".into())));
        board.set(1, Seat::Idle);
        assert_eq!(names(board.next()), Some((1, "c d".into())));
    }

    #[test]
    fn whoever_has_gone_gets_nothing() {
        let (mut board, mut answers) = board(&[Seat::Idle], &[("a", false, None), ("b", false, None)]);
        drop(answers.remove(0));
        assert_eq!(names(board.next()), Some((0, "b".into())));
    }

    #[test]
    fn only_when_all_are_given_up_there_is_none() {
        let (mut board, _answers) = board(&[Seat::GivenUp("first".into()), Seat::Starting], &[("a", false, None)]);
        assert_eq!(board.given_up(), None);
        board.set(1, Seat::GivenUp("second".into()));
        assert_eq!(board.given_up(), Some("no evaluator is left: first".into()));
        assert_eq!(board.drain().count(), 1);
    }
    #[test]
    fn without_any_seat_nobody_waits() {
        for (purpose, work) in [(Purpose::Programs, "programs"), (Purpose::Formulas, "formulas")] {
            let reason = Board::new(purpose, 0).given_up().unwrap();
            assert_eq!(reason, format!("this pool was started without interpreters for {work}"));
        }
    }
}
