//! Numbers as Python's `int()` and `float()` read them: trainer, miners and validators must agree on odd spellings too.

use serde_json::Value;

/// Longest text that CPython converts to an integer.
const MAX_INT_DIGITS: usize = 4300;

/// The zeros of Unicode's decimal digits (category Nd); each is followed by its 1 to 9.
const DECIMAL_ZEROS: [u32; 66] = [
    0x30, 0x660, 0x6f0, 0x7c0, 0x966, 0x9e6, 0xa66, 0xae6, 0xb66, 0xbe6, 0xc66, 0xce6, 0xd66, 0xde6, 0xe50, 0xed0,
    0xf20, 0x1040, 0x1090, 0x17e0, 0x1810, 0x1946, 0x19d0, 0x1a80, 0x1a90, 0x1b50, 0x1bb0, 0x1c40, 0x1c50, 0xa620,
    0xa8d0, 0xa900, 0xa9d0, 0xa9f0, 0xaa50, 0xabf0, 0xff10, 0x104a0, 0x10d30, 0x11066, 0x110f0, 0x11136, 0x111d0,
    0x112f0, 0x11450, 0x114d0, 0x11650, 0x116c0, 0x11730, 0x118e0, 0x11950, 0x11c50, 0x11d50, 0x11da0, 0x16a60,
    0x16ac0, 0x16b50, 0x1d7ce, 0x1d7d8, 0x1d7e2, 0x1d7ec, 0x1d7f6, 0x1e140, 0x1e2f0, 0x1e950, 0x1fbf0,
];

/// `int(text)`; `None` is Python's `ValueError`. Values beyond `i128` saturate, which keeps every comparison right.
pub(crate) fn int_from_text(text: &str) -> Option<i128> {
    let trimmed = text.trim_matches(is_space);
    let (negative, digits) = match trimmed.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, trimmed.strip_prefix('+').unwrap_or(trimmed)),
    };
    let mut magnitude: i128 = 0;
    let mut count = 0_usize;
    let mut after_digit = false;
    for character in digits.chars() {
        match decimal_digit(character) {
            Some(digit) => {
                magnitude = magnitude.saturating_mul(10).saturating_add(i128::from(digit));
                count += 1;
                after_digit = true;
            }
            None if character == '_' && after_digit => after_digit = false,
            None => return None,
        }
    }
    (after_digit && count <= MAX_INT_DIGITS).then_some(if negative { -magnitude } else { magnitude })
}

/// `float(text)`; `None` is Python's `ValueError`.
pub(crate) fn float_from_text(text: &str) -> Option<f64> {
    let characters: Vec<char> = text.trim_matches(is_space).chars().collect();
    let mut plain = String::with_capacity(characters.len());
    for (place, character) in characters.iter().enumerate() {
        let digit_at = |place: Option<usize>| {
            place.and_then(|place| characters.get(place)).is_some_and(|c| decimal_digit(*c).is_some())
        };
        match decimal_digit(*character) {
            Some(digit) => plain.push(char::from(b'0' + digit)),
            None if *character == '_' => {
                if !digit_at(place.checked_sub(1)) || !digit_at(place.checked_add(1)) {
                    return None;
                }
            }
            None => plain.push(*character),
        }
    }
    plain.parse().ok()
}

/// `int(value)` of a value that `json.loads` gave; `None` is any exception.
pub(crate) fn int(value: &Value) -> Option<i128> {
    match value {
        Value::Bool(flag) => Some(i128::from(*flag)),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(small), _, _) => Some(i128::from(small)),
            (None, Some(large), _) => Some(i128::from(large)),
            (None, None, Some(float)) => truncate(float),
            (None, None, None) => None,
        },
        Value::String(text) => int_from_text(text),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// `float(value)` of a value that `json.loads` gave; `None` is any exception.
pub(crate) fn float(value: &Value) -> Option<f64> {
    match value {
        Value::Bool(flag) => Some(f64::from(u8::from(*flag))),
        Value::Number(number) => number.as_f64(),
        Value::String(text) => float_from_text(text),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

#[expect(clippy::cast_possible_truncation, reason = "int() of a float truncates; beyond i128 the cast saturates")]
fn truncate(float: f64) -> Option<i128> {
    float.is_finite().then_some(float as i128)
}

fn decimal_digit(character: char) -> Option<u8> {
    let code = u32::from(character);
    let after = DECIMAL_ZEROS.partition_point(|zero| *zero <= code);
    let zero = DECIMAL_ZEROS.get(after.checked_sub(1)?)?;
    u8::try_from(code - zero).ok().filter(|digit| *digit < 10)
}

/// `str.isspace` of one character, which also holds for the four separators of ASCII.
fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_follow_cpython() {
        for (text, expected) in [
            ("0", Some(0)),
            ("0300", Some(300)),
            (" \u{1f}+2_70\u{a0}", Some(270)),
            ("-5", Some(-5)),
            ("\u{661}\u{660}", Some(10)),
            ("1__0", None),
            ("_1", None),
            ("1_", None),
            ("+_1", None),
            ("+ 1", None),
            ("", None),
            ("  ", None),
            ("1x", None),
            ("0x10", None),
            ("1.0", None),
        ] {
            assert_eq!(int_from_text(text), expected, "{text:?}");
        }
        assert_eq!(int_from_text(&"9".repeat(60)), Some(i128::MAX));
        assert_eq!(int_from_text(&"1".repeat(4301)), None);
    }

    #[test]
    fn floats_follow_cpython() {
        for (text, expected) in [
            ("0.7", Some(0.7)),
            (" 1_0.2_5 ", Some(10.25)),
            ("1.", Some(1.0)),
            (".5", Some(0.5)),
            ("-1e-3", Some(-0.001)),
            ("\u{661}.5", Some(1.5)),
            ("inf", Some(f64::INFINITY)),
            ("-Infinity", Some(f64::NEG_INFINITY)),
            ("1e999", Some(f64::INFINITY)),
            ("1_.5", None),
            ("_1", None),
            ("0x1p3", None),
            ("", None),
            (".", None),
            ("1e", None),
        ] {
            assert_eq!(float_from_text(text), expected, "{text:?}");
        }
        assert!(float_from_text("NaN").is_some_and(f64::is_nan));
    }

    #[test]
    fn json_values_convert_as_in_python() {
        assert_eq!(int(&serde_json::json!(50.9)), Some(50));
        assert_eq!(int(&serde_json::json!(-50.9)), Some(-50));
        assert_eq!(int(&serde_json::json!(u64::MAX)), Some(i128::from(u64::MAX)));
        assert_eq!(int(&serde_json::json!(true)), Some(1));
        assert_eq!(int(&serde_json::json!("50.9")), None);
        assert_eq!(int(&serde_json::json!(null)), None);
        assert_eq!(float(&serde_json::json!(false)), Some(0.0));
        assert_eq!(float(&serde_json::json!([1.0])), None);
    }
}
