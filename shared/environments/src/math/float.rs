//! Numbers as Python's `float` reads them.

use grail_text::python::{decimal_digit, strip};

/// `float(text)`: blanks around, a sign, digits of any script with single `_` between them, a fraction, an exponent, or
/// `inf`, `infinity` and `nan` in any case; `None` where it raises `ValueError`.
pub(super) fn parse_float(text: &str) -> Option<f64> {
    let mut plain = String::new();
    let mut chars = strip(text).chars().peekable();
    let mut after_digit = false;
    while let Some(c) = chars.next() {
        if c == '_' {
            // Between digits only, and one at a time.
            if !after_digit || chars.peek().is_none_or(|next| decimal_digit(*next).is_none()) {
                return None;
            }
            continue;
        }
        let digit = decimal_digit(c);
        after_digit = digit.is_some();
        plain.push(digit.and_then(|value| char::from_digit(value, 10)).unwrap_or(c));
    }
    // The rest of the syntax is the same in both languages, and both round correctly.
    plain.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::parse_float;

    #[test]
    fn numbers_read_as_in_python() {
        let cases = [
            ("1", 1.0),
            (" +1.5\u{1c}", 1.5),
            (".5", 0.5),
            ("5.", 5.0),
            ("1e3", 1000.0),
            ("1E-2", 0.01),
            ("1_000.0_1", 1000.01),
            ("٣.٥", 3.5),
            ("1_٣", 13.0),
            ("-Infinity", f64::NEG_INFINITY),
            ("inf", f64::INFINITY),
            ("1e400", f64::INFINITY),
        ];
        for (text, value) in cases {
            assert_eq!(parse_float(text), Some(value), "{text:?}");
        }
        assert!(parse_float("nan").unwrap().is_nan() && parse_float("-NaN").unwrap().is_nan());
        for text in [
            "", ".", "+", "e5", "1e", "1__0", "_1", "1_", "1_.5", "1._5", "1_e5", "0x10", "1,0", "½", "²", "--1",
            "1 0", "infinit",
        ] {
            assert_eq!(parse_float(text), None, "{text:?}");
        }
    }
}
