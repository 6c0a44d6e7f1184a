//! The four data sets as their authors published them.

use std::fmt;
use std::ops::RangeInclusive;

use super::fingerprint::Fingerprint;
use crate::id::EnvironmentId;
use crate::math::SUBSETS;
use crate::split::Split;

/// A split as the hub names it; an environment's split may be made of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HubSplit {
    /// `train`.
    Train,
    /// `validation`.
    Validation,
    /// `test`.
    Test,
}

impl HubSplit {
    /// Every split that is used.
    pub const ALL: [Self; 3] = [Self::Train, Self::Validation, Self::Test];

    /// Name on the hub.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Test => "test",
        }
    }
}

impl fmt::Display for HubSplit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The rows of one configuration and split on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// The configuration.
    pub(crate) config: &'static str,
    /// The split.
    pub(crate) split: HubSplit,
    /// Its number of rows.
    pub(crate) rows: usize,
    /// The rows' own numbers, where a file may hold rows of several splits.
    pub(crate) numbers: Option<RangeInclusive<i64>>,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.config, self.split)
    }
}

/// What `environment`'s `split` is read from, in order. `None` if the environment has no such split.
pub(crate) fn parts(environment: EnvironmentId, split: Split) -> Option<Vec<Part>> {
    let part = |config, split, rows| Part { config, split, rows, numbers: None };
    let mbpp = |split, first: i64, last: i64| {
        let rows = usize::try_from(last - first + 1).unwrap_or(0);
        Part { config: "full", split, rows, numbers: Some(first..=last) }
    };
    let mbpp_test = mbpp(HubSplit::Test, 11, 510);
    let parts = match (environment, split) {
        (EnvironmentId::Gsm8k, Split::Test) => vec![part("main", HubSplit::Test, 1319)],
        (EnvironmentId::Gsm8k, _) => vec![part("main", HubSplit::Train, 7473)],
        (EnvironmentId::Math, Split::Test) => {
            SUBSETS.iter().map(|subset| part(subset.name, HubSplit::Test, subset.test)).collect()
        }
        (EnvironmentId::Math, _) => {
            SUBSETS.iter().map(|subset| part(subset.name, HubSplit::Train, subset.train)).collect()
        }
        (EnvironmentId::Mbpp, Split::Train) => vec![mbpp(HubSplit::Train, 601, 974), mbpp_test],
        (EnvironmentId::Mbpp, Split::Val) => vec![mbpp(HubSplit::Validation, 511, 600), mbpp_test],
        (EnvironmentId::HumanEval, Split::Test) => vec![part("openai_humaneval", HubSplit::Test, 164)],
        (EnvironmentId::Mbpp, Split::Test) | (EnvironmentId::HumanEval, _) => return None,
    };
    Some(parts)
}

/// Fingerprint of all rows of `split`; `None` for MATH, of which no copy may be shipped to take one from.
pub(crate) fn fingerprint(environment: EnvironmentId, split: HubSplit) -> Option<Fingerprint> {
    let text = match (environment, split) {
        (EnvironmentId::Gsm8k, HubSplit::Train) => "8631da674573f613957b1f6449431ad396b5b25c65e79b74d495169e631d64e1",
        (EnvironmentId::Gsm8k, HubSplit::Test) => "20e8ef35426585557cced12062d679d71c98c63a51c33521ca971840ea7b19b6",
        (EnvironmentId::Mbpp, HubSplit::Train) => "680f9022cbf9c08e6ef71c68646f58da17d8521e0841b03da1c311281bb00b0a",
        (EnvironmentId::Mbpp, HubSplit::Validation) => {
            "0ddc361a67ac34b1fae8a4607612c5cade72c5581a18298a4e3326bfbea9629e"
        }
        (EnvironmentId::Mbpp, HubSplit::Test) => "ddb8262d5325cd68945beea27338c1bfedf9b12d258bfaefacc716111018a0f2",
        (EnvironmentId::HumanEval, HubSplit::Test) => {
            "b092e7d9b95f0cde0b1a1da7ff70f6047178423acfa1d3d59fcbe6447808a38d"
        }
        (EnvironmentId::Gsm8k, HubSplit::Validation)
        | (EnvironmentId::Math, _)
        | (EnvironmentId::HumanEval, HubSplit::Train | HubSplit::Validation) => return None,
    };
    Some(text.parse().expect("the constants are 64 hexadecimal digits"))
}

/// Names of the data set on the hub, the present one first; caches may know it by an older one.
pub(crate) const fn repositories(environment: EnvironmentId) -> &'static [&'static str] {
    match environment {
        EnvironmentId::Gsm8k => &["openai/gsm8k", "gsm8k"],
        EnvironmentId::Math => &["EleutherAI/hendrycks_math"],
        EnvironmentId::Mbpp => &["google-research-datasets/mbpp", "mbpp"],
        EnvironmentId::HumanEval => &["openai/openai_humaneval", "openai_humaneval"],
    }
}

/// Name, without its ending, of the authors' own file with the rows of all splits.
pub(crate) const fn whole_file(environment: EnvironmentId) -> Option<&'static str> {
    match environment {
        EnvironmentId::Mbpp => Some("mbpp"),
        EnvironmentId::HumanEval => Some("HumanEval"),
        EnvironmentId::Gsm8k | EnvironmentId::Math => None,
    }
}
