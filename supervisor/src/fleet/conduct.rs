//! What a generation server's answers say of the server: one that answers nonsense is replaced, however healthy it looks.

use std::collections::VecDeque;

use grail_ipc::generate_api::Blame;

use crate::generation::GenerationError;

/// Bad answers in a row that are too many.
const MOST_IN_A_ROW: usize = 3;
/// Answers that are remembered, and bad ones among them that are too many: more than 2 %.
const REMEMBERED: usize = 200;
const MOST_REMEMBERED: usize = REMEMBERED / 50;

/// The last answers of one server.
#[derive(Debug, Default)]
pub(super) struct Conduct {
    is_bad: VecDeque<bool>,
    in_a_row: usize,
    /// It was said once that the server must be replaced: many answers may come before it is.
    is_told: bool,
}

impl Conduct {
    /// Notes an answer; why the server must be replaced, once, if it must.
    pub(super) fn note(&mut self, is_bad: bool) -> Option<String> {
        let reason = self.reason(is_bad).filter(|_| !self.is_told);
        self.is_told |= reason.is_some();
        reason
    }

    fn reason(&mut self, is_bad: bool) -> Option<String> {
        self.in_a_row = if is_bad { self.in_a_row + 1 } else { 0 };
        self.is_bad.push_back(is_bad);
        if self.is_bad.len() > REMEMBERED {
            self.is_bad.pop_front();
        }
        let (bad, all) = (self.is_bad.iter().filter(|is_bad| **is_bad).count(), self.is_bad.len());
        if self.in_a_row >= MOST_IN_A_ROW {
            Some(format!("{MOST_IN_A_ROW} answers in a row were of no use"))
        } else if bad > MOST_REMEMBERED {
            Some(format!("{bad} of its last {all} answers were of no use"))
        } else {
            None
        }
    }
}

/// Whether an answer is the server's fault; `None` for what says nothing of it.
pub(super) fn is_its_fault(error: &GenerationError) -> Option<bool> {
    match error {
        GenerationError::Unacceptable { source, .. } => match source.blame() {
            Blame::Server | Blame::Poison => Some(true),
            Blame::Sample => Some(false),
            Blame::Aborted => None,
        },
        GenerationError::Unreadable { .. } => Some(true),
        GenerationError::Status { status, .. } => Some(*status >= 500 && *status != OVERLOADED),
        GenerationError::Transport { source, .. } | GenerationError::BrokenOff { source, .. } => {
            source.is_timeout().then_some(true)
        }
        GenerationError::NotRunning => None,
    }
}

/// A server that has too much to do, or is on its way out, says so.
const OVERLOADED: u16 = 503;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_in_a_row_or_more_than_two_percent_are_too_many() {
        let mut conduct = Conduct::default();
        assert_eq!((conduct.note(true), conduct.note(true)), (None, None));
        assert_eq!(conduct.note(false), None);
        assert_eq!((conduct.note(true), conduct.note(true)), (None, None));
        assert!(conduct.note(true).unwrap().contains("in a row"));
        assert_eq!((0..100).find_map(|_| conduct.note(true)), None, "it is told once");

        let mut conduct = Conduct::default();
        let noted: Vec<_> = (0..REMEMBERED).map(|at| conduct.note(at % 50 == 7)).collect();
        assert_eq!(noted.iter().flatten().count(), 0, "four of 200");
        for _ in 0..REMEMBERED {
            assert_eq!(conduct.note(false), None);
        }
        let noted = (0..100).find_map(|at| conduct.note(at % 20 == 0)).unwrap();
        assert_eq!(noted, "5 of its last 200 answers were of no use");
    }

    #[test]
    fn only_what_the_server_did_counts() {
        let rid = || "r".to_owned();
        let status = |status| GenerationError::Status { rid: rid(), status, detail: String::new() };
        assert_eq!([500, 502, 503, 400].map(|code| is_its_fault(&status(code))), [true, true, false, false].map(Some));
        assert_eq!(is_its_fault(&GenerationError::Unreadable { rid: rid(), detail: String::new() }), Some(true));
        assert_eq!(is_its_fault(&GenerationError::NotRunning), None);
    }
}
