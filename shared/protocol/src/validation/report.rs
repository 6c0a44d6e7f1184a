//! The report of one validation, in the shape of `verify --json`.

use std::collections::BTreeMap;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::distribution::{DistributionMetrics, SuspicionReasons};

/// Version of the report's shape.
pub const REPORT_SCHEMA: u32 = 1;

/// Outcome classes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    Success,
    Failed,
    FileRejected,
    /// As if there were no file: neither score nor penalty.
    Absent,
}

/// The nine checks of a rollout, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    SchemaValid,
    TokensValid,
    EnvPromptValid,
    ProofValid,
    TerminationValid,
    EnvEvalValid,
    RewardValid,
    LogprobsValid,
    TokenDistributionValid,
}

impl Check {
    /// All checks in order.
    pub const ALL: [Self; 9] = [
        Self::SchemaValid,
        Self::TokensValid,
        Self::EnvPromptValid,
        Self::ProofValid,
        Self::TerminationValid,
        Self::EnvEvalValid,
        Self::RewardValid,
        Self::LogprobsValid,
        Self::TokenDistributionValid,
    ];

    /// The name in reports and reasons.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SchemaValid => "schema_valid",
            Self::TokensValid => "tokens_valid",
            Self::EnvPromptValid => "env_prompt_valid",
            Self::ProofValid => "proof_valid",
            Self::TerminationValid => "termination_valid",
            Self::EnvEvalValid => "env_eval_valid",
            Self::RewardValid => "reward_valid",
            Self::LogprobsValid => "logprobs_valid",
            Self::TokenDistributionValid => "token_distribution_valid",
        }
    }

    /// Share of the planned rows that may not fail a soft check; `None` for a hard one.
    #[must_use]
    pub const fn soft_threshold(self) -> Option<f64> {
        match self {
            Self::RewardValid => Some(crate::constants::REWARD_SOFT_THRESHOLD),
            Self::TokenDistributionValid => Some(crate::constants::DISTRIBUTION_SOFT_THRESHOLD),
            _ => None,
        }
    }
}

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Results of the checks that ran, in order; the last one is the one that ended the row, if any did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Checks(pub Vec<(Check, bool)>);

impl Checks {
    /// Result of one check, `None` if it did not run.
    #[must_use]
    pub fn get(&self, check: Check) -> Option<bool> {
        self.0.iter().find(|(ran, _)| *ran == check).map(|(_, passed)| *passed)
    }

    /// The hard check that ended the row.
    #[must_use]
    pub fn hard_failure(&self) -> Option<Check> {
        self.0.iter().find(|(check, passed)| !passed && check.soft_threshold().is_none()).map(|(check, _)| *check)
    }
}

impl Serialize for Checks {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (check, passed) in &self.0 {
            map.serialize_entry(check.name(), passed)?;
        }
        map.end()
    }
}

/// A float as JSON has none of: non-finite values are the texts `nan`, `inf` and `-inf`.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Number(pub f64);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            value if value.is_finite() => serializer.serialize_f64(value),
            value if value.is_nan() => serializer.serialize_str("nan"),
            value => serializer.serialize_str(if value > 0.0 { "inf" } else { "-inf" }),
        }
    }
}

/// Result of one file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub schema: u32,
    /// The verdict as sampled with the context's `R_v`.
    pub verdict: Verdict,
    /// `file:…`, `hard:…`, `soft:…` or nothing.
    pub failure_reason: Option<String>,
    /// `None` for an absent file.
    pub metrics: Option<Metrics>,
    pub processed: Processed,
    /// `None` if the file did not come that far.
    pub indices_checked: Option<Vec<usize>>,
    pub rows_checked: usize,
    /// Checks of the last row that was entered, if the file failed; empty if no row came to its checks.
    pub first_failing_row_checks: Option<Checks>,
    pub row_checks: Vec<CheckedRow>,
    /// Distinct completions over all rows of an accepted file.
    pub distinct_digests: Option<usize>,
    pub all_rows: AllRows,
    /// Findings that the reference does not have; they never change a verdict.
    pub strict: Vec<Finding>,
    pub exactness: Exactness,
}

impl Report {
    /// Whether a miner should upload this file: both verdicts are success and no strict finding is an error.
    #[must_use]
    pub fn is_accepted(&self) -> bool {
        self.verdict == Verdict::Success
            && self.all_rows.verdict == Verdict::Success
            && self.strict.iter().all(|finding| finding.severity != Severity::Error)
    }

    /// The report of a file that could not be read.
    #[must_use]
    pub fn of_read_error(error: &crate::window_file::ReadError) -> Self {
        match error {
            crate::window_file::ReadError::Corrupt { .. } => Self::rejected("corrupt_parquet"),
            crate::window_file::ReadError::Absent { .. } => Self::without_rows(Verdict::Absent, None, None),
        }
    }

    /// The report of a file that was rejected with `file:{code}`.
    pub(super) fn rejected(code: &str) -> Self {
        let metrics = Metrics { had_failure: 1, ..Metrics::default() };
        Self::without_rows(Verdict::FileRejected, Some(format!("file:{code}")), Some(metrics))
    }

    fn without_rows(verdict: Verdict, failure_reason: Option<String>, metrics: Option<Metrics>) -> Self {
        Self {
            schema: REPORT_SCHEMA,
            verdict,
            failure_reason: failure_reason.clone(),
            metrics,
            processed: Processed::default(),
            indices_checked: None,
            rows_checked: 0,
            first_failing_row_checks: None,
            row_checks: Vec::new(),
            distinct_digests: None,
            all_rows: AllRows {
                verdict,
                failure_reason,
                valid: 0,
                checked: 0,
                unique: 0,
                soft_failures: BTreeMap::new(),
                groups_valid: None,
                group_notes: Vec::new(),
                rows: Vec::new(),
            },
            strict: Vec::new(),
            exactness: Exactness::default(),
        }
    }
}

