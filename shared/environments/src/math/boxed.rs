//! `\boxed{…}` in worked solutions.

const OPEN: &str = "\\boxed{";

/// Content of the first `\boxed{`; `None` if there is none or it is never closed. Escaped braces count like any.
#[must_use]
pub fn first_boxed(solution: &str) -> Option<&str> {
    let start = solution.find(OPEN)? + OPEN.len();
    balanced(&solution[start..])
}

/// Content of the last `\boxed{` that is closed.
#[must_use]
pub fn last_boxed(solution: &str) -> Option<&str> {
    solution.rmatch_indices(OPEN).find_map(|(start, _)| balanced(&solution[start + OPEN.len()..]))
}

/// What stands before the brace that closes one opened before `text`.
fn balanced(text: &str) -> Option<&str> {
    let mut depth = 1_usize;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&text[..at]);
        }
    }
    None
}
