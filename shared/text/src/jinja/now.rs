//! `strftime_now`: the local date and time as text.

use std::fmt::Write as _;

use chrono::{Local, NaiveDateTime};
use minijinja::{Error, ErrorKind};

/// `datetime.now().strftime(format)`.
///
/// # Errors
/// If `format` holds a directive that does not exist.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands functions their arguments as owned values")]
pub fn strftime_now(format: String) -> Result<String, Error> {
    strftime(Local::now().naive_local(), &format)
}

fn strftime(time: NaiveDateTime, format: &str) -> Result<String, Error> {
    let mut text = String::new();
    write!(text, "{}", time.format(&without_zone(format))).map_err(|_| {
        Error::new(ErrorKind::InvalidOperation, format!("{format:?} is no date format that strftime_now knows"))
    })?;
    Ok(text)
}

/// `format` without `%z` and `%Z`: `datetime.now()` has no zone, so Python writes nothing for them.
fn without_zone(format: &str) -> String {
    let mut kept = String::with_capacity(format.len());
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            kept.push(c);
            continue;
        }
        match chars.next() {
            Some('z' | 'Z') => {}
            Some(directive) => kept.extend(['%', directive]),
            None => kept.push('%'),
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_as_the_c_locale() {
        let time = NaiveDateTime::parse_from_str("2024-07-04 09:05:06", "%Y-%m-%d %H:%M:%S").unwrap();
        for (format, text) in [
            ("%d %b %Y", "04 Jul 2024"),
            ("%A, %B %-d, %Y", "Thursday, July 4, 2024"),
            ("%Y-%m-%d %H:%M:%S%z %Z", "2024-07-04 09:05:06 "),
            ("100%% %I %p %j", "100% 09 AM 186"),
            ("plain", "plain"),
        ] {
            assert_eq!(strftime(time, format).unwrap(), text, "{format}");
        }
        assert!(strftime(time, "%!").is_err());
        assert!(strftime(time, "%").is_err());
    }
}
