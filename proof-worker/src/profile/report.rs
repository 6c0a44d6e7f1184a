//! What a profile says: a table for people, one JSON document for programs.

use std::fmt::Write;
use std::time::Duration;

use serde::Serialize;

/// Number of the document's layout.
pub const SCHEMA: u32 = 1;

/// One profile.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub schema: u32,
    /// Version of the package.
    pub build: &'static str,
    pub model: String,
    /// Where it computes, as the worker names it.
    pub device: String,
    /// Unset if another process computes.
    pub dtype: Option<String>,
    pub weights: String,
    pub groups: GroupsReport,
    pub warm_up: u32,
    pub repeats: u32,
    /// Groups under way at once.
    pub in_flight: u32,
    pub group_ms: GroupTimes,
    /// The prompt once a group, and all completions.
    pub tokens_per_second: f64,
    pub rollouts_per_second: f64,
    /// Unset without the model's shape.
    pub useful_tflops: Option<f64>,
    /// Unset if another process computes.
    pub matrix_product: Option<MatrixProductReport>,
    pub share_of_matrix_product: Option<f64>,
    pub peak_resident_bytes: Option<u64>,
    pub device_used_bytes: Option<u64>,
    pub device_total_bytes: Option<u64>,
    /// Of one more pass over all groups, with a wait for the device around each stage; unset if another process computes.
    pub stages: Option<Vec<StageReport>>,
    /// What was left out, and why.
    pub notes: Vec<String>,
}

/// The groups that were proved.
#[derive(Debug, Clone, Serialize)]
pub struct GroupsReport {
    pub source: String,
    pub groups: usize,
    pub rollouts: usize,
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    /// By group: tokens of the prompt, then of each completion; unset where only the sums matter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lengths: Option<Vec<Vec<usize>>>,
}

/// Milliseconds that one group takes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct GroupTimes {
    pub p50: f64,
    pub p95: f64,
    pub samples: usize,
}

/// A square product, measured in the same process.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct MatrixProductReport {
    pub size: usize,
    /// Median of some products with a wait behind each, on the device as the passes left it.
    pub tflops: f64,
    /// The same before the first pass, when a GPU may still be cool and at its highest clock; unset on a CPU.
    pub at_start_tflops: Option<f64>,
    /// Mean over a second of products without a pause, for which a GPU lowers its clock; unset on a CPU.
    pub sustained_tflops: Option<f64>,
}

/// One stage.
#[derive(Debug, Clone, Serialize)]
pub struct StageReport {
    pub stage: &'static str,
    pub ms_per_group: f64,
    /// Of the pass in which it was timed.
    pub share: f64,
}

impl GroupTimes {
    /// Nearest-rank percentiles of `times`.
    pub(crate) fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let percentile = |percent: usize| {
            let rank = (times.len() * percent).div_ceil(100).max(1);
            times.get(rank - 1).map_or(0.0, |time| milliseconds(*time))
        };
        Self { p50: percentile(50), p95: percentile(95), samples: times.len() }
    }
}

pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Report {
    /// Lines for people, with a final line end.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a text cannot fail.
            writeln!(text, "{name:<22}{value}").unwrap_or_default();
        };
        let GroupsReport { source, groups, rollouts, prompt_tokens, completion_tokens, .. } = &self.groups;
        line("model", format!("{}, weights {}", self.model, self.weights));
        let dtype = self.dtype.as_ref().map(|dtype| format!(", {dtype}")).unwrap_or_default();
        line("device", format!("{}{dtype}", self.device));
        line("groups", source.clone());
        line(
            "",
            format!(
                "{groups} groups, {rollouts} rollouts, {prompt_tokens} prompt + {completion_tokens} completion tokens"
            ),
        );
        line(
            "passes",
            format!("{} to warm up, {} timed, {} groups in flight", self.warm_up, self.repeats, self.in_flight),
        );
        let GroupTimes { p50, p95, samples } = self.group_ms;
        line("time of a group", format!("p50 {p50:.2} ms, p95 {p95:.2} ms of {samples}"));
        line("rollouts/s", format!("{:.2}", self.rollouts_per_second));
        line("tokens/s", format!("{:.0} (prompt once a group)", self.tokens_per_second));
        if let Some(tflops) = self.useful_tflops {
            line("useful TFLOP/s", format!("{tflops:.3}"));
        }
        if let Some(MatrixProductReport { size, tflops, at_start_tflops, sustained_tflops }) = self.matrix_product {
            let other = |tflops: Option<f64>, when: &str| {
                tflops.map(|tflops| format!(", {tflops:.0} {when}")).unwrap_or_default()
            };
            let sustained = other(sustained_tflops, "for a second on end");
            let at_start = other(at_start_tflops, "before the first pass");
            line(
                "matrix product",
                format!("{tflops:.3} TFLOP/s at {size} x {size} x {size} behind the passes{at_start}{sustained}"),
            );
        }
        if let Some(share) = self.share_of_matrix_product {
            line("share of it", format!("{:.1} %", share * 100.0));
        }
        if let Some(bytes) = self.peak_resident_bytes {
            line("peak resident memory", gib(bytes));
        }
        if let (Some(used), Some(total)) = (self.device_used_bytes, self.device_total_bytes) {
            line("device memory in use", format!("{} of {}, all processes", gib(used), gib(total)));
        }
        if let Some(stages) = &self.stages {
            text.push_str("\nstage                 ms a group     share\n");
            for StageReport { stage, ms_per_group, share } in stages {
                writeln!(text, "{stage:<18}{ms_per_group:>14.3}{:>9.1} %", share * 100.0).unwrap_or_default();
            }
        }
        for note in &self.notes {
            writeln!(text, "note: {note}").unwrap_or_default();
        }
        text
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1_u32 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let times = |count: u64| (1..=count).rev().map(Duration::from_millis).collect();
        let of = |count| {
            let GroupTimes { p50, p95, samples } = GroupTimes::of(times(count));
            (p50, p95, samples)
        };
        assert_eq!(of(100), (50.0, 95.0, 100));
        assert_eq!(of(3), (2.0, 3.0, 3));
        assert_eq!(of(1), (1.0, 1.0, 1));
    }
}
