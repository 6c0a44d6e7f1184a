//! Numbers and right answers in texts.

use grail_text::python::{self, decimal_digit, is_whitespace};

/// The completion's answer: the first number of `content` without commas, digits as they stand; `None` without one.
///
/// A number is a sign, digits, and at most one `.` or `,` with digits after it, so `1,234,567` reads `1234`.
#[must_use]
pub fn predict(content: &str) -> Option<String> {
    numbers(content).next().map(|number| number.replace(',', ""))
}

/// The right answer that a worked solution gives: what follows the last `####` on a line; else the last number, without
/// commas; else the last line that is not blank; else nothing. Commas after `####` stay, so such a row can never be matched.
#[must_use]
pub fn gold_answer(solution: &str) -> String {
    if let Some(answer) = last_marked(solution) {
        return python::strip(answer).to_owned();
    }
    if let Some(number) = numbers(solution).last() {
        return number.replace(',', "");
    }
    let lines = python::split_lines(solution, false);
    lines.into_iter().map(python::strip).rfind(|line| !line.is_empty()).unwrap_or_default().to_owned()
}

/// The form in which two answers are compared as texts: stripped, lower case, without white space and dots at the end.
#[must_use]
pub fn normalize(answer: &str) -> String {
    let lower = python::strip(answer).to_lowercase();
    lower.trim_end_matches(|c| c == '.' || is_whitespace(c)).to_owned()
}

/// Whether `content` holds digits, dots and commas only, after an optional sign; spaces (U+0020) do not count.
pub(super) fn is_numeric_only(content: &str) -> bool {
    let mut chars = content.chars().filter(|c| *c != ' ').peekable();
    if chars.next_if(|c| matches!(c, '-' | '+')).is_some() && chars.peek().is_none() {
        return false;
    }
    chars.peek().is_some() && chars.all(|c| matches!(c, '.' | ',') || decimal_digit(c).is_some())
}

/// All numbers of `text` from left to right.
fn numbers(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (start, length) = first_number(rest)?;
        let number = &rest[start..start + length];
        rest = &rest[start + length..];
        Some(number)
    })
}

/// Start and length of the first match of `[-+]?\d+(?:[.,]\d+)?`.
fn first_number(text: &str) -> Option<(usize, usize)> {
    let (digit, _) = text.char_indices().find(|(_, c)| decimal_digit(*c).is_some())?;
    // A sign matches only right before the digit; before it there is no digit at all.
    let start = if text[..digit].ends_with(['-', '+']) { digit - 1 } else { digit };
    let mut end = digit + digits(&text[digit..]);
    if let Some(fraction) = text[end..].strip_prefix(['.', ',']) {
        let length = digits(fraction);
        if length > 0 {
            end += 1 + length;
        }
    }
    Some((start, end - start))
}

/// Bytes of the digits at the start of `text`.
fn digits(text: &str) -> usize {
    text.find(|c| decimal_digit(c).is_none()).unwrap_or(text.len())
}

/// Answer of the last match of `####\s*(.+)`, where `.` stops at a line feed.
fn last_marked(text: &str) -> Option<&str> {
    const MARK: &str = "####";
    let mut last = None;
    let mut rest = text;
    while let Some(at) = rest.find(MARK) {
        let after = &rest[at + MARK.len()..];
        let start = after.find(|c| !is_whitespace(c)).unwrap_or(after.len());
        if start < after.len() {
            let line = after[start..].find('\n').map_or(after.len(), |length| start + length);
            last = Some(&after[start..line]);
            rest = &after[line..];
        } else if after.contains(|c| c != '\n') {
            // The pattern gives back a blank so that `.+` has something to match: an answer that strips to nothing.
            return Some("");
        } else {
            // Nothing but line feeds: no match, and no mark can follow.
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn predictions() {
        let cases = [
            ("1,234,567", "1234"),
            (".5", "5"),
            ("1/2", "1"),
            ("x=42", "42"),
            ("$-42.50!", "-42.50"),
            ("--3", "-3"),
            ("3.", "3"),
            ("3.,4", "3"),
            ("a1b2", "1"),
            ("٣,٤", "٣٤"),
            ("½ 7", "7"),
        ];
        for (content, number) in cases {
            assert_eq!(predict(content).as_deref(), Some(number), "{content}");
        }
        for content in ["", "none", "-", "½", "²"] {
            assert_eq!(predict(content), None, "{content}");
        }
    }

    #[test]
    fn numeric_only_contents() {
        for content in ["42", "-4 2", "1,234.5", ".", "+,", "٣", "1.2.3"] {
            assert!(is_numeric_only(content), "{content}");
        }
        for content in ["", "-", "+-1", "1-", "$4", "4\t2", "x", "1e5"] {
            assert!(!is_numeric_only(content), "{content}");
        }
    }

    #[test]
    fn marks_before_blanks() {
        assert_eq!(gold_answer("7 ####\n\n8"), "8");
        assert_eq!(gold_answer("7 #### \n"), "", "the mark wins over the number");
        assert_eq!(gold_answer("7 ####\n\n"), "7", "line feeds are no answer");
        assert_eq!(gold_answer("#### 5\n####"), "5");
        assert_eq!(gold_answer("######## 6"), "#### 6");
        assert_eq!(gold_answer("a\u{2028}b"), "b");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[-+0-9٣.,# \n\u{1c}a-cé]{0,40}|.{0,20}") {
            let gold = gold_answer(&text);
            prop_assert_eq!(python::strip(&gold), gold.as_str());
            let normal = normalize(&text);
            prop_assert_eq!(normalize(&normal), normal);
            if let Some(number) = predict(&text) {
                prop_assert!(number.chars().any(|c| decimal_digit(c).is_some()));
                prop_assert!(!number.contains(','));
            }
        }
    }
}
