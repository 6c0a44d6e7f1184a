//! `json.dumps` with `ensure_ascii`.

use std::fmt::Write as _;

use super::number::{push_float, push_signed};
use super::text::push_quoted;
use super::{Object, Text, Value};

/// How `json.dumps` was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// No arguments: `", "` and `": "`, members in order of insertion.
    Default,
    /// `sort_keys=True`.
    Sorted,
    /// `separators=(",", ":")`.
    Compact,
    /// `sort_keys=True, separators=(",", ":")`: what the protocol hashes.
    CompactSorted,
}

impl Style {
    const fn between_items(self) -> &'static str {
        match self {
            Self::Default | Self::Sorted => ", ",
            Self::Compact | Self::CompactSorted => ",",
        }
    }

    const fn after_key(self) -> &'static str {
        match self {
            Self::Default | Self::Sorted => ": ",
            Self::Compact | Self::CompactSorted => ":",
        }
    }

    const fn sorts_keys(self) -> bool {
        matches!(self, Self::Sorted | Self::CompactSorted)
    }
}

impl Value {
    /// The JSON text, ASCII only. The stack grows with the nesting of the value, which [`super::parse()`] bounds.
    #[must_use]
    pub fn to_json(&self, style: Style) -> String {
        let mut out = String::new();
        self.push_json(&mut out, style);
        out
    }

    /// Appends the JSON text to `out`.
    pub fn push_json(&self, out: &mut String, style: Style) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(true) => out.push_str("true"),
            Self::Bool(false) => out.push_str("false"),
            Self::Int(integer) => push_signed(out, *integer),
            Self::BigInt(integer) => write!(out, "{integer}").expect("writing to a String cannot fail"),
            Self::Float(float) => push_float(out, *float),
            Self::String(text) => push_quoted(out, text.code_points()),
            Self::Array(elements) => {
                out.push('[');
                for (index, element) in elements.iter().enumerate() {
                    if index > 0 {
                        out.push_str(style.between_items());
                    }
                    element.push_json(out, style);
                }
                out.push(']');
            }
            Self::Object(object) => push_object(out, object, style),
        }
    }
}

fn push_object(out: &mut String, object: &Object, style: Style) {
    let mut members: Vec<(&Text, &Value)> = object.iter().collect();
    if style.sorts_keys() {
        members.sort_by_key(|(key, _)| *key);
    }
    out.push('{');
    for (index, (key, value)) in members.into_iter().enumerate() {
        if index > 0 {
            out.push_str(style.between_items());
        }
        push_quoted(out, key.code_points());
        out.push_str(style.after_key());
        value.push_json(out, style);
    }
    out.push('}');
}
