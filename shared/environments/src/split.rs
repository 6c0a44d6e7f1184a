//! Parts of a data set.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::EnvironmentId;

/// Part of an environment's data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// What miners work on by default.
    Train,
    /// Rows of the training file that are held out.
    Val,
    /// The data set's own test file.
    Test,
}

/// A text that names no split of the environment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{split:?} is no split of {environment}; it has {known:?}")]
pub struct ParseSplitError {
    /// The text.
    pub split: String,
    /// The environment.
    pub environment: EnvironmentId,
    /// What would be accepted.
    pub known: &'static [&'static str],
}

impl Split {
    /// The split that `environment` uses when a checkpoint's `env_params` say `requested`, which may be absent.
    ///
    /// Names are the environment's own and exact: `gsm8k` and `math` have `val`, not `validation`; `mbpp` takes both and has
    /// no `test`, since its test file is part of the other two; `humaneval` is always `test`, whatever is asked for.
    ///
    /// # Errors
    /// [`ParseSplitError`] if the environment has no such split; the reference refuses it too.
    pub fn resolve(environment: EnvironmentId, requested: Option<&str>) -> Result<Self, ParseSplitError> {
        let known: &'static [&'static str] = match environment {
            EnvironmentId::HumanEval => return Ok(Self::Test),
            EnvironmentId::Mbpp => &["train", "val", "validation"],
            EnvironmentId::Gsm8k | EnvironmentId::Math => &["train", "val", "test"],
        };
        match requested {
            None | Some("train") => Ok(Self::Train),
            Some("val") => Ok(Self::Val),
            Some("validation") if known.contains(&"validation") => Ok(Self::Val),
            Some("test") if known.contains(&"test") => Ok(Self::Test),
            Some(other) => Err(ParseSplitError { split: other.to_owned(), environment, known }),
        }
    }

    /// Name in logs and records; what ids of tasks start with may differ.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Val => "val",
            Self::Test => "test",
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_exact_and_train_is_the_default() {
        for environment in [EnvironmentId::Gsm8k, EnvironmentId::Math] {
            let resolve = |requested| Split::resolve(environment, requested);
            assert_eq!(resolve(None), Ok(Split::Train));
            for split in [Split::Train, Split::Val, Split::Test] {
                assert_eq!(resolve(Some(split.as_str())), Ok(split));
                assert_eq!(serde_json::to_string(&split).unwrap(), format!("\"{split}\""));
            }
            for name in ["validation", "", "Train", "dev"] {
                let error = resolve(Some(name)).unwrap_err();
                assert!(error.to_string().contains(environment.as_str()), "{error}");
            }
        }
    }

    #[test]
    fn mbpp_has_no_test_and_humaneval_nothing_else() {
        let mbpp = |requested| Split::resolve(EnvironmentId::Mbpp, requested);
        assert_eq!([mbpp(None), mbpp(Some("train"))], [Ok(Split::Train), Ok(Split::Train)]);
        assert_eq!([mbpp(Some("val")), mbpp(Some("validation"))], [Ok(Split::Val), Ok(Split::Val)]);
        for name in ["test", "prompt", "Validation", ""] {
            assert!(mbpp(Some(name)).is_err(), "{name}");
        }
        for requested in [None, Some("train"), Some("val"), Some("whatever")] {
            assert_eq!(Split::resolve(EnvironmentId::HumanEval, requested), Ok(Split::Test));
        }
    }
}
