//! Python's `str`: any sequence of code points, lone surrogates included.

use std::fmt;

/// A text as Python's `json` returns it: Unicode in which single surrogates may occur.
///
/// Held as generalised UTF-8 (WTF-8): a lone surrogate takes the three bytes that UTF-8's scheme gives to its number, a pair is
/// always joined into one character. Byte order therefore equals order by code point, which is how Python sorts keys.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Text(Vec<u8>);

impl Text {
    /// From UTF-16 units; pairs are joined, lone surrogates kept.
    #[must_use]
    pub fn from_utf16(units: &[u16]) -> Self {
        let mut text = Self::default();
        for decoded in char::decode_utf16(units.iter().copied()) {
            match decoded {
                Ok(character) => text.push(character),
                Err(lone) => text.push_surrogate(lone.unpaired_surrogate()),
            }
        }
        text
    }

    /// The text, unless it holds a lone surrogate.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }

    /// The generalised UTF-8 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// True for the empty text.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The code points in order.
    pub fn code_points(&self) -> impl Iterator<Item = u32> + '_ {
        CodePoints(&self.0)
    }

    pub(super) fn push(&mut self, character: char) {
        self.0.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
    }

    pub(super) fn push_str(&mut self, text: &str) {
        self.0.extend_from_slice(text.as_bytes());
    }

    /// Adds a surrogate that is known to have no partner beside it.
    pub(super) fn push_surrogate(&mut self, unit: u16) {
        let [high, low] = unit.to_be_bytes();
        self.0.extend_from_slice(&[0xE0 | (high >> 4), 0x80 | ((high & 0x0F) << 2) | (low >> 6), 0x80 | (low & 0x3F)]);
    }
}

struct CodePoints<'a>(&'a [u8]);

impl Iterator for CodePoints<'_> {
    type Item = u32;
    fn next(&mut self) -> Option<u32> {
        let (&first, rest) = self.0.split_first()?;
        let (followers, bits) = match first {
            0x00..=0x7F => (0, first),
            0x80..=0xDF => (1, first & 0x1F),
            0xE0..=0xEF => (2, first & 0x0F),
            _ => (3, first & 0x07),
        };
        let (followers, rest) = rest.split_at_checked(followers)?;
        self.0 = rest;
        Some(followers.iter().fold(u32::from(bits), |point, byte| point << 6 | u32::from(byte & 0x3F)))
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self(text.into_bytes())
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut escaped = String::new();
        push_quoted(&mut escaped, self.code_points());
        f.write_str(&escaped)
    }
}

/// Appends `text` as `json.dumps` does with `ensure_ascii`: quoted, everything outside `" "..="~"` as `\uXXXX`, DEL
/// included.
pub fn push_escaped(out: &mut String, text: &str) {
    push_quoted(out, text.chars().map(u32::from));
}

pub(super) fn push_quoted(out: &mut String, code_points: impl Iterator<Item = u32>) {
    out.push('"');
    for point in code_points {
        match point {
            0x22 => out.push_str("\\\""),
            0x5C => out.push_str("\\\\"),
            0x08 => out.push_str("\\b"),
            0x0C => out.push_str("\\f"),
            0x0A => out.push_str("\\n"),
            0x0D => out.push_str("\\r"),
            0x09 => out.push_str("\\t"),
            0x20..=0x7E => out.extend(char::from_u32(point)),
            0x1_0000.. => {
                let offset = point - 0x1_0000;
                push_unit(out, 0xD800 | offset >> 10);
                push_unit(out, 0xDC00 | offset & 0x3FF);
            }
            _ => push_unit(out, point),
        }
    }
    out.push('"');
}

/// `\uXXXX` with lower-case digits.
fn push_unit(out: &mut String, unit: u32) {
    out.push_str("\\u");
    for shift in [12, 8, 4, 0] {
        out.extend(char::from_digit(unit >> shift & 0xF, 16));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_by_code_point_not_by_utf16_unit() {
        let astral = Text::from("\u{1F600}");
        let high_bmp = Text::from("\u{FF5E}");
        let surrogate = Text::from_utf16(&[0xD800]);
        assert!(surrogate < high_bmp && high_bmp < astral);
    }

    #[test]
    fn pairs_join_and_lone_surrogates_stay() {
        assert_eq!(Text::from_utf16(&[0xD83D, 0xDE00]).as_str(), Some("\u{1F600}"));
        let lone = Text::from_utf16(&[0x61, 0xDE00, 0xD83D]);
        assert_eq!(lone.as_str(), None);
        assert_eq!(lone.code_points().collect::<Vec<_>>(), [0x61, 0xDE00, 0xD83D]);
        assert_eq!(format!("{lone:?}"), "\"a\\ude00\\ud83d\"");
    }
}
