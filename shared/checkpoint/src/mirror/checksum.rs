//! A sum over a tensor that a device computes as fast as it reads, and that any other order or place of values changes.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// Elements side by side in the fast loop, and rows of them whose weighted sums fit into 32 bits: 65535·(256·257)/2 < 2^32.
const LANES: usize = 16;
const ROWS: usize = 256;

/// Checksum of one tensor, fed with its bytes in order: Σ (bits + 1)·(2·index + 1) mod 2^64 over its elements, where bits is
/// an element in its dtype, little-endian, as unsigned integer.
///
/// Since Σ (2·index + 1) over the first n elements is n², only Σ bits·(2·index + 1) is added up.
#[derive(Clone, Copy, Debug)]
pub struct Checksum {
    width: usize,
    /// Elements that were taken.
    count: u64,
    sum: u64,
}

impl Checksum {
    /// A checksum over elements of `width` bytes: 1, 2, 4 or 8.
    #[must_use]
    pub const fn new(width: usize) -> Self {
        Self { width, count: 0, sum: 0 }
    }

    /// Takes the next elements. `bytes` must be whole elements; what is left over at its end is not counted.
    pub fn update(&mut self, bytes: &[u8]) {
        match self.width {
            1 => self.add(bytes, |[byte]: [u8; 1]| byte.into()),
            2 => {
                let (blocks, rest) = bytes.as_chunks::<{ 2 * LANES * ROWS }>();
                blocks.iter().for_each(|block| self.add_block(block));
                self.add(rest, |chunk| u16::from_le_bytes(chunk).into());
            }
            4 => self.add(bytes, |chunk| u32::from_le_bytes(chunk).into()),
            _ => self.add(bytes, u64::from_le_bytes),
        }
    }

    /// The sum over everything that was taken.
    #[must_use]
    pub const fn finish(self) -> u64 {
        self.sum.wrapping_add(self.count.wrapping_mul(self.count))
    }

    fn add<const WIDTH: usize>(&mut self, bytes: &[u8], bits: impl Fn([u8; WIDTH]) -> u64) {
        for chunk in bytes.as_chunks::<WIDTH>().0 {
            let weight = self.count.wrapping_mul(2).wrapping_add(1);
            self.sum = self.sum.wrapping_add(bits(*chunk).wrapping_mul(weight));
            self.count += 1;
        }
    }

    /// Takes a block of 16-bit elements with additions of 32 bits alone, which the compiler turns into vectors: the sum of a
    /// lane's running sums holds each of its elements as often as rows are left.
    fn add_block(&mut self, block: &[u8; 2 * LANES * ROWS]) {
        let (mut sums, mut running) = ([0_u32; LANES], [0_u32; LANES]);
        for row in block.as_chunks::<{ 2 * LANES }>().0 {
            for ((element, sum), running) in row.as_chunks::<2>().0.iter().zip(&mut sums).zip(&mut running) {
                *sum += u32::from(u16::from_le_bytes(*element));
                *running += *sum;
            }
        }
        for (lane, (sum, running)) in (0..).zip(sums.iter().zip(&running)) {
            let (sum, running) = (u64::from(*sum), u64::from(*running));
            let by_row = ROWS as u64 * sum - running;
            let by_index = LANES as u64 * by_row + lane * sum;
            let weighted = self.count.wrapping_mul(2).wrapping_add(1).wrapping_mul(sum).wrapping_add(2 * by_index);
            self.sum = self.sum.wrapping_add(weighted);
        }
        self.count += (LANES * ROWS) as u64;
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
    fn the_fast_loop_gives_the_same_sum() {
        let random = |index: u32| index.wrapping_mul(2_654_435_761).to_be_bytes();
        let noise: Vec<u8> = (0..20_001_u32).flat_map(|index| [random(index)[0], random(index)[1]]).collect();
        for bytes in [noise.as_slice(), &[0xFF; 3 * 2 * LANES * ROWS], &noise[..2 * LANES * ROWS]] {
            let elements = bytes.as_chunks::<2>().0.iter().map(|element| u64::from(u16::from_le_bytes(*element)));
            let terms = (0_u64..).zip(elements).map(|(index, bits)| (bits + 1) * (2 * index + 1));
            assert_eq!(checksum(2, &[bytes]), terms.sum::<u64>());
            assert_eq!(checksum(2, &[&bytes[..10], &bytes[10..]]), checksum(2, &[bytes]));
        }
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
