//! Counter-based random numbers: the draw at a position depends on the request and the position alone.

use sha2::{Digest, Sha256};

/// Uniform numbers of one request, by position. Two requests in one batch, one batch or two, one thread or eight: the
/// numbers stay the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrawStream {
    key: [u64; 2],
}

impl DrawStream {
    /// Draws of a request without a seed of its own.
    #[must_use]
    pub fn of_request(server_seed: u64, rid: &str) -> Self {
        Self::from_material(&[b"request", &server_seed.to_le_bytes(), rid.as_bytes()])
    }

    /// Draws of a request with `sampling_seed`: whatever its name and whatever the server's seed.
    #[must_use]
    pub fn of_seed(sampling_seed: u64) -> Self {
        Self::from_material(&[b"seed", &sampling_seed.to_le_bytes()])
    }

    fn from_material(parts: &[&[u8]]) -> Self {
        let mut hasher = Sha256::new();
        for part in parts {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let digest = hasher.finalize();
        let word = |at: usize| digest[at..at + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        Self { key: [word(0), word(8)] }
    }

    /// The number of one position, in `[0, 1)`, 53 bits.
    #[must_use]
    pub fn uniform(&self, position: u64) -> f64 {
        let bits = mix(self.key[0] ^ mix(self.key[1].wrapping_add(position.wrapping_mul(0x9e37_79b9_7f4a_7c15))));
        #[expect(clippy::cast_precision_loss, reason = "53 bits are exact in a double")]
        let numerator = (bits >> 11) as f64;
        numerator / (1_u64 << 53) as f64
    }
}

/// Finaliser of SplitMix64.
const fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draw_depends_on_request_and_position_only() {
        let stream = DrawStream::of_request(7, "a");
        assert_eq!(stream, DrawStream::of_request(7, "a"));
        assert_ne!(stream, DrawStream::of_request(8, "a"));
        assert_ne!(stream, DrawStream::of_request(7, "b"));
        assert_ne!(stream, DrawStream::of_seed(7));
        let forwards: Vec<f64> = (0..100).map(|position| stream.uniform(position)).collect();
        let backwards: Vec<f64> = (0..100).rev().map(|position| stream.uniform(position)).collect();
        assert!(forwards.iter().eq(backwards.iter().rev()));
    }

    #[test]
    fn numbers_are_uniform() {
        let mut tenths = [0_u32; 10];
        for seed in 0..10 {
            let stream = DrawStream::of_seed(seed);
            for position in 0..10_000 {
                let number = stream.uniform(position);
                assert!((0.0..1.0).contains(&number));
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number below ten")]
                let tenth = (number * 10.0) as usize;
                tenths[tenth] += 1;
            }
        }
        // Six standard deviations of 10,000 are 570.
        assert!(tenths.iter().all(|count| count.abs_diff(10_000) < 570), "{tenths:?}");
    }
}
