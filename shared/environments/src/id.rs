//! Names of environments.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An environment that can be mined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "&'static str")]
pub enum EnvironmentId {
    /// Grade-school maths word problems.
    Gsm8k,
    /// Competition mathematics with formulas as answers.
    Math,
    /// Short Python functions with asserts; `python_code` is another name for it.
    Mbpp,
    /// Python functions to be completed, with one test program each.
    HumanEval,
}

/// Ids of environments that exist in the protocol but are not implemented.
const NOT_SUPPORTED: [&str; 1] = ["triton_kernel"];

/// What messages say that there is.
const KNOWN: &str = "gsm8k, math, mbpp (or python_code) and humaneval";

/// A text that names no environment that can be mined. There is no default to fall back to: another environment means
/// other prompts, which every validator refuses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseEnvironmentIdError {
    /// The protocol knows it, this program does not.
    #[error("environment {id:?} is not supported, only {KNOWN} are; windows with this checkpoint are skipped")]
    NotSupported {
        /// The id.
        id: String,
    },
    /// The protocol does not know it.
    #[error("{id:?} is no environment; {KNOWN} are supported")]
    Unknown {
        /// The id.
        id: String,
    },
}

impl EnvironmentId {
    /// Every environment.
    pub const ALL: [Self; 4] = [Self::Gsm8k, Self::Math, Self::Mbpp, Self::HumanEval];

    /// The id as checkpoints write it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gsm8k => "gsm8k",
            Self::Math => "math",
            Self::Mbpp => "mbpp",
            Self::HumanEval => "humaneval",
        }
    }
}

impl fmt::Display for EnvironmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<EnvironmentId> for &'static str {
    fn from(id: EnvironmentId) -> Self {
        id.as_str()
    }
}

impl FromStr for EnvironmentId {
    type Err = ParseEnvironmentIdError;

    fn from_str(id: &str) -> Result<Self, Self::Err> {
        match id {
            "gsm8k" => Ok(Self::Gsm8k),
            "math" => Ok(Self::Math),
            "mbpp" | "python_code" => Ok(Self::Mbpp),
            "humaneval" => Ok(Self::HumanEval),
            known if NOT_SUPPORTED.contains(&known) => Err(ParseEnvironmentIdError::NotSupported { id: id.to_owned() }),
            _ => Err(ParseEnvironmentIdError::Unknown { id: id.to_owned() }),
        }
    }
}

impl TryFrom<String> for EnvironmentId {
    type Error = ParseEnvironmentIdError;

    fn try_from(id: String) -> Result<Self, Self::Error> {
        id.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exact_ids_are_environments() {
        for (id, environment) in ["gsm8k", "math", "mbpp", "humaneval"].into_iter().zip(EnvironmentId::ALL) {
            assert_eq!((id.parse(), environment.to_string().as_str()), (Ok(environment), id));
        }
        assert_eq!("python_code".parse(), Ok(EnvironmentId::Mbpp));
        for id in NOT_SUPPORTED {
            let error = id.parse::<EnvironmentId>().unwrap_err();
            assert_eq!(error, ParseEnvironmentIdError::NotSupported { id: id.to_owned() });
            assert!(error.to_string().contains(id), "{error}");
        }
        for id in ["", "GSM8K", "gsm8k ", "HumanEval", "python", "sat"] {
            assert_eq!(id.parse::<EnvironmentId>(), Err(ParseEnvironmentIdError::Unknown { id: id.to_owned() }));
        }
    }

    #[test]
    fn json_form_is_the_id() {
        assert_eq!(serde_json::to_string(&EnvironmentId::Gsm8k).unwrap(), "\"gsm8k\"");
        assert_eq!(serde_json::from_str::<EnvironmentId>("\"gsm8k\"").unwrap(), EnvironmentId::Gsm8k);
        assert_eq!(serde_json::from_str::<EnvironmentId>("\"python_code\"").unwrap(), EnvironmentId::Mbpp);
        assert!(serde_json::from_str::<EnvironmentId>("\"triton_kernel\"").is_err());
    }
}
