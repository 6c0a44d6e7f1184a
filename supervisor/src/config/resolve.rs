//! From texts to values: conversions that name what they expect, and the record of every value for reports.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::Duration;

use grail_telemetry::{REDACTED, SecretString};

use super::origin::{Origin, Sourced};
use super::problem::{Problem, Warning};
use super::raw::RawConfig;
use super::report::Row;
use super::variables::{Variable, find};

/// What a conversion expects, for "expected ...".
pub(super) type Expected = String;

/// Converts texts one variable at a time and keeps what it sees.
#[derive(Debug)]
pub(super) struct Resolver {
    pub raw: RawConfig,
    pub rows: Vec<Row>,
    pub problems: Vec<Problem>,
    pub warnings: Vec<Warning>,
}

impl Resolver {
    pub(super) fn new(mut raw: RawConfig) -> Self {
        raw.warn_of_names();
        let (problems, warnings) = (std::mem::take(&mut raw.problems), std::mem::take(&mut raw.warnings));
        Self { raw, rows: Vec::new(), problems, warnings }
    }

    /// A variable with a default. A value that does not convert is a problem, and the default stands in for it.
    pub(super) fn value<T>(
        &mut self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, Expected>,
        show: impl Fn(&T) -> String,
    ) -> Sourced<T> {
        let variable = variable(name);
        let default = parse(variable.default).expect("the table's defaults convert, as a test checks");
        let found = self.parsed(variable, parse).unwrap_or(Sourced { value: default, origin: Origin::Default });
        self.rows.push(Row::shown(variable, show(&found.value), found.origin.clone()));
        found
    }

    /// A variable without a default.
    pub(super) fn optional<T>(
        &mut self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, Expected>,
        show: impl Fn(&T) -> String,
    ) -> Sourced<Option<T>> {
        let variable = variable(name);
        let found = match self.parsed(variable, parse) {
            Some(found) => found.map(Some),
            None => Sourced { value: None, origin: Origin::Default },
        };
        let row = match &found.value {
            Some(value) => Row::shown(variable, show(value), found.origin.clone()),
            None => Row::unset(variable),
        };
        self.rows.push(row);
        found
    }

    /// A secret without a default.
    pub(super) fn secret(&mut self, name: &'static str) -> Sourced<Option<SecretString>> {
        self.optional(name, |text| Ok(SecretString::new(text.to_owned())), |_| REDACTED.to_owned())
    }

    /// A folder, with a leading `~` replaced.
    pub(super) fn folder(&mut self, name: &'static str) -> Sourced<Option<PathBuf>> {
        let variable = variable(name);
        let home = self.raw.base_folders.get("HOME").cloned();
        let mut found = match self.parsed(variable, |text| expand_home(text, home.as_deref())) {
            Some(found) => found.map(Some),
            None => Sourced { value: None, origin: Origin::Default },
        };
        if found.value.is_none() && !variable.default.is_empty() {
            match expand_home(variable.default, home.as_deref()) {
                Ok(path) => found.value = Some(path),
                Err(expected) => self.problem(
                    name,
                    &Origin::Default,
                    None,
                    &format!("for the default {}, expected {expected}", variable.default),
                ),
            }
        }
        let row = match &found.value {
            Some(path) => Row::shown(variable, path.display().to_string(), found.origin.clone()),
            None => Row::unset(variable),
        };
        self.rows.push(row);
        found
    }

    /// Puts a value that follows from others into the report.
    pub(super) fn report_value(&mut self, name: &'static str, value: String) {
        if let Some(row) = self.rows.iter_mut().find(|row| row.name == name) {
            row.value = Some(value);
        }
    }

    /// Overrides what the report says about a variable, for an option that decides it.
    pub(super) fn report_from_flag(&mut self, name: &'static str, value: &str, flag: &'static str) {
        if let Some(row) = self.rows.iter_mut().find(|row| row.name == name) {
            row.value = Some(value.to_owned());
            row.origin = Origin::Flag { name: flag };
        }
    }

