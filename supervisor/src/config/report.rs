//! The configuration as it is in force, for people and for programs.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Value, json};

use super::origin::Origin;
use super::problem::{Problem, Warning};
use super::variables::{SECTIONS, Standing, Variable, all};

/// Version of the JSON form.
const SCHEMA: u32 = 1;

/// One variable with the value in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    pub name: &'static str,
    /// `None`: nothing is set and there is no default; [`Self::unset`] says what that means.
    pub value: Option<String>,
    pub unset: &'static str,
    pub secret: bool,
    pub origin: Origin,
}

impl Row {
    pub(super) fn shown(variable: &Variable, value: String, origin: Origin) -> Self {
        Self { value: Some(value), origin, ..Self::unset(variable) }
    }

    pub(super) fn unset(variable: &Variable) -> Self {
        Self {
            name: variable.name,
            value: None,
            unset: variable.unset,
            secret: variable.secret,
            origin: Origin::Default,
        }
    }
}

/// All variables in the order of the table, with what is worth knowing about them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    pub rows: Vec<Row>,
    pub warnings: Vec<Warning>,
}

impl Report {
    pub(super) fn new(mut rows: Vec<Row>, warnings: Vec<Warning>) -> Self {
        rows.sort_by_key(|row| all().position(|variable| variable.name == row.name));
        Self { rows, warnings }
    }

    /// A table with one section per subject, then warnings and `problems`.
    #[must_use]
    pub fn to_text(&self, problems: &[Problem]) -> String {
        let cell = |row: &Row| row.value.clone().unwrap_or_else(|| format!("({})", row.unset));
        let width = |cells: &mut dyn Iterator<Item = usize>| cells.max().unwrap_or(0);
        let name_width = width(&mut self.rows.iter().map(|row| row.name.len()));
        let value_width = width(&mut self.rows.iter().map(|row| cell(row).chars().count())).min(48);
        let mut text = String::new();
        // Writing to a text cannot fail.
        let mut line = |content: &str| writeln!(text, "{}", content.trim_end()).unwrap_or_default();
        for section in SECTIONS {
            let rows =
                self.rows.iter().filter(|row| section.variables.iter().any(|variable| variable.name == row.name));
            let rows: Vec<&Row> = rows.collect();
            if !rows.is_empty() {
                line(section.title);
            }
            for row in rows {
                line(&format!("  {:name_width$}  {:value_width$}  {}", row.name, cell(row), row.origin));
            }
        }
        if !self.warnings.is_empty() {
            line("Warnings");
            self.warnings.iter().for_each(|warning| line(&format!("  {warning}")));
        }
        if !problems.is_empty() {
            line("Problems");
            problems.iter().for_each(|problem| line(&format!("  {problem}")));
        }
        text
    }

    /// `{schema, variables, warnings, problems}`.
    #[must_use]
    pub fn to_json(&self, problems: &[Problem]) -> Value {
        let problems: Vec<Value> = problems
            .iter()
            .map(|problem| {
                json!({
                    "variable": problem.variable,
                    "value": problem.value,
                    "origin": problem.origin,
                    "what": problem.what,
                    "remedy": problem.remedy,
                })
            })
            .collect();
        json!({"schema": SCHEMA, "variables": self.rows, "warnings": self.warnings, "problems": problems})
    }
}

/// The commented template for `.env`, made from the table.
#[must_use]
pub fn env_example() -> String {
    let mut text = String::from(
        "# Configuration of grail-supervisor. Copy it to .env and edit it; lines that begin with # show defaults.\n\
         # The process environment wins over this file. `grail-supervisor config` shows what is in force and why\n\
         # (`config --local` for the embedded default). Settings of chain, wallet, bucket, SGLang, vLLM and WandB are checked,\n\
         # but this release mines the embedded default only, which needs none of them.\n",
    );
    for section in SECTIONS {
        writeln!(text, "\n## {}\n", section.title).unwrap_or_default();
        for variable in section.variables.iter().filter(|variable| variable.standing == Standing::Active) {
            if variable.name != section.variables[0].name {
                text.push('\n');
            }
            for line in wrapped(variable.help, 110) {
                writeln!(text, "# {line}").unwrap_or_default();
            }
            let without = if variable.default.is_empty() && variable.unset != "unset" { variable.unset } else { "" };
            let note = if without.is_empty() { String::new() } else { format!("  # without it: {without}") };
            writeln!(text, "# {}={}{note}", variable.name, variable.default).unwrap_or_default();
        }
    }
    text
}

fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is always a last line");
        if line.is_empty() {
            line.push_str(word);
        } else if line.len() + 1 + word.len() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}