/// Counts that enter the weight of a miner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Metrics {
    pub valid: usize,
    pub checked: usize,
    pub total: usize,
    pub estimated_valid: usize,
    pub successful: usize,
    pub estimated_successful: usize,
    pub unique: usize,
    pub estimated_unique: usize,
    pub prompt_valid: usize,
    pub prompt_mismatch: usize,
    /// 1 for a failure, which excludes the miner for 14 windows.
    pub had_failure: u8,
}

/// Counts of the loop over the checked rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Processed {
    /// Rows that came out of the nine checks.
    pub total: usize,
    pub invalid_signature: usize,
    /// Hard failures of any of the nine checks.
    pub invalid_proof: usize,
    pub processing_error: usize,
}

/// One checked row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckedRow {
    pub checks: Checks,
    /// Median of `exp(|Δ logprob|) − 1` over the challenged positions, if the check came to it.
    pub logprob_median_dev: Option<Number>,
}

/// The same checks over every row of the file, with the soft cut-offs planned for all of them. Unlike the sampled loop this
/// one goes on after a failure, so that every bad row shows; the reason is that of the first.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AllRows {
    pub verdict: Verdict,
    pub failure_reason: Option<String>,
    pub valid: usize,
    pub checked: usize,
    pub unique: usize,
    /// Rows that failed each soft check; checks that no row failed are left out.
    pub soft_failures: BTreeMap<Check, usize>,
    /// `None` if the file did not come that far.
    pub groups_valid: Option<bool>,
    /// Why they are not; left out where there is nothing to say.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub group_notes: Vec<GroupNote>,
    pub rows: Vec<RowDetail>,
}

/// What is wrong with one group as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GroupNote {
    pub group: i64,
    pub detail: String,
}

/// Everything that is known of one row.
#[derive(Debug, Clone, PartialEq, Serialize, Default)]
pub struct RowDetail {
    pub checks: Checks,
    pub env_reward: Option<Number>,
    pub env_success: Option<bool>,
    pub logprob_median_dev: Option<Number>,
    pub logprob_max_dev: Option<Number>,
    /// Over all completion tokens.
    pub distribution: Option<Distribution>,
    /// Over the first tokens.
    pub distribution_initial: Option<Distribution>,
    pub distribution_reasons: Option<SuspicionReasons>,
    /// Why there are no metrics.
    pub distribution_reason: Option<String>,
    /// Why the row ended early, where the checks alone do not say.
    pub note: Option<String>,
}

/// Statistics of the chosen probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Distribution {
    pub mean: Number,
    pub median: Number,
    pub q10: Number,
    pub min: Number,
    pub low_frac: Number,
    pub high_frac: Number,
    pub mid_frac: Number,
    pub bc: Number,
}

impl From<&DistributionMetrics> for Distribution {
    fn from(metrics: &DistributionMetrics) -> Self {
        Self {
            mean: Number(metrics.mean),
            median: Number(metrics.median),
            q10: Number(metrics.q10),
            min: Number(metrics.min),
            low_frac: Number(metrics.low_frac),
            high_frac: Number(metrics.high_frac),
            mid_frac: Number(metrics.mid_frac),
            bc: Number(metrics.bc),
        }
    }
}

/// Weight of a [`Finding`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Warning,
    Error,
}

/// A finding that the reference does not have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub code: FindingCode,
    pub severity: Severity,
    /// Index in the file.
    pub row: usize,
    pub detail: String,
}

/// Kinds of findings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingCode {
    /// A sketch that is no integer in `0..PRIME_Q`.
    SketchOutOfRange,
    /// A NaN among the completion's logprobs.
    NanLogprob,
    /// The row's hotkey is not the wallet's.
    ForeignHotkey,
    /// The challenge is not `|{block_hash}|{nonce}`.
    WrongChallenge,
    /// The nonce is not `16·group + rollout`.
    WrongNonce,
    /// `R_m` is not 64 lower-case hexadecimal digits.
    RandomnessForm,
    /// The `randomness` column differs from the beacon.
    RandomnessColumn,
    /// Group numbers do not ascend through the file.
    GroupsNotAscending,
    /// The claimed success is not the environment's.
    SuccessDiffers,
    /// The completion stands in an earlier row too.
    RepeatedCompletion,
    /// Sketches are farther from the model's than an honest proof's: the tolerance of the protocol does not show it.
    SketchDistance,
}

impl FindingCode {
    /// How much the finding weighs.
    #[must_use]
    pub const fn severity(self) -> Severity {
        match self {
            Self::SketchOutOfRange | Self::NanLogprob | Self::ForeignHotkey | Self::WrongChallenge => Severity::Error,
            _ => Severity::Warning,
        }
    }
}

/// How exactly the file agrees with the model, over all rows with a forward pass. The protocol's tolerances are no test of
/// correctness; these shares are.
#[derive(Debug, Clone, PartialEq, Serialize, Default)]
pub struct Exactness {
    /// Share of positions whose sketch is the same integer; `None` without any.
    pub sketch_equal: Option<f64>,
    /// Share of completion positions whose logprob is within 1e-4; `None` without any.
    pub logprob_equal: Option<f64>,
    /// Rows under 99 % in either.
    pub rows_below: Vec<RowExactness>,
}

/// Shares of one row.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RowExactness {
    pub row: usize,
    pub sketch_equal: f64,
    pub logprob_equal: f64,
}
