//! Arrays as raw little-endian bytes.

use grail_protocol::ids::TokenId;

/// Bytes that are no whole number of elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{length_bytes} bytes are no whole number of 4-byte elements")]
pub struct BulkError {
    pub length_bytes: usize,
}

/// `u32` little-endian, one after the other.
#[must_use]
pub fn u32_to_bytes(values: &[u32]) -> Vec<u8> {
    words_to_bytes(values.iter().map(|value| value.to_le_bytes()))
}

/// Ids as `u32` little-endian.
#[must_use]
pub fn tokens_to_bytes(tokens: &[TokenId]) -> Vec<u8> {
    words_to_bytes(tokens.iter().map(|token| token.0.to_le_bytes()))
}

/// Bit patterns of `f32`, little-endian.
#[must_use]
pub fn f32_to_bytes(values: &[f32]) -> Vec<u8> {
    words_to_bytes(values.iter().map(|value| value.to_le_bytes()))
}

/// The reverse of [`u32_to_bytes`].
///
/// # Errors
/// [`BulkError`] unless the length is a multiple of 4.
pub fn u32_from_bytes(bytes: &[u8]) -> Result<Vec<u32>, BulkError> {
    Ok(words(bytes)?.iter().map(|word| u32::from_le_bytes(*word)).collect())
}

/// The reverse of [`tokens_to_bytes`].
///
/// # Errors
/// [`BulkError`] unless the length is a multiple of 4.
pub fn tokens_from_bytes(bytes: &[u8]) -> Result<Vec<TokenId>, BulkError> {
    Ok(words(bytes)?.iter().map(|word| TokenId(u32::from_le_bytes(*word))).collect())
}

/// The reverse of [`f32_to_bytes`]; the bits survive, also of NaN.
///
/// # Errors
/// [`BulkError`] unless the length is a multiple of 4.
pub fn f32_from_bytes(bytes: &[u8]) -> Result<Vec<f32>, BulkError> {
    Ok(words(bytes)?.iter().map(|word| f32::from_le_bytes(*word)).collect())
}

fn words_to_bytes(words: impl ExactSizeIterator<Item = [u8; 4]>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(words.len() * 4);
    for word in words {
        bytes.extend_from_slice(&word);
    }
    bytes
}

fn words(bytes: &[u8]) -> Result<&[[u8; 4]], BulkError> {
    match bytes.as_chunks::<4>() {
        (words, []) => Ok(words),
        _ => Err(BulkError { length_bytes: bytes.len() }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trip(values in prop::collection::vec(any::<u32>(), 0..200)) {
            prop_assert_eq!(&u32_from_bytes(&u32_to_bytes(&values)).unwrap(), &values);
            let tokens: Vec<TokenId> = values.iter().copied().map(TokenId).collect();
            prop_assert_eq!(&tokens_from_bytes(&tokens_to_bytes(&tokens)).unwrap(), &tokens);
            let floats: Vec<f32> = values.iter().copied().map(f32::from_bits).collect();
            let back: Vec<u32> = f32_from_bytes(&f32_to_bytes(&floats)).unwrap().into_iter().map(f32::to_bits).collect();
            prop_assert_eq!(back, values);
        }

        #[test]
        fn odd_lengths_are_errors(length in 0_usize..64) {
            let bytes = vec![1_u8; length];
            let expected = if length % 4 == 0 { Ok(length / 4) } else { Err(BulkError { length_bytes: length }) };
            prop_assert_eq!(u32_from_bytes(&bytes).map(|v| v.len()), expected);
            prop_assert_eq!(f32_from_bytes(&bytes).map(|v| v.len()), expected);
            prop_assert_eq!(tokens_from_bytes(&bytes).map(|v| v.len()), expected);
        }
    }

    #[test]
    fn the_bytes_are_little_endian() {
        assert_eq!(tokens_to_bytes(&[TokenId(0x0102_0304)]), [4, 3, 2, 1]);
    }
}
