//! What the pool and an interpreter say to each other: frames of JSON behind a little-endian `u32` with their length.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The longest answer: one record per test, each with a name of at most 100 characters, within the 64 KiB that a child may
/// say.
pub(super) const MOST_REPLY_BYTES: usize = 1 << 20;

/// First frame to an interpreter.
#[derive(Debug, Serialize)]
pub(super) struct Start {
    /// Filters of system calls for the children, in hexadecimal.
    pub(super) filters: Vec<String>,
    /// Whether the process layer is on.
    pub(super) process: bool,
    /// Limits that the interpreter takes and its children inherit: name in Python's `resource`, value.
    pub(super) limits: Vec<(&'static str, u64)>,
    /// Limits of children only.
    pub(super) child_limits: Vec<(&'static str, u64)>,
    /// Steps by which it is nicer than this process.
    pub(super) nice: u8,
    /// Folder of sympy, for an interpreter of formulas.
    pub(super) site: Option<String>,
}

/// What is asked.
#[derive(Debug, Serialize)]
pub(super) struct Request<'r> {
    pub(super) id: u64,
    #[serde(rename = "kind")]
    pub(super) question: Kind,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) code: Option<&'r str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tests: Option<&'r [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pairs: Option<&'r [(String, String)]>,
    /// Seconds of each test, counted inside of the child.
    pub(super) time_s: u64,
    /// Wall-clock seconds after which the child is killed.
    pub(super) wall_s: u64,
    /// CPU seconds after which the kernel ends the child; none where limits are off.
    pub(super) cpu_s: Option<u64>,
}

/// Kind of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    Run,
    Sympy,
    Ping,
}

/// First frame of an interpreter.
#[derive(Debug, Deserialize)]
pub(super) struct Hello {
    pub(super) python: String,
    pub(super) sympy: Option<String>,
    pub(super) rss_kib: u64,
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Reply {
    pub(super) id: u64,
    pub(super) status: Status,
    /// Why there is no verdict.
    #[serde(default)]
    pub(super) detail: String,
    #[serde(default)]
    pub(super) syntax: Option<SyntaxFound>,
    #[serde(default)]
    pub(super) tests: Vec<Record>,
    /// Whether the verdict may hang on the order of a set or on addresses.
    #[serde(default)]
    pub(super) unordered: bool,
    /// Children so far.
    pub(super) forks: u32,
    /// The most memory that the interpreter itself ever had.
    pub(super) rss_kib: u64,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    /// The child did all it had to.
    Done,
    /// The child ended in another way than the reference's would have.
    Undecidable,
    /// No text of a model was run.
    SandboxFailed,
    /// Answer to a ping.
    Pong,
}

/// What compiling came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum SyntaxFound {
    Valid,
    Invalid,
    CompilerFailed,
}

/// One test, or one pair of formulas.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    pub(super) error_class: Option<String>,
    pub(super) wall_us: u64,
}

impl Record {
    pub(super) fn wall(&self) -> Duration {
        Duration::from_micros(self.wall_us)
    }

    /// Whether the alarm ended it.
    pub(super) fn timed_out(&self) -> bool {
        self.error_class.as_deref() == Some(TIMEOUT_CLASS)
    }
}

/// Class of the exception that the alarm raises.
pub(super) const TIMEOUT_CLASS: &str = "Timeout";
