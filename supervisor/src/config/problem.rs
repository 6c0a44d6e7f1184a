//! What is wrong with a configuration: all of it at once, each with its place and the next step.

use std::fmt;

use serde::Serialize;

use super::origin::Origin;
use super::report::Report;

/// One thing that must be corrected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The variable as it was written, or empty for a defect of the file itself.
    pub variable: &'static str,
    /// Its value; `None` if it is not set, redacted if it is a secret.
    pub value: Option<String>,
    pub origin: Origin,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.variable, &self.value, &self.origin) {
            ("", _, origin) => write!(f, "{origin}: ")?,
            (variable, Some(value), origin) => write!(f, "{variable}={value} ({origin}): ")?,
            (variable, None, _) => write!(f, "{variable} is not set: ")?,
        }
        write!(f, "{}; {}", self.what, self.remedy)
    }
}

/// Something worth knowing that stops nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Warning {
    pub variable: String,
    pub origin: Origin,
    pub text: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.variable.is_empty() {
            write!(f, "{}: {}", self.origin, self.text)
        } else {
            write!(f, "{} ({}): {}", self.variable, self.origin, self.text)
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub struct ConfigError {
    /// Everything that is wrong, in the order of the table; never empty.
    pub problems: Vec<Problem>,
    /// All variables as far as they were understood.
    pub report: Report,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.as_slice() {
            [problem] => write!(f, "the configuration has a problem: {problem}"),
            problems => {
                write!(f, "the configuration has {} problems:", problems.len())?;
                problems.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
            }
        }
    }
}
