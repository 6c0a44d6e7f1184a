//! `json.dumps` over template values.

use std::fmt::Write as _;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

use crate::python;

/// Deepest nesting; CPython gives up near 1,000, and the stack of a thread is finite.
const MAX_DEPTH: usize = 200;
/// Widest indent of one level.
const MAX_INDENT: usize = 256;

/// White space of one level.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Indent(String);

impl Indent {
    pub fn spaces(count: u64) -> Result<Self, Error> {
        let count = usize::try_from(count).ok().filter(|count| *count <= MAX_INDENT);
        count.map(|count| Self(" ".repeat(count))).ok_or_else(too_wide)
    }

    pub fn text(text: &str) -> Result<Self, Error> {
        if text.len() <= MAX_INDENT { Ok(Self(text.to_owned())) } else { Err(too_wide()) }
    }
}

fn too_wide() -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: an indent of more than {MAX_INDENT} is refused"))
}

/// Arguments of `json.dumps`.
#[derive(Clone, Debug)]
pub struct JsonStyle {
    pub ensure_ascii: bool,
    pub sort_keys: bool,
    pub indent: Option<Indent>,
    pub item_separator: String,
    pub key_separator: String,
}

impl JsonStyle {
    /// Text of `value`.
    pub fn dump(&self, value: &Value) -> Result<String, Error> {
        let mut out = String::new();
        self.write(&mut out, value, 0)?;
        Ok(out)
    }

    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: nested deeper than {MAX_DEPTH}")));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)?),
            ValueKind::String => self.write_text(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.write_list(out, value, depth)?,
            ValueKind::Map => self.write_object(out, value, depth)?,
            other => return Err(not_serializable(&other.to_string())),
        }
        Ok(())
    }

    fn write_list(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        let mut empty = true;
        out.push('[');
        for item in value.try_iter()?.checked() {
            self.start_item(out, empty, depth + 1);
            empty = false;
            self.write(out, &item?, depth + 1)?;
        }
        self.finish(out, empty, depth);
        out.push(']');
        Ok(())
    }

    fn write_object(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        let mut keys = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
        if self.sort_keys {
            keys.sort();
        }
        out.push('{');
        for (index, key) in keys.iter().enumerate() {
            self.start_item(out, index == 0, depth + 1);
            self.write_text(out, &key_text(key)?);
            out.push_str(&self.key_separator);
            self.write(out, &value.get_item(key)?, depth + 1)?;
        }
        self.finish(out, keys.is_empty(), depth);
        out.push('}');
        Ok(())
    }

    fn start_item(&self, out: &mut String, first: bool, depth: usize) {
        if !first {
            out.push_str(&self.item_separator);
        }
        self.new_line(out, depth);
    }

    fn finish(&self, out: &mut String, empty: bool, depth: usize) {
        if !empty {
            self.new_line(out, depth);
        }
    }

    fn new_line(&self, out: &mut String, depth: usize) {
        if let Some(Indent(level)) = &self.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(level));
        }
    }

    fn write_text(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(out, "\\u{unit:04x}").expect("writing to a String never fails");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    let number = f64::try_from(value.clone())?;
    Ok(if number.is_nan() {
        "NaN".to_owned()
    } else if number.is_infinite() {
        if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned()
    } else {
        python::float_repr(number)
    })
}

fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => number(key),
        other => Err(not_serializable(&format!("a key of kind {other}"))),
    }
}

fn not_serializable(what: &str) -> Error {
    Error::new(ErrorKind::BadSerialization, format!("tojson: {what} has no JSON form"))
}
