//! Which formulas are harmless enough to share a child.
//!
//! sympy's parser evaluates Python, so a pair normally gets a child of its own. Most answers are plain arithmetic, though, and
//! forking takes longer than comparing them. A text without quotes, attributes and underscores, and without names that do more
//! than arithmetic, cannot run anything else, and so cannot change what comes after it in the same child. Names that the parser
//! does not know are symbols to it, whatever they mean elsewhere: it hands them to sympy as text.

use std::collections::HashSet;
use std::sync::LazyLock;

/// All names without underscores that the parser of the one version of sympy knows, and Python's keywords, in lower case, as
/// the texts are.
const KNOWN: &str = include_str!("parser_names.txt");

/// Those of [`KNOWN`] that do nothing but arithmetic, and whose answers do not hang on what was computed before: `primefactors`
/// with a limit finds what an earlier factorisation has left behind.
const HARMLESS: &str = "abs acos acosh acot acoth acsc acsch and apart arg asec asech asin asinh atan atanh bell bernoulli beta \
    binomial cancel catalan cbrt ceiling conjugate cos cosh cot coth csc csch deg degree denom diff div divisors else erf \
    euler exp expand factor factorial false fibonacci floor frac gamma gcd harmonic if im in integrate is isprime lcm len \
    li limit ln log lucas max maximum min minimum nan not numer oo or pi pow prime product rad re \
    rem root roots round sec sech sign simplify sin sinc sinh solve solveset sqrt sum summation tan tanh together totient \
    trigsimp true zeta zoo";

/// Known names of letters alone that do more than arithmetic, or may.
static DANGEROUS: LazyLock<HashSet<&str>> = LazyLock::new(|| {
    let harmless: HashSet<&str> = HARMLESS.split_ascii_whitespace().collect();
    KNOWN.lines().filter(|name| !harmless.contains(name)).collect()
});

/// Known names with digits: what stands before and after a digit may belong to a name.
static WITH_DIGITS: LazyLock<Vec<&str>> =
    LazyLock::new(|| KNOWN.lines().filter(|name| name.contains(|c: char| c.is_ascii_digit())).collect());

/// Characters that are neither letters nor digits and that harmless formulas are made of.
const SIGNS: &str = "+-*/^()[]{},.!|<>=%$:;~ ";

/// Signs beyond ASCII that answers hold. To the parser each is a part of a symbol, which is text to it, or an error; none is a
/// part of any known name, nor becomes one.
const FOREIGN_SIGNS: &str = "°²³½¼¾×·−–√∞π";

/// Whether both sides are arithmetic and nothing else.
pub(super) fn is_plain(left: &str, right: &str) -> bool {
    [left, right].into_iter().all(is_plain_side)
}

fn is_plain_side(text: &str) -> bool {
    // Another case would be another name; texts are lower-cased before they come here.
    let is_allowed =
        |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || SIGNS.contains(c) || FOREIGN_SIGNS.contains(c);
    text.chars().all(is_allowed)
        && !has_attribute(text)
        && !text.split(|c: char| !c.is_ascii_lowercase()).any(|word| DANGEROUS.contains(word))
        && !WITH_DIGITS.iter().any(|name| text.contains(name))
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
                .into_iter()
                .chain([
                    "yes",
                    "monday",
                    "5 apples",
                    "set()",
                    "matrix([1])",
                    "sum([1,2])",
                    "zeta(2)",
                    "xy",
                    "eq(x,5)",
                    "π/2",
                    "90°",
                    "√2",
                ])
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
            "x\u{200b}",
            "chr(9)",
            "symbols",
            "@",
            "`1`",
            "1\n2",
            "EXEC(1)",
            "2exec(1)",
            "exec2if 1else exec(1)",
            "hankel1(1,2)",
            "var(x)",
            "5for x in{1}",
            "primefactors(10,2)",
            "open(0)",
        ];
        for text in hostile {
            assert!(!is_plain(text, "1") && !is_plain("1", text), "{text}");
        }
    }

    #[test]
    fn harmless_names_are_known_ones() {
        let known: HashSet<&str> = KNOWN.lines().collect();
        for name in HARMLESS.split_ascii_whitespace() {
            assert!(known.contains(name), "{name}");
        }
        assert!(known.is_superset(&HashSet::from(["exec", "eval", "lambda", "for", "sympify", "var", "hankel1"])));
    }

    #[test]
    fn the_parser_knows_these_names_and_no_others() {
        let program = "import keyword\nsys_path_is_set = sys.path.append(sys.argv[1])\nnames = set(parser_names()) | \
                       set(keyword.kwlist)\nprint(*sorted(n for n in names if n == n.lower() and n.isascii() and n.isalnum()))";
        let found = crate::sandbox::in_interpreter(program);
        assert_eq!(found.split_ascii_whitespace().collect::<Vec<_>>(), KNOWN.lines().collect::<Vec<_>>());
    }
}
