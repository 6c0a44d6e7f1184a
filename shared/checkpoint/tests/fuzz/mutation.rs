//! Damage to documents and payloads: bytes, numbers, and pieces that are lost, doubled or taken from elsewhere.

/// Numbers at which something changes, as texts of a document.
const NUMBERS: [&str; 13] = [
    "-1",
    "0",
    "1",
    "2",
    "255",
    "65536",
    "2147483648",
    "4294967295",
    "9223372036854775807",
    "18446744073709551615",
    "99999999999999999999",
    "1e999",
    "1.5",
];
/// Bytes that mean something in a document or at the edge of an integer.
const BYTES: [u8; 12] = [0, 1, 0x7F, 0x80, 0xFF, b'"', b'{', b'[', b'}', b',', b'\\', b'9'];
/// Longest input; more only costs time.
const MAX_BYTES: usize = 64 << 10;

/// Makes damaged inputs from good ones; the same ones for the same seed.
#[derive(Debug)]
pub struct Mutator {
    state: u64,
    corpus: Vec<Vec<u8>>,
}

impl Mutator {
    pub fn new(seed: u64, corpus: Vec<Vec<u8>>) -> Self {
        Self { state: seed, corpus }
    }

    /// A damaged document.
    pub fn document(&mut self) -> Vec<u8> {
        let mut text = self.pick();
        self.damage(&mut text);
        text
    }

    /// A damaged payload: now and then the frame itself, mostly what is inside, in a sound frame.
    pub fn payload(&mut self) -> Vec<u8> {
        let mut packed = self.pick();
        let plain = zstd::bulk::decompress(&packed, MAX_BYTES * 16);
        match plain {
            Ok(mut plain) if self.below(8) > 0 => {
                self.damage_content(&mut plain);
                zstd::bulk::compress(&plain, 1).unwrap()
            }
            _ => {
                self.damage(&mut packed);
                packed
            }
        }
    }

    /// Damages header and data apart, so that the length of the header stays right most of the time.
    fn damage_content(&mut self, plain: &mut Vec<u8>) {
        let length = plain.first_chunk().map_or(0, |length| u32::from_le_bytes(*length));
        let end = usize::try_from(length).unwrap().saturating_add(4);
        if end > plain.len() || self.below(8) == 0 {
            self.damage(plain);
            return;
        }
        let (mut header, mut data) = (plain[4..end].to_vec(), plain[end..].to_vec());
        if self.below(2) == 0 {
            self.damage(&mut header);
        }
        if self.below(2) == 0 {
            self.damage(&mut data);
        }
        let length = u32::try_from(header.len()).unwrap();
        *plain = [length.to_le_bytes().as_slice(), &header, &data].concat();
    }

    fn damage(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            self.damage_once(bytes);
        }
        bytes.truncate(MAX_BYTES);
    }

    fn damage_once(&mut self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            bytes.push(self.next().to_le_bytes()[0]);
            return;
        }
        let place = self.below(bytes.len());
        let length = 1 + self.below((bytes.len() - place).min(64));
        match self.below(9) {
            0 => bytes[place] ^= 1 << self.below(8),
            1 => bytes[place] = BYTES[self.below(BYTES.len())],
            2 => bytes[place] = self.next().to_le_bytes()[0],
            3 => bytes.truncate(place),
            4 => drop(bytes.drain(place..place + length)),
            5 => {
                let piece = bytes[place..place + length].to_vec();
                let times = 1 + self.below(4);
                bytes.splice(place..place, piece.repeat(times));
            }
            6 => {
                let other = self.pick();
                let from = self.below(other.len().max(1)).min(other.len());
                let to = (from + length).min(other.len());
                bytes.splice(place..place, other[from..to].iter().copied());
            }
            7 => {
                let edge = [0, 1, u64::MAX, u64::MAX >> 1, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 16][self.below(8)];
                let width = [2, 4, 8][self.below(3)].min(bytes.len() - place);
                bytes[place..place + width].copy_from_slice(&edge.to_le_bytes()[..width]);
            }
            _ => self.replace_number(bytes, place),
        }
    }

    /// Puts another number in the place of the first one after `place`.
    fn replace_number(&mut self, bytes: &mut Vec<u8>, place: usize) {
        let Some(start) = bytes[place..].iter().position(u8::is_ascii_digit).map(|skip| place + skip) else { return };
        let digits = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let number = NUMBERS[self.below(NUMBERS.len())];
        bytes.splice(start..start + digits, number.bytes());
    }

    fn pick(&mut self) -> Vec<u8> {
        let place = self.below(self.corpus.len());
        self.corpus[place].clone()
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}

#[test]
fn the_same_seed_makes_the_same_inputs() {
    let corpus = vec![b"{\"a\": 17, \"b\": [1, 2]}".to_vec(), b"[]".to_vec()];
    let inputs = |seed| {
        let mut mutator = Mutator::new(seed, corpus.clone());
        (0..100).map(|_| mutator.document()).collect::<Vec<_>>()
    };
    assert_eq!(inputs(1), inputs(1));
    assert_ne!(inputs(1), inputs(2));
}
