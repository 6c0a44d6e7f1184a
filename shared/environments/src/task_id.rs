//! Tasks by text id instead of by seed.

use grail_text::python;

/// Number that a text task id means, as the reference reads it: the integer after the last `_`, 0 if there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TaskNumber {
    negative: bool,
    /// Decimal digits without leading zeros.
    digits: String,
}

impl TaskNumber {
    pub(crate) fn parse(task_id: &str) -> Self {
        let last = task_id.rsplit('_').next().unwrap_or(task_id);
        let (negative, digits) = python::parse_int(last).unwrap_or_else(|| (false, "0".to_owned()));
        Self { negative, digits }
    }

    pub(crate) fn from_index(index: usize) -> Self {
        Self { negative: false, digits: index.to_string() }
    }

    /// Row among `rows`, as Python's `%`, which is never negative.
    ///
    /// # Panics
    /// If `rows` is 0: no data set without rows is accepted.
    pub(crate) fn row(&self, rows: usize) -> usize {
        assert!(rows > 0, "a data set has rows");
        let digits = self.digits.bytes().map(|digit| u128::from(digit - b'0'));
        let rest = digits.fold(0, |rest, digit| (rest * 10 + digit) % rows as u128);
        let rest = usize::try_from(rest).expect("a remainder is below a usize");
        if self.negative && rest > 0 { rows - rest } else { rest }
    }
}

impl std::fmt::Display for TaskNumber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sign = if self.negative { "-" } else { "" };
        write!(f, "{sign}{}", self.digits)
    }
}

#[cfg(test)]
mod tests {
    use super::TaskNumber;

    #[test]
    fn the_number_after_the_last_underscore() {
        let big = "9".repeat(60);
        let cases = [
            ("train_5", "5", 5),
            ("5", "5", 5),
            ("foo", "0", 0),
            ("", "0", 0),
            ("val_-1", "-1", 6),
            ("a_-7", "-7", 0),
            ("x_ +3\u{1c}", "3", 3),
            ("x_1_0", "0", 0),
            ("x_1.5", "0", 0),
            ("x_٣", "3", 3),
            (big.as_str(), big.as_str(), 0),
        ];
        for (id, number, row) in cases {
            let parsed = TaskNumber::parse(id);
            assert_eq!((parsed.to_string().as_str(), parsed.row(7)), (number, row), "{id:?}");
        }
        assert_eq!(TaskNumber::parse("x_-18446744073709551617").row(10), 3);
    }
}
