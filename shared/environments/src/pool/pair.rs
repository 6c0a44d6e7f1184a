//! Which formulas are harmless enough to share a child.
//!
//! sympy's parser evaluates Python, so a pair normally gets a child of its own. Most answers are plain arithmetic, though, and
//! forking takes longer than comparing them. A text without quotes, attributes, underscores and names beyond a few functions
//! cannot run anything but arithmetic, and so cannot change what comes after it in the same child.

/// Names of more than one letter that do nothing but arithmetic.
const NAMES: [&str; 44] = [
    "abs",
    "acos",
    "and",
    "asin",
    "atan",
    "beta",
    "binomial",
    "conjugate",
    "cos",
    "cosh",
    "cot",
    "csc",
    "diff",
    "else",
    "exp",
    "factorial",
    "false",
    "float",
    "floor",
    "gamma",
    "gcd",
    "if",
    "im",
    "inf",
    "infinity",
    "int",
    "integer",
    "lcm",
    "ln",
    "log",
    "max",
    "min",
    "nan",
    "not",
    "oo",
    "or",
    "pi",
    "re",
    "root",
    "sec",
    "sin",
    "sqrt",
    "tan",
    "true",
];

/// Characters that are neither letters nor digits and that harmless formulas are made of.
const SIGNS: &str = "+-*/^()[]{},.!|<>=%$:;~ ";

/// Whether both sides are arithmetic and nothing else.
pub(super) fn is_plain(left: &str, right: &str) -> bool {
    [left, right].into_iter().all(is_plain_side)
}

fn is_plain_side(text: &str) -> bool {
    let is_known = |c: char| c.is_ascii_alphanumeric() || SIGNS.contains(c);
    let mut words = text.split(|c: char| !c.is_ascii_alphabetic()).filter(|word| !word.is_empty());
    text.chars().all(is_known) && !has_attribute(text) && words.all(|word| word.len() == 1 || NAMES.contains(&word))
}

/// Whether a point is followed by a name, also after blanks.
fn has_attribute(text: &str) -> bool {
    text.split('.').skip(1).any(|after| after.trim_start().starts_with(|c: char| c.is_ascii_alphabetic()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_is_plain() {
        for text in
            ["1/2", "0.3[3]", "sqrt(2)*x**2", "-5", "(1,2)", "{1,2}", "50%", "x=5", "2x", "3.", "", "binomial(5,2)"]
        {
            assert!(is_plain(text, "1"), "{text}");
        }
    }

    #[test]
    fn whatever_could_run_something_is_not() {
        let hostile = [
            "exec(1)",
            "x.args",
            "1. real",
            "__import__",
            "'a'",
            "\"a\"",
            "lambda:5",
            "eval(chr(1))",
            "print(5)",
            "globals()",
            "a_b",
            "\\frac",
            "#",
            "ｅｘｅｃ",
            "π",
            "x\u{200b}",
            "chr(9)",
            "symbols",
            "@",
            "`1`",
            "1\n2",
        ];
        for text in hostile {
            assert!(!is_plain(text, "1") && !is_plain("1", text), "{text}");
        }
    }
}
