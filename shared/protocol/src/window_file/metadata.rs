//! Schema-level metadata: five texts that a reader turns into numbers by Python's `int()` and `float()`.

use std::collections::HashMap;

/// What the five keys say. A missing key is `""` or 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Metadata {
    pub wallet: String,
    /// Saturated at the ends of the type, which no window reaches.
    pub window_start: i128,
    pub window_length: i128,
    pub inference_count: i128,
    /// Unix seconds.
    pub timestamp: f64,
}

/// A metadata text that is no number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("metadata {key} is {text:?}, which is no number")]
pub struct NotANumber {
    pub key: &'static str,
    pub text: String,
}

impl Metadata {
    /// # Errors
    /// [`NotANumber`] if one of the numbers does not parse: the reference then treats the file as absent.
    pub(super) fn from_texts(texts: &HashMap<String, String>) -> Result<Self, NotANumber> {
        let integer = |key: &'static str| match texts.get(key) {
            None => Ok(0),
            Some(text) => python_int(text).ok_or_else(|| NotANumber { key, text: text.clone() }),
        };
        Ok(Self {
            wallet: texts.get("wallet").cloned().unwrap_or_default(),
            window_start: integer("window_start")?,
            window_length: integer("window_length")?,
            inference_count: integer("inference_count")?,
            timestamp: match texts.get("timestamp") {
                None => 0.0,
                Some(text) => python_float(text).ok_or_else(|| NotANumber { key: "timestamp", text: text.clone() })?,
            },
        })
    }
}

/// Python's `int(text)` for ASCII digits, saturated to 128 bits. Python refuses more than 4300 digits.
fn python_int(text: &str) -> Option<i128> {
    let text = trim_like_python(text);
    let (negative, digits) = match text.as_bytes() {
        [b'-', ..] => (true, &text[1..]),
        [b'+', ..] => (false, &text[1..]),
        _ => (false, text),
    };
    let digits = without_underscores(digits)?;
    if digits.is_empty() || digits.len() > 4300 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let magnitude =
        digits.bytes().fold(0_i128, |value, digit| value.saturating_mul(10).saturating_add(i128::from(digit - b'0')));
    Some(if negative { -magnitude } else { magnitude })
}

/// Python's `float(text)`.
fn python_float(text: &str) -> Option<f64> {
    let text = without_underscores(trim_like_python(text))?;
    // Rust and Python agree on decimal texts and on the spellings of infinity and NaN, in any case.
    text.parse().ok()
}

fn trim_like_python(text: &str) -> &str {
    // Python's white space is Unicode's plus the four information separators.
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

/// Underscores may stand between two digits and nowhere else.
fn without_underscores(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let digit = |index: Option<usize>| index.and_then(|index| bytes.get(index)).is_some_and(u8::is_ascii_digit);
    for (index, byte) in bytes.iter().enumerate() {
        if *byte == b'_' && !(digit(index.checked_sub(1)) && digit(Some(index + 1))) {
            return None;
        }
    }
    Some(text.replace('_', ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_as_python_reads_them() {
        for (text, value) in [
            ("0", 0),
            (" 3600000\n", 3_600_000),
            ("+7", 7),
            ("-7", -7),
            ("1_000", 1000),
            ("007", 7),
            ("\u{1f}5\u{a0}", 5),
        ] {
            assert_eq!(python_int(text), Some(value), "{text:?}");
        }
        for text in ["", " ", "1.0", "0x10", "_1", "1_", "1__0", "- 1", "1 0", "a", "--1"] {
            assert_eq!(python_int(text), None, "{text:?}");
        }
        assert_eq!(python_int(&"9".repeat(60)), Some(i128::MAX));
        assert_eq!(python_int(&"9".repeat(4301)), None);
    }

    #[test]
    fn floats_as_python_reads_them() {
        for (text, value) in [
            ("1732301234.25", 1_732_301_234.25),
            (" 1e3 ", 1000.0),
            (".5", 0.5),
            ("5.", 5.0),
            ("1_0.5", 10.5),
            ("-INF", f64::NEG_INFINITY),
        ] {
            assert_eq!(python_float(text), Some(value), "{text:?}");
        }
        assert!(python_float("nan").is_some_and(f64::is_nan));
        for text in ["", "1e", "1_.5", "0x1p3", "1,5", "one"] {
            assert_eq!(python_float(text), None, "{text:?}");
        }
    }

    #[test]
    fn missing_keys_are_empty_or_zero() {
        let none = Metadata::from_texts(&HashMap::new()).unwrap();
        assert_eq!(
            none,
            Metadata { wallet: String::new(), window_start: 0, window_length: 0, inference_count: 0, timestamp: 0.0 }
        );
    }
}
