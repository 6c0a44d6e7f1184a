//! Made-up problems in the place of MATH, which no package may ship.

use std::fmt::Write;

use serde_json::json;

use super::row::MathRow;
use super::{SUBSETS, Subset};
use crate::split::Split;

/// A file of made-up rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandInFile {
    /// Path below the folder of the data set, as the loader looks for it.
    pub path: String,
    /// Rows as JSON lines.
    pub text: String,
}

/// The rows of all subsets and splits as files of a data set folder.
#[must_use]
pub fn stand_in_files() -> Vec<StandInFile> {
    let of_split = |(split, stem): (Split, &'static str)| {
        let files = SUBSETS.iter().zip(stand_in_rows(split));
        files.map(move |(subset, rows)| StandInFile {
            path: format!("{}/{stem}.jsonl", subset.name),
            text: json_lines(&rows),
        })
    };
    [(Split::Train, "train"), (Split::Test, "test")].into_iter().flat_map(of_split).collect()
}

fn json_lines(rows: &[MathRow]) -> String {
    let mut text = String::new();
    for row in rows {
        let line = json!({
            "problem": &*row.problem,
            "level": &*row.level,
            "type": &*row.subject,
            "solution": &*row.solution,
        });
        // Writing into a string cannot fail.
        writeln!(text, "{line}").unwrap_or_default();
    }
    text
}

/// Rows of the files that `split` is made from, one list per subset, with the true sizes.
#[must_use]
pub fn stand_in_rows(split: Split) -> Vec<Vec<MathRow>> {
    let file = if split == Split::Test { "test" } else { "train" };
    let rows = |subset: &Subset| if split == Split::Test { subset.test } else { subset.train };
    SUBSETS.iter().map(|subset| (0..rows(subset)).map(|row| stand_in_row(subset, file, row)).collect()).collect()
}

fn stand_in_row(subset: &Subset, file: &str, row: usize) -> MathRow {
    // A few rows of the real data set have no level either.
    let level = if row % 997 == 996 { "Level ?".to_owned() } else { format!("Level {}", row % 5 + 1) };
    MathRow {
        problem: format!("[{}/{file}/{row}] Compute ${row}+\\frac{{1}}{{2}}$.", subset.name).into(),
        level: level.into(),
        subject: subset.subject.into(),
        solution: format!("Over a common denominator, the sum is $\\boxed{{{}/2}}$.", 2 * row + 1).into(),
    }
}
