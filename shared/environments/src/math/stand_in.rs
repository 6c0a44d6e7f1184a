//! Made-up problems in the place of MATH, which no package may ship.

use super::row::MathRow;
use super::{SUBSETS, Subset};
use crate::split::Split;

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
