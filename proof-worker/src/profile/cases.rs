//! Cases from a file: one model, loaded once, measured under many conditions in turn.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;

use serde::Deserialize;

use super::groups::{Source, Synthetic};
use super::lengths::Lengths;
use super::local::Local;
use super::{Plan, local_report};
use crate::cli::ProfileArguments;
use crate::error::WorkerError;

/// One line of the file; what is left out is as the command line has it by default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    /// As `--prompt`.
    prompt: String,
    /// As `--completion`.
    completion: String,
    #[serde(default = "two")]
    groups: u32,
    #[serde(default = "one")]
    seed: u64,
    longest: Option<u32>,
    #[serde(default = "two")]
    warm_up: u32,
    #[serde(default = "two")]
    repeats: u32,
    /// Whether stages and the sustained product are measured too.
    #[serde(default)]
    stages: bool,
}

const fn one() -> u64 {
    1
}

const fn two() -> u32 {
    2
}

impl Case {
    fn parse(text: &str) -> Result<(Self, Synthetic), String> {
        let case: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let lengths = |text: &str| text.parse::<Lengths>().map_err(|error| error.to_string());
        if case.groups == 0 || case.repeats == 0 {
            return Err("groups and repeats are at least 1".to_owned());
        }
        let synthetic = Synthetic {
            groups: case.groups,
            prompt: lengths(&case.prompt)?,
            completion: lengths(&case.completion)?,
            most_tokens: 8_192,
            longest: case.longest,
            seed: case.seed,
        };
        Ok((case, synthetic))
    }
}

/// Measures each case as its line is read and prints a report behind it, one JSON document a line.
///
/// # Errors
/// [`WorkerError`]; [`WorkerError::Line`] with the number of a line that is no case.
pub(super) fn run(arguments: &ProfileArguments, path: &Path) -> Result<(), WorkerError> {
    let unreadable = |source| WorkerError::Input { path: path.to_owned(), source };
    let lines: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        Box::new(BufReader::new(File::open(path).map_err(unreadable)?))
    };
    let local = Local::load(arguments)?;
    for (index, text) in lines.lines().enumerate() {
        let text = text.map_err(unreadable)?;
        if text.trim().is_empty() {
            continue;
        }
        let (case, synthetic) = Case::parse(&text).map_err(|detail| WorkerError::Line { line: index + 1, detail })?;
        let groups = Source::Synthetic(synthetic).groups(local.config().vocab_size, local.weights())?;
        let plan = Plan { warm_up: case.warm_up, repeats: case.repeats };
        let mut report = local_report(&local, plan, &groups, case.stages, None)?;
        report.groups.lengths = Some(groups.lengths());
        let json = serde_json::to_string(&report).map_err(|error| WorkerError::Print(error.into()))?;
        let mut output = io::stdout().lock();
        writeln!(output, "{json}").and_then(|()| output.flush()).map_err(WorkerError::Print)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_has_defaults_and_is_refused_by_name() {
        let (case, synthetic) =
            Case::parse(r#"{"prompt": "fixed:50", "completion": "lognormal:800,0.5", "longest": 8192}"#).unwrap();
        assert_eq!((case.groups, case.warm_up, case.repeats, case.stages), (2, 2, 2, false));
        assert_eq!((synthetic.longest, synthetic.seed, synthetic.prompt), (Some(8_192), 1, Lengths::Fixed(50)));
        for (text, part) in [
            (r#"{"prompt": "fixed:50"}"#, "completion"),
            (r#"{"prompt": "50", "completion": "fixed:3"}"#, "it has no colon"),
            (r#"{"prompt": "fixed:5", "completion": "fixed:3", "groups": 0}"#, "at least 1"),
            (r#"{"prompt": "fixed:5", "completion": "fixed:3", "group": 1}"#, "group"),
        ] {
            let error = Case::parse(text).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
