//! The `commitments` column: JSON text, almost always `[{"sketch": 12}, …]`.

use crate::binding::parse_commitments;
use crate::json::{self, Value};

/// What the `commitments` text parses to. A file of 5,000 rollouts holds 5 million commitments, so the usual list is kept as
/// numbers; any other value is kept as it is, because any JSON that parses to the same list is equivalent.
#[derive(Debug, Clone, PartialEq)]
pub enum Commitments {
    /// A list of objects with the one key `sketch`, each a non-negative integer below 2^32. Whether it is below `PRIME_Q`
    /// too is for the checks to say.
    Sketches(Vec<u32>),
    /// Any other value; null stands for a null cell.
    Other(Value),
}

impl Commitments {
    /// Reads the text of one cell.
    ///
    /// # Errors
    /// [`json::ParseError`] if the text is no JSON by the rules of Python's `json.loads`.
    pub fn parse(text: &str) -> Result<Self, json::ParseError> {
        match parse_commitments(text) {
            Some(sketches) => Ok(Self::Sketches(sketches)),
            None => json::parse(text).map(Self::from),
        }
    }

    /// Number of commitments, `None` if the value is no list.
    #[must_use]
    pub fn len(&self) -> Option<usize> {
        match self {
            Self::Sketches(sketches) => Some(sketches.len()),
            Self::Other(value) => value.as_array().map(<[Value]>::len),
        }
    }

    /// Whether the value is an empty list.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// The sketches of the usual form.
    #[must_use]
    pub fn sketches(&self) -> Option<&[u32]> {
        match self {
            Self::Sketches(sketches) => Some(sketches),
            Self::Other(_) => None,
        }
    }
}

impl From<Value> for Commitments {
    fn from(value: Value) -> Self {
        let usual = |commitment: &Value| {
            let object = commitment.as_object().filter(|object| object.len() == 1)?;
            u32::try_from(object.get("sketch")?.as_i64()?).ok()
        };
        match value.as_array().map(|items| items.iter().map(usual).collect()) {
            Some(Some(sketches)) => Self::Sketches(sketches),
            _ => Self::Other(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_the_usual_form_is_kept_as_numbers() {
        for text in [
            "[{\"sketch\": 1}, {\"sketch\": 20}]",
            "[{\"sketch\":1},{\"sketch\":20}]",
            " [ { \"sketch\" :\t1 }\n,\r{\"s\\u006betch\": 9, \"sketch\": 20 } ] ",
        ] {
            assert_eq!(Commitments::parse(text).unwrap(), Commitments::Sketches(vec![1, 20]), "{text:?}");
        }
        assert_eq!(Commitments::parse("[]").unwrap(), Commitments::Sketches(Vec::new()));
    }

    #[test]
    fn anything_else_is_kept_as_it_is() {
        for text in [
            "[{\"sketch\": -1}]",
            "[{\"sketch\": 1.0}]",
            "[{\"sketch\": true}]",
            "[{\"sketch\": 4294967296}]",
            "[{\"sketch\": 99999999999999999999}]",
            "[{\"sketch\": 1, \"x\": 2}]",
            "[{\"sketch\": 1}, []]",
            "{}",
            "null",
        ] {
            assert_eq!(Commitments::parse(text).unwrap(), Commitments::Other(json::parse(text).unwrap()), "{text:?}");
        }
        assert_eq!(Commitments::parse("[1, 2, {}]").unwrap().len(), Some(3));
        assert_eq!(Commitments::parse("{}").unwrap().len(), None);
    }

    #[test]
    fn no_json_is_an_error() {
        for text in ["", "[", "[{\"sketch\": 01}]", "[{\"sketch\": 1}] x", "[{\"sketch\": 1},]", "[{sketch: 1}]"] {
            assert!(Commitments::parse(text).is_err(), "{text:?}");
        }
    }
}
