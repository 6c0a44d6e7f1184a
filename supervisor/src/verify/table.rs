//! A verdict for people.

use std::fmt::Write;

use grail_protocol::validation::{Checks, Report, Severity, Verdict};

use super::Verified;

/// Rows and findings of one kind to show before the rest is only counted.
const SHOWN: usize = 20;

/// The verdict as text: what holds, and for each miss the row, the check and both numbers.
#[must_use]
pub fn render(verified: &Verified) -> String {
    let report = &verified.report;
    let mut text = String::new();
    let verdict = |verdict: Verdict, reason: &Option<String>| match reason {
        Some(reason) => format!("{} ({reason})", name(verdict)),
        None => name(verdict).to_owned(),
    };
    // Writing to a String cannot fail.
    let mut line = |content: String| writeln!(text, "{content}").unwrap_or_default();
    line(format!("as sampled   {}", verdict(report.verdict, &report.failure_reason)));
    let all = &report.all_rows;
    line(format!(
        "all rows     {}: {} of {} valid, {} distinct",
        verdict(all.verdict, &all.failure_reason),
        all.valid,
        all.checked,
        all.unique
    ));
    if let Some(metrics) = &report.metrics {
        line(format!(
            "would score  {} valid, {} successful, {} unique rollouts of {}",
            metrics.estimated_valid, metrics.estimated_successful, metrics.estimated_unique, metrics.total
        ));
    }
    if let Some(shares) = &verified.shares {
        line(format!(
            "shares       {} groups, {:.1} % with 1-15 successes; {:.1} % of rows end in EOS; shortest completion {} tokens; \
             {:.1} % pass the distribution check",
            shares.groups,
            shares.mixed_groups * 100.0,
            shares.natural_ends * 100.0,
            shares.shortest,
            shares.distribution * 100.0
        ));
    }
    for content in misses(report).into_iter().chain(groups(report)).chain(findings(report)).chain(exactness(report)) {
        line(content);
    }
    text
}

fn name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Success => "success",
        Verdict::Failed => "failed",
        Verdict::FileRejected => "file-rejected",
        Verdict::Absent => "absent",
    }
}

fn misses(report: &Report) -> Vec<String> {
    let rows = report.all_rows.rows.iter().enumerate();
    let missed: Vec<(usize, String)> = rows
        .filter_map(|(row, detail)| {
            let missed = missed_checks(&detail.checks);
            let note = detail.note.clone().unwrap_or_default();
            (!missed.is_empty() || !note.is_empty()).then(|| (row, [missed.join(", "), note].join("  ")))
        })
        .collect();
    shorten(missed.into_iter().map(|(row, text)| format!("  row {row:<5} {}", text.trim())), "rows with a missed check")
}

fn groups(report: &Report) -> Vec<String> {
    let notes = report.all_rows.group_notes.iter();
    shorten(notes.map(|note| format!("  group {:<3} {}", note.group, note.detail)), "groups that are refused")
}

fn missed_checks(checks: &Checks) -> Vec<&'static str> {
    checks.0.iter().filter(|(_, passed)| !passed).map(|(check, _)| check.name()).collect()
}

fn findings(report: &Report) -> Vec<String> {
    let lines = report.strict.iter().map(|finding| {
        let severity = match finding.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        let code = serde_json::to_value(finding.code).ok();
        let code = code.as_ref().and_then(serde_json::Value::as_str).unwrap_or("finding");
        format!("  row {:<5} strict {severity}: {code}: {}", finding.row, finding.detail)
    });
    shorten(lines, "strict findings")
}

fn exactness(report: &Report) -> Vec<String> {
    let exactness = &report.exactness;
    let (Some(sketches), Some(logprobs)) = (exactness.sketch_equal, exactness.logprob_equal) else {
        return Vec::new();
    };
    let mut lines = vec![format!(
        "exactness    {:.2} % of sketches and {:.2} % of logprobs equal",
        sketches * 100.0,
        logprobs * 100.0
    )];
    let below = exactness.rows_below.iter().map(|row| {
        format!(
            "  row {:<5} warning: only {:.1} % of sketches and {:.1} % of logprobs equal",
            row.row,
            row.sketch_equal * 100.0,
            row.logprob_equal * 100.0
        )
    });
    lines.extend(shorten(below, "rows below 99 %"));
    lines
}

fn shorten(lines: impl ExactSizeIterator<Item = String>, what: &str) -> Vec<String> {
    let total = lines.len();
    let mut shown: Vec<String> = lines.take(SHOWN).collect();
    if total > SHOWN {
        shown.push(format!("  … {} more {what}; --json has them all", total - SHOWN));
    }
    shown
}
