//! Times for answers and log lines.

use std::io::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970.
#[must_use]
pub fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Calendar fields of a time in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Civil {
    year: i64,
    month: i64,
    day: i64,
    second_of_day: i64,
}

impl Civil {
    /// Days to dates in the proleptic Gregorian calendar, by eras of 400 years that begin in March.
    const fn of_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(86_400) + 719_468;
        let era = days.div_euclid(146_097);
        let day_of_era = days.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        Self {
            year: year_of_era + era * 400 + if month <= 2 { 1 } else { 0 },
            month,
            day: day_of_year - (153 * shifted_month + 2) / 5 + 1,
            second_of_day: seconds.rem_euclid(86_400),
        }
    }

    fn text(self, between: char) -> String {
        let Self { year, month, day, second_of_day } = self;
        let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
        format!("{year:04}-{month:02}-{day:02}{between}{hour:02}:{minute:02}:{second:02}")
    }
}

/// `2026-11-22T17:04:43.224251+00:00`
#[must_use]
pub fn iso_time(unix_seconds: f64) -> String {
    #[expect(clippy::cast_possible_truncation, reason = "seconds since 1970 are far below 2^53")]
    let (seconds, micros) = (unix_seconds.floor() as i64, (unix_seconds.fract() * 1e6) as i64);
    format!("{}.{micros:06}+00:00", Civil::of_unix(seconds).text('T'))
}

/// Writes one line of the start-up log to stderr in SGLang's form, which launchers read phases from.
pub fn mark(text: &str) {
    #[expect(clippy::cast_possible_truncation, reason = "seconds since 1970 are far below 2^53")]
    let now = Civil::of_unix(unix_seconds() as i64).text(' ');
    // A reader that has gone is no reason to stop serving.
    if writeln!(std::io::stderr().lock(), "[{now}] {text}").is_err() {
        tracing::trace!("Nobody reads the log.");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_known_seconds() {
        let cases = [
            (0, "1970-01-01T00:00:00"),
            (951_782_400, "2000-02-29T00:00:00"),
            (951_868_799, "2000-02-29T23:59:59"),
            (1_795_367_083, "2026-11-22T17:04:43"),
            (4_107_542_400, "2100-03-01T00:00:00"),
        ];
        for (seconds, text) in cases {
            assert_eq!(Civil::of_unix(seconds).text('T'), text);
        }
        assert_eq!(iso_time(1_795_367_083.25), "2026-11-22T17:04:43.250000+00:00");
    }
}