    /// Whether something is already known to be wrong with a variable.
    pub(super) fn has_problem(&self, name: &str) -> bool {
        self.problems.iter().any(|problem| problem.variable == name)
    }

    /// `HOME` or a folder of the XDG specification; relative ones do not count, as that specification says.
    pub(super) fn base_folder(&self, name: &str) -> Option<PathBuf> {
        self.raw.base_folders.get(name).filter(|folder| folder.is_absolute()).cloned()
    }

    /// Records a problem that concerns more than one conversion.
    pub(super) fn problem(&mut self, name: &'static str, origin: &Origin, value: Option<String>, what: &str) {
        let variable = variable(name);
        let value = value.map(|value| if variable.secret { REDACTED.to_owned() } else { value });
        self.problems.push(Problem {
            variable: name,
            remedy: remedy(variable, value.is_some()),
            value,
            origin: origin.clone(),
            what: what.to_owned(),
        });
    }

    fn parsed<T>(
        &mut self,
        variable: &'static Variable,
        parse: impl Fn(&str) -> Result<T, Expected>,
    ) -> Option<Sourced<T>> {
        let (written, text, origin) = self.raw.value(variable)?;
        match parse(text) {
            Ok(value) => Some(Sourced { value, origin: origin.clone() }),
            Err(expected) => {
                let value = if variable.secret { REDACTED.to_owned() } else { shown_url(text) };
                self.problems.push(Problem {
                    variable: written,
                    value: Some(value),
                    origin: origin.clone(),
                    what: format!("expected {expected}"),
                    remedy: remedy(variable, true),
                });
                None
            }
        }
    }
}

fn variable(name: &str) -> &'static Variable {
    find(name).expect("only names of the table are resolved, as every load does")
}

fn remedy(variable: &Variable, is_set: bool) -> String {
    match (is_set, variable.default, variable.unset) {
        (false, ..) => format!("set it in .env or in the environment ({})", variable.help.trim_end_matches('.')),
        (true, "", "unset") => "correct it".to_owned(),
        (true, "", unset) => format!("correct it, or remove it for: {unset}"),
        (true, default, _) => format!("correct it, or remove it for the default {default}"),
    }
}

/// An integer in a range, written as Python's `int()` reads it apart from exotic digits.
pub(super) fn integer<T>(least: u64, most: u64) -> impl Fn(&str) -> Result<T, Expected>
where
    T: TryFrom<u64>,
{
    move |text| {
        let number = text.strip_prefix('+').unwrap_or(text).replace('_', "").parse::<u64>().ok();
        let number =
            number.filter(|number| (least..=most).contains(number)).and_then(|number| T::try_from(number).ok());
        number.ok_or_else(|| format!("an integer from {least} to {most}"))
    }
}

/// Seconds, fractions allowed.
pub(super) fn seconds(most: f64) -> impl Fn(&str) -> Result<Duration, Expected> {
    move |text| {
        let seconds = text.parse::<f64>().ok().filter(|seconds| *seconds > 0.0 && *seconds <= most);
        let duration = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        duration.ok_or_else(|| format!("a number of seconds above 0, at most {most}"))
    }
}

/// A share above 0, at most 1.
pub(super) fn share(text: &str) -> Result<f64, Expected> {
    let share = text.parse::<f64>().ok().filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| "a number above 0, at most 1".to_owned())
}

/// `true`, `1`, `yes`, `on` and their opposites, in any case.
pub(super) fn boolean(text: &str) -> Result<bool, Expected> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err("true or false".to_owned()),
    }
}

/// One of some words, in lower case, with a suggestion for near misses.
pub(super) fn choice<T: Copy>(words: &'static [(&'static str, T)]) -> impl Fn(&str) -> Result<T, Expected> {
    move |text| {
        let lower = text.to_ascii_lowercase();
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == lower) {
            return Ok(*value);
        }
        let names: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let near = names.iter().find(|word| super::variables::edit_distance(&lower, word) <= 2);
        let hint = near.map(|word| format!(" (did you mean {word}?)")).unwrap_or_default();
        Err(format!("one of {}{hint}", names.join(", ")))
    }
}

