//! Exit codes: one public table for all binaries.

use std::fmt::Write;

/// How a program of ours ends. The numbers are those of `sysexits.h` where it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ExitCode {
    /// Done, or stopped cleanly.
    Done = 0,
    /// The answer is no: a file refused, a check with errors.
    No = 1,
    /// The command line was wrong.
    Usage = 2,
    /// Data is wrong: a context, a checkpoint, a dataset, an input line.
    BadData = 65,
    /// An input is missing.
    MissingInput = 66,
    /// A service is unavailable at the start: node, store, relay, hub.
    Unavailable = 69,
    /// A defect of the program.
    Bug = 70,
    /// Cannot write: disk full, lock held.
    CannotWrite = 73,
    /// A temporary failure: start me again.
    Temporary = 75,
    /// Not permitted: hotkey, credentials, uid.
    NotPermitted = 77,
    /// The configuration is wrong.
    Configuration = 78,
}

impl ExitCode {
    /// All codes in order.
    pub const ALL: [Self; 11] = [
        Self::Done,
        Self::No,
        Self::Usage,
        Self::BadData,
        Self::MissingInput,
        Self::Unavailable,
        Self::Bug,
        Self::CannotWrite,
        Self::Temporary,
        Self::NotPermitted,
        Self::Configuration,
    ];

    /// The number that the system sees.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The code of a number, if it is one of ours.
    #[must_use]
    pub fn from_number(number: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|code| i32::from(code.number()) == number)
    }

    /// What the code says, in a few words.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Done => "done, or stopped cleanly",
            Self::No => "the answer is no (refused, or a check found errors)",
            Self::Usage => "usage error",
            Self::BadData => "bad data (context, checkpoint, dataset, input line)",
            Self::MissingInput => "input is missing",
            Self::Unavailable => "a service is unavailable (node, store, relay, hub, at the start)",
            Self::Bug => "a defect of the program",
            Self::CannotWrite => "cannot write (disk full, lock held)",
            Self::Temporary => "temporary failure, start again",
            Self::NotPermitted => "not permitted (hotkey, credentials, uid)",
            Self::Configuration => "configuration error",
        }
    }

    /// Whether the same start may succeed later, so that a supervisor of processes should try again.
    #[must_use]
    pub const fn is_worth_a_restart(self) -> bool {
        matches!(self, Self::Unavailable | Self::Bug | Self::CannotWrite | Self::Temporary)
    }

    /// The table for `--help` and the manual page.
    #[must_use]
    pub fn table() -> String {
        let mut table = String::from("Exit codes:\n");
        for code in Self::ALL {
            // Writing to a text cannot fail.
            writeln!(table, "  {:>2}  {}", code.number(), code.meaning()).unwrap_or_default();
        }
        table
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code.number())
    }
}

impl std::process::Termination for ExitCode {
    fn report(self) -> std::process::ExitCode {
        self.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_documented_one() {
        let numbers = ExitCode::ALL.map(ExitCode::number);
        assert_eq!(numbers, [0, 1, 2, 65, 66, 69, 70, 73, 75, 77, 78]);
        for code in ExitCode::ALL {
            assert_eq!(ExitCode::from_number(code.number().into()), Some(code));
            assert!(ExitCode::table().contains(&format!("{:>2}  {}", code.number(), code.meaning())));
        }
        assert_eq!(ExitCode::from_number(3), None);
        assert_eq!(ExitCode::from_number(-1), None);
        let restarted: Vec<u8> =
            ExitCode::ALL.into_iter().filter(|code| code.is_worth_a_restart()).map(ExitCode::number).collect();
        assert_eq!(restarted, [69, 70, 73, 75]);
    }
}
