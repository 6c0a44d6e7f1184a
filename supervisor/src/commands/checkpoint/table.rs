//! Rows under a header, and quantities as people read them.

use std::time::Duration;

use indicatif::BinaryBytes;

use crate::control::duration;
use crate::terminal::printable;

/// Digits of a hash that a table shows.
const HASH_DIGITS: usize = 8;

/// Rows in columns as wide as their widest cell, the header first; nothing without rows.
pub(super) fn columns<const N: usize>(header: [&str; N], rows: Vec<[String; N]>) -> Vec<String> {
    if rows.is_empty() {
        return Vec::new();
    }
    let rows: Vec<[String; N]> = std::iter::once(header.map(str::to_owned)).chain(rows).collect();
    let rows: Vec<[String; N]> = rows.into_iter().map(|row| row.map(|cell| printable(&cell))).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// The text, or a dash where there is none.
pub(super) fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_owned())
}

/// Bytes with a binary unit.
pub(super) fn size(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

/// The beginning of a hash, enough to tell two apart.
pub(super) fn shortened(hash: &str) -> String {
    hash.chars().take(HASH_DIGITS).collect()
}

/// Time since something, in two parts at most.
pub(super) fn age(since: Duration) -> String {
    duration(since.as_secs())
}

/// A number with its noun.
pub(super) fn count(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_stand_under_their_header() {
        let rows = vec![["3000".into(), "a".into(), String::new()], ["3".into(), "\u{1b}[31m".into(), "x".into()]];
        let lines = columns(["W", "NAME", "NOTE"], rows);
        assert_eq!(lines, ["W     NAME   NOTE", "3000  a", "3     \u{fffd}[31m  x"]);
        assert!(columns(["W"], Vec::new()).is_empty());
    }

    #[test]
    fn quantities() {
        assert_eq!([size(0), size(767), size(290_056)], ["0 B", "767 B", "283.26 KiB"]);
        assert_eq!([count(1, "file"), count(0, "file")], ["1 file", "0 files"]);
    }
}
