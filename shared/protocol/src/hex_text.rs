//! Hexadecimal text by Python's rules.

/// A text that Python's `bytes.fromhex` refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no hexadecimal text")]
pub struct InvalidHex {
    /// The text as it was given.
    pub text: String,
}

/// `bytes.fromhex(text)`: pairs of digits in either case, ASCII white space allowed between pairs.
///
/// # Errors
/// [`InvalidHex`] for any other character and for a single digit.
pub fn bytes_from_hex(text: &str) -> Result<Vec<u8>, InvalidHex> {
    let invalid = || InvalidHex { text: text.to_owned() };
    let mut bytes = Vec::with_capacity(text.len() / 2);
    let mut characters = text.bytes();
    while let Some(first) = characters.next() {
        if matches!(first, b' ' | b'\t'..=b'\r') {
            continue;
        }
        let high = digit(first).ok_or_else(invalid)?;
        let low = characters.next().and_then(digit).ok_or_else(invalid)?;
        bytes.push(high << 4 | low);
    }
    Ok(bytes)
}

fn digit(character: u8) -> Option<u8> {
    match character {
        b'0'..=b'9' => Some(character - b'0'),
        b'a'..=b'f' => Some(character - b'a' + 10),
        b'A'..=b'F' => Some(character - b'A' + 10),
        _ => None,
    }
}

/// The clean-up that the protocol applies wherever a randomness text becomes bytes (protocol §3): white space at both ends
/// goes, then every `0x`, then every `0X`; a leading `0` makes the length even; then [`bytes_from_hex`].
///
/// # Errors
/// [`InvalidHex`] if what remains is no hexadecimal text.
pub fn clean_hex(text: &str) -> Result<Vec<u8>, InvalidHex> {
    let mut cleaned = text.trim_matches(is_python_space).replace("0x", "").replace("0X", "");
    if cleaned.chars().count() % 2 == 1 {
        cleaned.insert(0, '0');
    }
    bytes_from_hex(&cleaned).map_err(|_| InvalidHex { text: text.to_owned() })
}

/// `str.isspace` of one character: Unicode white space and the four ASCII separators.
fn is_python_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1C}'..='\u{1F}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn white_space_is_allowed_between_pairs_only() {
        assert_eq!(bytes_from_hex(" 0a\tFf\n").unwrap(), [0x0A, 0xFF]);
        for text in ["0 a", "a", "0g", "0x", "é"] {
            assert!(bytes_from_hex(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn prefixes_go_in_the_order_of_the_reference() {
        assert_eq!(clean_hex("\u{1F} 0xAB0x\u{3000}").unwrap(), [0xAB]);
        assert_eq!(clean_hex("00xX1").unwrap(), [0x01], "the removal of 0x makes a 0X, which goes next");
        assert!(clean_hex("00Xx1").is_err(), "0x is not looked for again after 0X went");
        assert_eq!(clean_hex("").unwrap(), Vec::<u8>::new());
        assert_eq!(clean_hex("abc").unwrap(), [0x0A, 0xBC]);
    }

    proptest! {
        #[test]
        fn clean_up_undoes_every_decoration(
            bytes in proptest::collection::vec(any::<u8>(), 0..40),
            upper in any::<bool>(),
            prefix in prop_oneof![Just(""), Just("0x"), Just("0X")],
            left in "[ \t\r\n]{0,3}",
            right in "[ \t\r\n\u{a0}]{0,3}",
        ) {
            let digits = if upper { hex::encode_upper(&bytes) } else { hex::encode(&bytes) };
            let decorated = format!("{left}{prefix}{digits}{right}");
            prop_assert_eq!(clean_hex(&decorated).unwrap(), bytes);
        }

        #[test]
        fn an_odd_length_reads_as_if_a_zero_stood_before(digits in "[0-9a-f]{1,64}") {
            let padded = if digits.len() % 2 == 1 { format!("0{digits}") } else { digits.clone() };
            prop_assert_eq!(clean_hex(&digits).unwrap(), hex::decode(padded).unwrap());
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,40}") {
            prop_assert!(clean_hex(&text).is_ok_and(|bytes| bytes.len() <= text.len()) || clean_hex(&text).is_err());
        }
    }
}
