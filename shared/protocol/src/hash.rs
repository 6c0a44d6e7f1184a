//! Digests of token sequences (protocol §7, §9 of the validator's rules).

use sha2::{Digest as _, Sha256};

use crate::ids::TokenId;
use crate::json::{push_decimal, push_signed};

/// A SHA-256 digest.
pub type Digest = [u8; 32];

/// Bytes of token ids that go to the hash function at a time.
const CHUNK_TOKENS: usize = 256;

/// SHA-256 of `bytes`.
#[must_use]
pub fn sha256(bytes: &[u8]) -> Digest {
    Sha256::digest(bytes).into()
}

/// `hash_tokens`: SHA-256 over every id as four big-endian bytes.
#[must_use]
pub fn token_hash(tokens: &[TokenId]) -> Digest {
    token_hash_of(tokens.iter().map(|token| token.0))
}

/// [`token_hash`] of any source of ids. A foreign file may hold negative or wider numbers: the protocol takes
/// their lowest 32 bits, see [`wrap_token`].
#[must_use]
pub fn token_hash_of(tokens: impl IntoIterator<Item = u32>) -> Digest {
    let mut hash = Sha256::new();
    let mut chunk = [0_u8; CHUNK_TOKENS * 4];
    let mut filled = 0;
    for token in tokens {
        chunk[filled..filled + 4].copy_from_slice(&token.to_be_bytes());
        filled += 4;
        if filled == chunk.len() {
            hash.update(chunk);
            filled = 0;
        }
    }
    hash.update(&chunk[..filled]);
    hash.finalize().into()
}

/// The lowest 32 bits of an id, as `id & 0xFFFFFFFF`.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the lowest 32 bits are wanted")]
pub const fn wrap_token(id: i64) -> u32 {
    id as u32
}

/// The digest by which completions count as equal: SHA-256 of the compact JSON list of the ids after the prompt.
///
/// `None` for an empty sequence; a `prompt_length` at or beyond the end gives the digest of `[]`.
#[must_use]
pub fn completion_digest(tokens: &[TokenId], prompt_length: usize) -> Option<Digest> {
    if tokens.is_empty() {
        return None;
    }
    let completion = tokens.get(prompt_length..).unwrap_or_default();
    Some(sha256_of_list(completion, |out, token| push_decimal(out, token.0.into())))
}

/// [`completion_digest`] of ids and a prompt length as a foreign file may hold them: a missing prompt length counts as 0, a
/// negative one counts from the end, as a Python slice does.
#[must_use]
pub fn completion_digest_of_ints(tokens: &[i64], prompt_length: Option<i64>) -> Option<Digest> {
    if tokens.is_empty() {
        return None;
    }
    let prompt_length = prompt_length.unwrap_or(0);
    let skipped = usize::try_from(prompt_length.unsigned_abs()).unwrap_or(usize::MAX);
    let start = if prompt_length < 0 { tokens.len().saturating_sub(skipped) } else { skipped };
    let completion = tokens.get(start..).unwrap_or_default();
    Some(sha256_of_list(completion, |out, token| push_signed(out, *token)))
}

fn sha256_of_list<T>(elements: &[T], push: impl Fn(&mut String, &T)) -> Digest {
    let mut text = String::with_capacity(elements.len() * 7 + 2);
    text.push('[');
    for (index, element) in elements.iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        push(&mut text, element);
    }
    text.push(']');
    sha256(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_do_not_show_in_the_token_hash() {
        for len in [0, 1, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS + 5] {
            let tokens: Vec<TokenId> = (0..len).map(|id| TokenId(u32::try_from(id * 7_919).unwrap())).collect();
            let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.0.to_be_bytes()).collect();
            assert_eq!(token_hash(&tokens), sha256(&bytes), "{len}");
        }
    }

    #[test]
    fn a_negative_prompt_length_counts_from_the_end() {
        let last_two = completion_digest_of_ints(&[2, 3], Some(0));
        assert_eq!(completion_digest_of_ints(&[1, 2, 3], Some(-2)), last_two);
        assert_eq!(completion_digest_of_ints(&[2, 3], Some(-9)), last_two);
        assert_eq!(completion_digest_of_ints(&[2, 3], Some(i64::MAX)), Some(sha256(b"[]")));
        assert_eq!(completion_digest_of_ints(&[-1], None), Some(sha256(b"[-1]")));
    }
}
