//! Rules of CPython 3.12's text functions where Rust's own differ.

/// Whether `str.isspace`, `str.strip` and `\s` of `re` count `c` as white space.
///
/// Rust's [`char::is_whitespace`] lacks U+001C to U+001F.
#[must_use]
pub fn is_whitespace(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// `str.strip()` without an argument.
#[must_use]
pub fn strip(text: &str) -> &str {
    text.trim_matches(is_whitespace)
}

/// Code points with decimal value 0 (Unicode 15.0, as CPython 3.12 has); each is followed by its digits 1 to 9.
const DECIMAL_ZEROS: [u32; 68] = [
    0x0030, 0x0660, 0x06F0, 0x07C0, 0x0966, 0x09E6, 0x0A66, 0x0AE6, 0x0B66, 0x0BE6, 0x0C66, 0x0CE6, 0x0D66, 0x0DE6,
    0x0E50, 0x0ED0, 0x0F20, 0x1040, 0x1090, 0x17E0, 0x1810, 0x1946, 0x19D0, 0x1A80, 0x1A90, 0x1B50, 0x1BB0, 0x1C40,
    0x1C50, 0xA620, 0xA8D0, 0xA900, 0xA9D0, 0xA9F0, 0xAA50, 0xABF0, 0xFF10, 0x104A0, 0x10D30, 0x11066, 0x110F0,
    0x11136, 0x111D0, 0x112F0, 0x11450, 0x114D0, 0x11650, 0x116C0, 0x11730, 0x118E0, 0x11950, 0x11C50, 0x11D50,
    0x11DA0, 0x11F50, 0x16A60, 0x16AC0, 0x16B50, 0x1D7CE, 0x1D7D8, 0x1D7E2, 0x1D7EC, 0x1D7F6, 0x1E140, 0x1E2F0,
    0x1E4F0, 0x1E950, 0x1FBF0,
];

/// Decimal value of `c` in `0..10`, or `None` if `\d` of `re` does not match it.
#[must_use]
pub fn decimal_digit(c: char) -> Option<u32> {
    if c.is_ascii() {
        return c.to_digit(10);
    }
    let code = u32::from(c);
    let block = DECIMAL_ZEROS.partition_point(|zero| *zero <= code);
    let value = code - DECIMAL_ZEROS[block.checked_sub(1)?];
    (value < 10).then_some(value)
}

/// `str.splitlines(keepends)`.
#[must_use]
pub fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut start = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if !matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}') {
            continue;
        }
        let mut end = at + c.len_utf8();
        if c == '\r' && chars.next_if(|(_, next)| *next == '\n').is_some() {
            end += 1;
        }
        lines.push(&text[start..if keep_ends { end } else { at }]);
        start = end;
    }
    if start < text.len() {
        lines.push(&text[start..]);
    }
    lines
}

/// `repr(float)`: the shortest digits that read back as `value`.
#[must_use]
pub fn float_repr(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs())
}

/// `value` as the text of an integer, as `int(text)` reads it: blanks around, one sign, digits of any script, single `_`
/// between digits. Returns the sign and the digits without leading zeros (at least one digit).
///
/// `None` where `int` raises `ValueError`, also above its limit of 4,300 digits.
#[must_use]
pub fn parse_int(text: &str) -> Option<(bool, String)> {
    const MAX_DIGITS: usize = 4300;
    let text = strip(text);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let mut plain = String::with_capacity(digits.len());
    let mut after_digit = false;
    for c in digits.chars() {
        if c == '_' && after_digit {
            after_digit = false;
            continue;
        }
        plain.push(char::from_digit(decimal_digit(c)?, 10)?);
        after_digit = true;
    }
    if !after_digit || plain.len() > MAX_DIGITS {
        return None;
    }
    let significant = plain.trim_start_matches('0');
    let value = if significant.is_empty() { "0" } else { significant };
    Some((negative && value != "0", value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_is_pythons() {
        let all: Vec<u32> = ('\0'..=char::MAX).filter(|c| is_whitespace(*c)).map(u32::from).collect();
        let mut expected: Vec<u32> = (0x09..=0x0d).chain(0x1c..=0x20).chain([0x85, 0xa0, 0x1680]).collect();
        expected.extend((0x2000..=0x200a).chain([0x2028, 0x2029, 0x202f, 0x205f, 0x3000]));
        assert_eq!(all, expected);
        assert_eq!(strip("\u{1c}\u{200b} x \u{3000}"), "\u{200b} x");
    }

    #[test]
    fn decimal_digits_of_every_script() {
        assert_eq!(('\0'..=char::MAX).filter(|c| decimal_digit(*c).is_some()).count(), 680);
        assert_eq!(decimal_digit('7'), Some(7));
        assert_eq!(decimal_digit('٣'), Some(3));
        assert_eq!(decimal_digit('\u{1d7ff}'), Some(9));
        for other in ['²', '½', 'x', '\u{0}', '\u{1fbfa}', '一'] {
            assert_eq!(decimal_digit(other), None, "{other:?}");
        }
    }

    #[test]
    fn lines_split_as_in_python() {
        assert_eq!(split_lines("a\r\nb\rc\u{2028}d\n\ne\n", false), ["a", "b", "c", "d", "", "e"]);
        assert_eq!(split_lines("a\r\nb\n", true), ["a\r\n", "b\n"]);
        assert!(split_lines("", false).is_empty());
    }

    #[test]
    fn floats_print_as_in_python() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-5, "1.5e-05"),
            (0.0001, "0.0001"),
            (1e100, "1e+100"),
            (f64::NAN, "nan"),
            (f64::NEG_INFINITY, "-inf"),
        ];
        for (value, text) in cases {
            assert_eq!(float_repr(value), text);
        }
    }

    #[test]
    fn integers_read_as_in_python() {
        let read = |text: &str| {
            parse_int(text).map(|(negative, digits)| format!("{}{digits}", if negative { "-" } else { "" }))
        };
        for (text, value) in
            [("5", "5"), (" +3\u{1c}", "3"), ("-0", "0"), ("1_0", "10"), ("007", "7"), ("-٣", "-3"), ("0_0", "0")]
        {
            assert_eq!(read(text).as_deref(), Some(value), "{text:?}");
        }
        for text in ["", "+", "- 1", "1__0", "_1", "1_", "1.5", "0x1", "²", "--1"] {
            assert_eq!(read(text), None, "{text:?}");
        }
        assert_eq!(read(&"9".repeat(4301)), None);
    }
}
