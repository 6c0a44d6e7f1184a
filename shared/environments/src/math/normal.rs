//! The form in which two formulas are compared.

use std::sync::LazyLock;

use grail_text::python;
use regex::Regex;

/// `formula` without blanks, sizes of brackets and small spaces, fractions of all styles as `\frac`, in lower case.
#[must_use]
pub fn normalize(formula: &str) -> String {
    let mut text = python::strip(formula).to_owned();
    for style in ["\\dfrac", "\\tfrac", "\\cfrac"] {
        text = text.replace(style, "\\frac");
    }
    let text = without_sizes(&text);
    let text = without_commands(&text, [',', '!']);
    let text = without_commands(&text, [';', ':']);
    text.chars().filter(|c| !python::is_whitespace(*c)).collect::<String>().to_lowercase()
}

/// Without `\left` and `\right` where a word ends after them.
fn without_sizes(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        kept.push_str(&rest[..at]);
        rest = &rest[at..];
        let after = ["\\left", "\\right"].into_iter().find_map(|size| rest.strip_prefix(size));
        match after.filter(|after| !after.chars().next().is_some_and(is_word)) {
            Some(after) => rest = after,
            None => {
                kept.push('\\');
                rest = &rest[1..];
            }
        }
    }
    kept + rest
}

/// Without a backslash and one of `names`, found from left to right.
fn without_commands(text: &str, names: [char; 2]) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '\\' || chars.next_if(|next| names.contains(next)).is_none() {
            kept.push(c);
        }
    }
    kept
}

/// Whether `\w` of CPython's `re` matches `c`: letters, numbers of any kind and the underscore, but no marks, unlike
/// [`char::is_alphanumeric`].
fn is_word(c: char) -> bool {
    static WORD: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"^[\p{L}\p{N}_]$").expect("the pattern is a constant"));
    if c.is_ascii() {
        return c.is_ascii_alphanumeric() || c == '_';
    }
    WORD.is_match(c.encode_utf8(&mut [0; 4]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_go_where_a_word_ends() {
        let cases = [
            (r"\left(x\right)", "(x)"),
            (r"\leftarrow", r"\leftarrow"),
            (r"\left1", r"\left1"),
            (r"\left_", r"\left_"),
            (r"\lefté", r"\lefté"),
            (r"\left", ""),
            (r"\left\left[", "["),
            (r"\left ab", "ab"),
            (r"\Left(", r"\left("),
            ("\\left\u{301}x", "\u{301}x"),
            ("\\left\u{bd}", "\\left\u{bd}"),
        ];
        for (formula, normal) in cases {
            assert_eq!(normalize(formula), normal, "{formula}");
        }
    }

    #[test]
    fn small_spaces_go_in_two_passes() {
        assert_eq!(normalize(r"1\,000\!0\;0\:0"), "1000000");
        assert_eq!(normalize(r"\\,;x"), "x", "what the first pass leaves is read by the second");
        assert_eq!(normalize(r"\\,!x"), r"\!x", "but not by the first again");
        assert_eq!(normalize(r"\dfrac12 \tfrac{1}{2}\cfrac x"), r"\frac12\frac{1}{2}\fracx");
    }

    proptest! {
        #[test]
        fn no_blank_is_left(text in r"[ \\a-z,;:!{}\u{1c}ß]{0,30}|(\\left|\\right|\\dfrac|\\,|x|\\){0,10}|.{0,20}") {
            let normal = normalize(&text);
            prop_assert!(!normal.contains(python::is_whitespace));
        }
    }
}