/// Any text.
pub(super) fn text(text: &str) -> Result<String, Expected> {
    Ok(text.to_owned())
}

/// A file name without separators, as wallets have.
pub(super) fn plain_name(text: &str) -> Result<String, Expected> {
    if text.contains(['/', '\0']) || text == "." || text == ".." {
        return Err("a name without /".to_owned());
    }
    Ok(text.to_owned())
}

/// Distinct GPU indices, separated by commas.
pub(super) fn gpu_list(text: &str) -> Result<Vec<u32>, Expected> {
    let expected = || "distinct GPU numbers separated by commas, for instance 4,5,6,7".to_owned();
    let mut indices = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let index: u32 = part.parse().map_err(|_| expected())?;
        if indices.contains(&index) {
            return Err(format!("{}, but {index} is there twice", expected()));
        }
        indices.push(index);
    }
    if indices.is_empty() { Err(expected()) } else { Ok(indices) }
}

/// WebSocket URLs, separated by commas.
pub(super) fn endpoints(text: &str) -> Result<Vec<String>, Expected> {
    let urls: Vec<String> = text.split(',').map(|url| url.trim().to_owned()).filter(|url| !url.is_empty()).collect();
    let sound = |url: &String| {
        url.strip_prefix("ws://").or_else(|| url.strip_prefix("wss://")).is_some_and(|rest| !rest.is_empty())
    };
    if !urls.is_empty() && urls.iter().all(sound) {
        Ok(urls)
    } else {
        Err("one or more URLs that begin with ws:// or wss://, separated by commas".to_owned())
    }
}

/// An HTTP URL without a final slash.
pub(super) fn http_url(text: &str) -> Result<String, Expected> {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    match rest {
        Some(rest) if !rest.is_empty() => Ok(text.trim_end_matches('/').to_owned()),
        _ => Err("a URL that begins with http:// or https://".to_owned()),
    }
}

/// A URL as reports show it: whoever is reached by it, and not what its user name, path or query may hold as a key.
pub(super) fn shown_url(url: impl AsRef<str>) -> String {
    let url = url.as_ref();
    let (scheme, rest) = url.split_once("://").map_or(("", url), |(scheme, rest)| (&url[..scheme.len() + 3], rest));
    // Whatever stands before the last @: a password may hold a slash.
    let (user, rest) = rest.rsplit_once('@').map_or((String::new(), rest), |(_, rest)| (format!("{REDACTED}@"), rest));
    let (host, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let is_url = !scheme.is_empty() || !user.is_empty();
    let path = if is_url && path.len() > 1 { format!("/{REDACTED}") } else { path.to_owned() };
    format!("{scheme}{user}{host}{path}")
}

/// ASCII text that fits a field of the commitment on chain.
pub(super) fn committed(most: usize) -> impl Fn(&str) -> Result<String, Expected> {
    move |text| {
        if text.is_ascii() && text.len() <= most {
            Ok(text.to_owned())
        } else {
            Err(format!("at most {most} ASCII characters, which is what fits on chain"))
        }
    }
}

fn expand_home(text: &str, home: Option<&Path>) -> Result<PathBuf, Expected> {
    let rest = match text.strip_prefix('~') {
        None => return Ok(PathBuf::from(text)),
        Some(rest) if rest.is_empty() || rest.starts_with('/') => rest.trim_start_matches('/'),
        Some(_) => return Err("a path, or ~ for the home folder of this user".to_owned()),
    };
    let home = home.ok_or_else(|| "HOME to be set for ~".to_owned())?;
    Ok(if rest.is_empty() { home.to_path_buf() } else { home.join(rest) })
}

/// Shows a value by its `Display`.
pub(super) fn plainly<T: Display>(value: &T) -> String {
    value.to_string()
}
