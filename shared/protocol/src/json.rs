//! JSON as CPython's `json` module reads and writes it.
//!
//! Hashes of the protocol are taken over text that Python made, so equality must hold byte for byte: integers without
//! bound, floats by `repr`, `NaN` and `Infinity`, lone surrogates, last duplicate key wins, keys sorted by code point.
//! `serde_json` differs in each of these.

mod number;
mod parse;
#[cfg(test)]
mod tests;
mod text;
mod write;

use std::collections::HashMap;

use num_bigint::BigInt;

pub use number::{push_decimal, push_float, push_signed};
pub use parse::{MAX_DEPTH, MAX_INTEGER_DIGITS, ParseError, ParseErrorKind, parse};
pub use text::{Text, push_escaped};
pub use write::Style;

/// Any value that `json.loads` can return.
///
/// Equality is by variant and content; two NaN are never equal. Integers that fit 64 bits are always [`Value::Int`], so build
/// large ones through [`Value::from`].
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `None`.
    Null,
    /// `True` or `False`.
    Bool(bool),
    /// An `int` within 64 bits.
    Int(i64),
    /// An `int` outside 64 bits.
    BigInt(BigInt),
    /// A `float`, infinities and NaN included.
    Float(f64),
    /// A `str`, lone surrogates included.
    String(Text),
    /// A `list`.
    Array(Vec<Value>),
    /// A `dict`.
    Object(Object),
}

impl Value {
    /// The member `key` of an object; `None` for a missing key and for any other value.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.as_object().and_then(|object| object.get(key))
    }

    /// The object, if it is one.
    #[must_use]
    pub const fn as_object(&self) -> Option<&Object> {
        if let Self::Object(object) = self { Some(object) } else { None }
    }

    /// The elements, if it is an array.
    #[must_use]
    pub fn as_array(&self) -> Option<&[Value]> {
        if let Self::Array(elements) = self { Some(elements) } else { None }
    }

    /// The string, if it is one without lone surrogates.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(text) = self { text.as_str() } else { None }
    }

    /// The integer, if it is one within 64 bits. A bool is none here, although Python counts it as one.
    #[must_use]
    pub const fn as_i64(&self) -> Option<i64> {
        if let Self::Int(integer) = self { Some(*integer) } else { None }
    }

    /// The integer of any size, if it is one. A bool is none here.
    #[must_use]
    pub fn to_bigint(&self) -> Option<BigInt> {
        match self {
            Self::Int(integer) => Some(BigInt::from(*integer)),
            Self::BigInt(integer) => Some(integer.clone()),
            _ => None,
        }
    }

    /// The float, if it is one. An integer is none here.
    #[must_use]
    pub const fn as_f64(&self) -> Option<f64> {
        if let Self::Float(float) = self { Some(*float) } else { None }
    }

    /// The bool, if it is one.
    #[must_use]
    pub const fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(truth) = self { Some(*truth) } else { None }
    }

    /// True for `None`.
    #[must_use]
    pub const fn is_null(&self) -> bool {
        matches!(self, Self::Null)
    }
}

impl From<bool> for Value {
    fn from(truth: bool) -> Self {
        Self::Bool(truth)
    }
}

impl From<i64> for Value {
    fn from(integer: i64) -> Self {
        Self::Int(integer)
    }
}

impl From<i32> for Value {
    fn from(integer: i32) -> Self {
        Self::Int(integer.into())
    }
}

impl From<u32> for Value {
    fn from(integer: u32) -> Self {
        Self::Int(integer.into())
    }
}

impl From<BigInt> for Value {
    fn from(integer: BigInt) -> Self {
        i64::try_from(integer).map_or_else(|too_large| Self::BigInt(too_large.into_original()), Self::Int)
    }
}

impl From<f64> for Value {
    fn from(float: f64) -> Self {
        Self::Float(float)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::String(text.into())
    }
}

impl From<Text> for Value {
    fn from(text: Text) -> Self {
        Self::String(text)
    }
}

impl From<Vec<Value>> for Value {
    fn from(elements: Vec<Value>) -> Self {
        Self::Array(elements)
    }
}

impl From<Object> for Value {
    fn from(object: Object) -> Self {
        Self::Object(object)
    }
}

/// A `dict` with text keys: insertion order is kept, keys are unique.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Object {
    members: Vec<(Text, Value)>,
}

/// Up to this many members a linear search beats a hash table.
const LINEAR_SEARCH_LIMIT: usize = 16;

impl Object {
    /// Builds an object as Python builds a `dict` from pairs: a repeated key keeps its first place and its last value.
    #[must_use]
    pub fn from_pairs(pairs: Vec<(Text, Value)>) -> Self {
        if pairs.len() <= LINEAR_SEARCH_LIMIT {
            let mut object = Self { members: Vec::with_capacity(pairs.len()) };
            for (key, value) in pairs {
                object.insert(key, value);
            }
            return object;
        }
        let mut members: Vec<(Text, Value)> = Vec::with_capacity(pairs.len());
        let mut places: HashMap<Text, usize> = HashMap::with_capacity(pairs.len());
        for (key, value) in pairs {
            if let Some(&place) = places.get(&key) {
                members[place].1 = value;
            } else {
                places.insert(key.clone(), members.len());
                members.push((key, value));
            }
        }
        Self { members }
    }

    /// Sets one member; a key that exists keeps its place.
    pub fn insert(&mut self, key: impl Into<Text>, value: impl Into<Value>) {
        let (key, value) = (key.into(), value.into());
        match self.members.iter_mut().find(|(existing, _)| *existing == key) {
            Some((_, existing)) => *existing = value,
            None => self.members.push((key, value)),
        }
    }

    /// The value of `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.members.iter().find(|(existing, _)| existing.as_bytes() == key.as_bytes()).map(|(_, value)| value)
    }

    /// All members in order of insertion.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&Text, &Value)> + Clone {
        self.members.iter().map(|(key, value)| (key, value))
    }

    /// Number of members.
    #[must_use]
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// True without members.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }
}
