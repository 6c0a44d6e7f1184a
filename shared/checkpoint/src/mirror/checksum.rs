//! A sum over a tensor that a device computes as fast as it reads, and that any other order or place of values changes.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// Checksum of one tensor, fed with its bytes in order: Σ (bits + 1)·(2·index + 1) mod 2^64 over its elements, where bits is
/// an element in its dtype, little-endian, as unsigned integer.
#[derive(Clone, Copy, Debug)]
pub struct Checksum {
    width: usize,
    weight: u64,
    sum: u64,
}

impl Checksum {
    /// A checksum over elements of `width` bytes: 1, 2, 4 or 8.
    #[must_use]
    pub const fn new(width: usize) -> Self {
        Self { width, weight: 1, sum: 0 }
    }

    /// Takes the next elements. `bytes` must be whole elements; what is left over at its end is not counted.
    pub fn update(&mut self, bytes: &[u8]) {
        match self.width {
            1 => self.add(bytes, |[byte]: [u8; 1]| byte.into()),
            2 => self.add(bytes, |chunk| u16::from_le_bytes(chunk).into()),
            4 => self.add(bytes, |chunk| u32::from_le_bytes(chunk).into()),
            _ => self.add(bytes, u64::from_le_bytes),
        }
    }

    /// The sum over everything that was taken.
    #[must_use]
    pub const fn finish(self) -> u64 {
        self.sum
    }

    fn add<const WIDTH: usize>(&mut self, bytes: &[u8], bits: impl Fn([u8; WIDTH]) -> u64) {
        for chunk in bytes.as_chunks::<WIDTH>().0 {
            let term = bits(*chunk).wrapping_add(1).wrapping_mul(self.weight);
            self.sum = self.sum.wrapping_add(term);
            self.weight = self.weight.wrapping_add(2);
        }
    }
}

/// Checksums by tensor as a JSON object of 16 hexadecimal digits each, for a local metadata document.
#[must_use]
pub fn checksums_to_json(checksums: &BTreeMap<String, u64>) -> Value {
    let members = checksums.iter().map(|(name, checksum)| (name.clone(), Value::from(format!("{checksum:016x}"))));
    Value::Object(members.collect::<Map<_, _>>())
}

/// Reads what [`checksums_to_json`] wrote; `None` for anything else.
#[must_use]
pub fn checksums_from_json(value: &Value) -> Option<BTreeMap<String, u64>> {
    let members = value.as_object()?.iter();
    members
        .map(|(name, digits)| {
            let digits = digits.as_str().filter(|digits| digits.len() == 16)?;
            Some((name.clone(), u64::from_str_radix(digits, 16).ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn checksum(width: usize, pieces: &[&[u8]]) -> u64 {
        let mut checksum = Checksum::new(width);
        pieces.iter().for_each(|piece| checksum.update(piece));
        checksum.finish()
    }

    #[test]
    fn sums_are_those_of_the_definition() {
        assert_eq!(checksum(2, &[]), 0);
        // Elements 1 and 0x0302: (1 + 1)·1 + (0x302 + 1)·3.
        assert_eq!(checksum(2, &[&[1, 0, 2, 3]]), 2 + 0x303 * 3);
        assert_eq!(checksum(1, &[&[0, 255, 7]]), 1 + 256 * 3 + 8 * 5);
        assert_eq!(checksum(4, &[&[1, 2, 3, 4]]), 0x0403_0202);
        assert_eq!(checksum(8, &[&[255; 16]]), 0);
        assert_eq!(checksum(8, &[&[1, 0, 0, 0, 0, 0, 0, 0x80]]), 0x8000_0000_0000_0002);
    }

    #[test]
    fn pieces_make_no_difference_and_order_does() {
        assert_eq!(checksum(2, &[&[1, 2], &[3, 4, 5, 6]]), checksum(2, &[&[1, 2, 3, 4, 5, 6]]));
        assert_ne!(checksum(2, &[&[1, 2, 3, 4]]), checksum(2, &[&[3, 4, 1, 2]]));
    }

    #[test]
    fn checksums_survive_a_document() {
        let checksums = BTreeMap::from([("a".to_owned(), 0), ("b".to_owned(), u64::MAX)]);
        let json = checksums_to_json(&checksums);
        assert_eq!(json, json!({"a": "0000000000000000", "b": "ffffffffffffffff"}));
        assert_eq!(checksums_from_json(&json), Some(checksums));
        for other in [json!(null), json!({"a": 1}), json!({"a": "ff"}), json!({"a": "000000000000000g"})] {
            assert_eq!(checksums_from_json(&other), None, "{other}");
        }
    }
}
