//! Commitments as text, and the digest that the commit signature signs (protocol §7).

use sha2::{Digest as _, Sha256};

use crate::constants::LAYER_INDEX;
use crate::hash::{Digest, sha256};
use crate::json::push_decimal;

/// Domain of the commit binding; it stands first and carries no length.
pub const COMMIT_DOMAIN: &[u8] = b"grail-commit-v1";

const OPEN_COMPACT: &str = "{\"sketch\":";
const OPEN_SPACED: &str = "{\"sketch\": ";
/// Bytes of one element with a ten-digit sketch and its separator, in the longer form.
const ELEMENT_BYTES: usize = OPEN_SPACED.len() + 10 + 3;

/// The commitments with `","` and `":"`, whose SHA-256 is bound by the signature: `[{"sketch":12},{"sketch":7}]`.
#[must_use]
pub fn compact_commitments(sketches: &[u32]) -> String {
    commitments_text(sketches, OPEN_COMPACT, ",")
}

/// The commitments with `", "` and `": "`, as the window file holds them: `[{"sketch": 12}, {"sketch": 7}]`.
#[must_use]
pub fn spaced_commitments(sketches: &[u32]) -> String {
    commitments_text(sketches, OPEN_SPACED, ", ")
}

/// Appends [`spaced_commitments`] to `text`, as the column of many rows is built.
pub fn push_spaced_commitments(text: &mut String, sketches: &[u32]) {
    text.push('[');
    push_elements(text, sketches, OPEN_SPACED, ", ");
    text.push(']');
}

fn commitments_text(sketches: &[u32], open: &str, separator: &str) -> String {
    let mut text = String::with_capacity(sketches.len() * ELEMENT_BYTES + 2);
    text.push('[');
    push_elements(&mut text, sketches, open, separator);
    text.push(']');
    text
}

fn push_elements(text: &mut String, sketches: &[u32], open: &str, separator: &str) {
    for (index, sketch) in sketches.iter().enumerate() {
        if index > 0 {
            text.push_str(separator);
        }
        text.push_str(open);
        push_decimal(text, (*sketch).into());
        text.push('}');
    }
}

/// SHA-256 of [`compact_commitments`], without holding the whole text.
#[must_use]
pub fn commitments_hash(sketches: &[u32]) -> Digest {
    /// Elements of one update: the text stays in the nearest cache.
    const CHUNK: usize = 256;
    let mut hash = Sha256::new();
    let mut text = String::with_capacity(CHUNK * ELEMENT_BYTES + 2);
    text.push('[');
    for (index, chunk) in sketches.chunks(CHUNK).enumerate() {
        if index > 0 {
            text.push(',');
        }
        push_elements(&mut text, chunk, OPEN_COMPACT, ",");
        hash.update(text.as_bytes());
        text.clear();
    }
    text.push(']');
    hash.update(text.as_bytes());
    hash.finalize().into()
}

/// The sketches of a commitments text that is exactly what [`compact_commitments`] or [`spaced_commitments`] writes for them.
///
/// `None` for every other text, valid JSON included: such a text needs [`crate::json::parse()`]. Reading a file takes a tenth of
/// the time this way.
#[must_use]
pub fn parse_commitments(text: &str) -> Option<Vec<u32>> {
    let elements = text.strip_prefix('[')?.strip_suffix(']')?;
    if elements.is_empty() {
        return Some(Vec::new());
    }
    let (open, separator) = if elements.starts_with(OPEN_SPACED) { (OPEN_SPACED, ", ") } else { (OPEN_COMPACT, ",") };
    let mut sketches = Vec::with_capacity(elements.len() / (OPEN_COMPACT.len() + 2));
    let mut rest = elements.as_bytes();
    loop {
        rest = rest.strip_prefix(open.as_bytes())?;
        let digits = rest.iter().take(11).take_while(|byte| byte.is_ascii_digit()).count();
        if digits == 0 || digits > 10 || (digits > 1 && rest[0] == b'0') {
            return None;
        }
        let sketch = rest[..digits].iter().fold(0_u64, |number, digit| number * 10 + u64::from(digit - b'0'));
        sketches.push(u32::try_from(sketch).ok()?);
        rest = rest[digits..].strip_prefix(b"}")?;
        if rest.is_empty() {
            return Some(sketches);
        }
        rest = rest.strip_prefix(separator.as_bytes())?;
    }
}

/// What one commit signature binds.
#[derive(Clone, Copy, Debug)]
pub struct CommitBinding<'a> {
    /// [`crate::hash::token_hash`] of the whole sequence.
    pub token_hash: &'a Digest,
    /// `commit.beacon.randomness` after the hex clean-up.
    pub randomness: &'a [u8],
    /// `commit.model.name`; a missing name counts as empty.
    pub model_name: &'a str,
    /// `commit.model.layer_index`; [`LAYER_INDEX`] in every valid commit.
    pub layer_index: i32,
    /// SHA-256 of the compact commitments, keys sorted.
    pub commitments_hash: &'a Digest,
}

