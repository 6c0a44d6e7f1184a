//! Methods of Python's `str`, `dict` and `list` that templates call.
//!
//! Those whose result depends on what Python counts as white space or as a line, and those that
//! `minijinja_contrib::pycompat` lacks, are here; the rest is its work.

use minijinja::value::{Kwargs, Tuple, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use crate::python;

/// Calls `method` of `value`, which the engine does not know.
pub fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = text_method(text, method, args)
    {
        return result;
    }
    pycompat::unknown_method_callback(state, value, method, args)
}

fn text_method(text: &str, method: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let result = match method {
        "strip" => stripped(text, args, true, true),
        "lstrip" => stripped(text, args, true, false),
        "rstrip" => stripped(text, args, false, true),
        "split" => split_arguments(args).and_then(|(separator, limit)| split(text, separator.as_deref(), limit)),
        "rsplit" => split_arguments(args).and_then(|(separator, limit)| rsplit(text, separator.as_deref(), limit)),
        "splitlines" => lines(text, args),
        "removeprefix" => from_args(args).map(|(prefix,): (&str,)| text.strip_prefix(prefix).unwrap_or(text).into()),
        "removesuffix" => from_args(args).map(|(suffix,): (&str,)| text.strip_suffix(suffix).unwrap_or(text).into()),
        "partition" => partition(text, args, str::split_once, [true, false, false]),
        "rpartition" => partition(text, args, str::rsplit_once, [false, false, true]),
        "isspace" => from_args(args).map(|()| (!text.is_empty() && text.chars().all(python::is_whitespace)).into()),
        _ => return None,
    };
    Some(result)
}

fn stripped(text: &str, args: &[Value], left: bool, right: bool) -> Result<Value, Error> {
    let (chars,): (Option<&str>,) = from_args(args)?;
    let drop = |c: char| chars.map_or_else(|| python::is_whitespace(c), |chars| chars.contains(c));
    let text = if left { text.trim_start_matches(drop) } else { text };
    let text = if right { text.trim_end_matches(drop) } else { text };
    Ok(text.into())
}

/// Separator and greatest number of cuts, by place or by name.
fn split_arguments(args: &[Value]) -> Result<(Option<String>, Option<usize>), Error> {
    let (separator, limit, named): (Option<String>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = separator.or(named.get("sep")?);
    let limit = limit.or(named.get("maxsplit")?);
    named.assert_all_used()?;
    if separator.as_deref() == Some("") {
        return Err(Error::new(ErrorKind::InvalidOperation, "split: empty separator"));
    }
    Ok((separator, limit.and_then(|limit| usize::try_from(limit).ok())))
}

fn split(text: &str, separator: Option<&str>, limit: Option<usize>) -> Result<Value, Error> {
    let cuts = limit.unwrap_or(usize::MAX);
    let Some(separator) = separator else { return Ok(list(split_blanks(text, cuts))) };
    Ok(list(text.splitn(cuts.saturating_add(1), separator).collect()))
}

fn rsplit(text: &str, separator: Option<&str>, limit: Option<usize>) -> Result<Value, Error> {
    let cuts = limit.unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = match separator {
        Some(separator) => text.rsplitn(cuts.saturating_add(1), separator).collect(),
        None => rsplit_blanks(text, cuts),
    };
    parts.reverse();
    Ok(list(parts))
}

/// Words between runs of white space; after `cuts` of them the rest stays whole.
fn split_blanks(text: &str, cuts: usize) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text.trim_start_matches(python::is_whitespace);
    while !rest.is_empty() {
        let end = if words.len() == cuts { None } else { rest.find(python::is_whitespace) };
        let (word, after) = rest.split_at(end.unwrap_or(rest.len()));
        words.push(word);
        rest = after.trim_start_matches(python::is_whitespace);
    }
    words
}

/// As [`split_blanks`], from the end: the last word first.
fn rsplit_blanks(text: &str, cuts: usize) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text.trim_end_matches(python::is_whitespace);
    while !rest.is_empty() {
        let blank =
            if words.len() == cuts { None } else { rest.char_indices().rfind(|(_, c)| python::is_whitespace(*c)) };
        let (before, word) = rest.split_at(blank.map_or(0, |(at, c)| at + c.len_utf8()));
        words.push(word);
        rest = before.trim_end_matches(python::is_whitespace);
    }
    words
}

fn lines(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (keep_ends, named): (Option<bool>, Kwargs) = from_args(args)?;
    let keep_ends = keep_ends.or(named.get("keepends")?).unwrap_or(false);
    named.assert_all_used()?;
    Ok(list(python::split_lines(text, keep_ends)))
}

/// `cut` at the separator; without it the whole text stands where `whole_at` is true.
fn partition<'a>(
    text: &'a str,
    args: &'a [Value],
    cut: fn(&'a str, &'a str) -> Option<(&'a str, &'a str)>,
    whole_at: [bool; 3],
) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(args)?;
    if separator.is_empty() {
        return Err(Error::new(ErrorKind::InvalidOperation, "partition: empty separator"));
    }
    let parts = cut(text, separator).map_or_else(
        || whole_at.map(|whole| if whole { text } else { "" }),
        |(before, after)| [before, separator, after],
    );
    Ok(Value::from_object(Tuple::from(parts.map(Value::from))))
}

fn list(parts: Vec<&str>) -> Value {
    parts.into_iter().collect()
}
