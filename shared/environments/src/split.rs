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
    /// Names are the environment's own and exact: `gsm8k` has `val`, not `validation`.
    ///
    /// # Errors
    /// [`ParseSplitError`] if the environment has no such split; the reference refuses it too.
    pub fn resolve(environment: EnvironmentId, requested: Option<&str>) -> Result<Self, ParseSplitError> {
        match environment {
            EnvironmentId::Gsm8k => match requested {
                None | Some("train") => Ok(Self::Train),
                Some("val") => Ok(Self::Val),
                Some("test") => Ok(Self::Test),
                Some(other) => {
                    let known = &["train", "val", "test"];
                    Err(ParseSplitError { split: other.to_owned(), environment, known })
                }
            },
        }
    }

    /// Name as it stands in a task id.
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
        let resolve = |requested| Split::resolve(EnvironmentId::Gsm8k, requested);
        assert_eq!(resolve(None), Ok(Split::Train));
        for split in [Split::Train, Split::Val, Split::Test] {
            assert_eq!(resolve(Some(split.as_str())), Ok(split));
            assert_eq!(serde_json::to_string(&split).unwrap(), format!("\"{split}\""));
        }
        for name in ["validation", "", "Train", "dev"] {
            let error = resolve(Some(name)).unwrap_err();
            assert!(error.to_string().contains("gsm8k"), "{error}");
        }
    }
}