impl<'a> CommitBinding<'a> {
    /// The binding of a commit of this miner.
    #[must_use]
    pub const fn new(
        token_hash: &'a Digest,
        randomness: &'a [u8],
        model_name: &'a str,
        commitments_hash: &'a Digest,
    ) -> Self {
        Self { token_hash, randomness, model_name, layer_index: LAYER_INDEX, commitments_hash }
    }

    /// The bytes that are hashed: the domain, then every part behind its length.
    #[must_use]
    pub fn preimage(&self) -> Vec<u8> {
        let mut bytes = COMMIT_DOMAIN.to_vec();
        push_with_length(&mut bytes, self.token_hash);
        push_with_length(&mut bytes, self.randomness);
        push_with_length(&mut bytes, self.model_name.as_bytes());
        push_with_length(&mut bytes, &self.layer_index.to_be_bytes());
        push_with_length(&mut bytes, self.commitments_hash);
        bytes
    }

    /// The 32 bytes that the hotkey signs.
    #[must_use]
    pub fn digest(&self) -> Digest {
        sha256(&self.preimage())
    }
}

/// Appends the length as four big-endian bytes, then the part.
fn push_with_length(bytes: &mut Vec<u8>, part: &[u8]) {
    let length = u32::try_from(part.len()).expect("a part of a commit is far below 4 GiB");
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(part);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::json::{Object, Style, Value, parse};

    fn as_value(sketches: &[u32]) -> Value {
        let commitment = |sketch: &u32| {
            let mut object = Object::default();
            object.insert("sketch", *sketch);
            Value::Object(object)
        };
        Value::Array(sketches.iter().map(commitment).collect())
    }

    #[test]
    fn only_the_two_written_forms_take_the_fast_path() {
        for text in [
            "",
            "[",
            "[ ]",
            "[{\"sketch\":1}, {\"sketch\":2}]",
            "[{\"sketch\": 1},{\"sketch\": 2}]",
            "[{\"sketch\":01}]",
            "[{\"sketch\":-1}]",
            "[{\"sketch\":1.0}]",
            "[{\"sketch\":4294967296}]",
            "[{\"sketch\":99999999999}]",
            "[{\"sketch\":}]",
            "[{\"sketch\":1},]",
            "[{\"sketch\":1}]]",
            "[{\"other\":1}]",
        ] {
            assert_eq!(parse_commitments(text), None, "{text}");
        }
        assert_eq!(parse_commitments("[{\"sketch\":4294967295}]"), Some(vec![u32::MAX]));
    }

    proptest! {
        #[test]
        fn both_texts_equal_the_general_writer_and_read_back(sketches in proptest::collection::vec(any::<u32>(), 0..600)) {
            let (compact, spaced) = (compact_commitments(&sketches), spaced_commitments(&sketches));
            let value = as_value(&sketches);
            prop_assert_eq!(&compact, &value.to_json(Style::CompactSorted));
            prop_assert_eq!(&spaced, &value.to_json(Style::Default));
            prop_assert_eq!(parse(&spaced).unwrap(), value);
            prop_assert_eq!(commitments_hash(&sketches), sha256(compact.as_bytes()));
            prop_assert_eq!(parse_commitments(&compact), Some(sketches.clone()));
            prop_assert_eq!(parse_commitments(&spaced), Some(sketches));
        }

        #[test]
        fn lengths_make_the_preimage_injective(
            left in ("[a-z]{0,6}", proptest::collection::vec(any::<u8>(), 0..6)),
            right in ("[a-z]{0,6}", proptest::collection::vec(any::<u8>(), 0..6)),
        ) {
            let digest = [7; 32];
            let preimage = |(name, randomness): &(String, Vec<u8>)| {
                CommitBinding::new(&digest, randomness, name, &digest).preimage()
            };
            prop_assert_eq!(left == right, preimage(&left) == preimage(&right));
        }

        #[test]
        fn a_list_of_parts_can_be_read_back(
            parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..9), 0..6)
        ) {
            let mut bytes = Vec::new();
            for part in &parts {
                push_with_length(&mut bytes, part);
            }
            let mut read = Vec::new();
            let mut rest = bytes.as_slice();
            while let Some((length, after)) = rest.split_first_chunk::<4>() {
                let (part, after) = after.split_at(u32::from_be_bytes(*length) as usize);
                read.push(part.to_vec());
                rest = after;
            }
            prop_assert_eq!(read, parts);
        }
    }
}
