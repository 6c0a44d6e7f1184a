//! Filters that replace the engine's own.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use super::json::{Indent, JsonStyle};
use crate::python;

/// `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`: `json.dumps`, with no escapes for HTML.
pub fn tojson(value: &Value, positional: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    const NAMES: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];
    if positional.len() > NAMES.len() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let mut options = [const { Value::UNDEFINED }; NAMES.len()];
    for (index, name) in NAMES.into_iter().enumerate() {
        let by_name: Option<Value> = named.get(name)?;
        options[index] = match (positional.get(index), by_name) {
            (Some(_), Some(_)) => {
                return Err(Error::new(ErrorKind::TooManyArguments, format!("tojson got `{name}` twice")));
            }
            (Some(value), None) => value.clone(),
            (None, by_name) => by_name.unwrap_or_default(),
        };
    }
    named.assert_all_used()?;
    let [ensure_ascii, indent, separators, sort_keys] = options;
    let indent = indent_of(&indent)?;
    let (item_separator, key_separator) = match separators_of(&separators)? {
        Some(pair) => pair,
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let style = JsonStyle {
        ensure_ascii: ensure_ascii.is_true(),
        sort_keys: sort_keys.is_true(),
        indent,
        item_separator,
        key_separator,
    };
    Ok(Value::from(style.dump(value)?))
}

fn indent_of(value: &Value) -> Result<Option<Indent>, Error> {
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => Ok(None),
        ValueKind::Bool => Ok(Some(Indent::spaces(u64::from(value.is_true()))?)),
        ValueKind::Number => {
            Ok(Some(Indent::spaces(u64::try_from(i64::try_from(value.clone())?.max(0)).unwrap_or(0))?))
        }
        ValueKind::String => Ok(Some(Indent::text(value.as_str().unwrap_or_default())?)),
        other => {
            Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: indent is {other}, not a number or text")))
        }
    }
}

fn separators_of(value: &Value) -> Result<Option<(String, String)>, Error> {
    if value.is_undefined() || value.is_none() {
        return Ok(None);
    }
    let bad = || Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two texts");
    let mut texts = value.try_iter().map_err(|_| bad())?.checked();
    let mut next = || -> Result<String, Error> {
        texts.next().transpose()?.as_ref().and_then(Value::as_str).map(str::to_owned).ok_or_else(bad)
    };
    let pair = (next()?, next()?);
    if texts.next().is_some() { Err(bad()) } else { Ok(Some(pair)) }
}

/// `trim(value, chars=None)`: `str.strip`, whose white space is Python's.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands filters their arguments as owned values")]
pub fn trim(value: String, chars: Option<String>) -> String {
    match chars {
        None => python::strip(&value).to_owned(),
        Some(chars) => value.trim_matches(|c| chars.contains(c)).to_owned(),
    }
}
