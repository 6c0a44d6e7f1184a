//! The two random values of a window (protocol §3). They have separate types, because a proof made with the wrong one is
//! usually accepted by the sketch tolerance and still wrong.

use std::fmt;

use serde::{Deserialize, Serialize};

pub use crate::hex_text::{InvalidHex, clean_hex};

use crate::hash::{Digest, sha256};
use crate::ids::BlockHash;

/// Chain of the drand beacon that both sides use.
pub const DRAND_CHAIN_NAME: &str = "quicknet";
/// Hash of that chain.
pub const DRAND_CHAIN_HASH: &str = "52db9ba70e0cc0f6eaf7803dd07447a1f5477735fd3f661792ba94600c84e971";
/// Unix seconds of its first round.
pub const DRAND_GENESIS_SECONDS: u64 = 1_692_803_367;
/// Seconds between its rounds.
pub const DRAND_PERIOD_SECONDS: u64 = 3;
/// Relays in the order in which they are asked.
pub const DRAND_RELAYS: [&str; 3] =
    ["https://api.drand.sh", "https://drand.cloudflare.com", "https://api.drand.secureweb3.com:6875"];
/// Seconds that one relay gets to answer.
pub const DRAND_TIMEOUT_SECONDS: u64 = 10;

/// Number of the round that is current at `unix_seconds`; `None` before the first.
#[must_use]
pub const fn drand_round_at(unix_seconds: u64) -> Option<u64> {
    match unix_seconds.checked_sub(DRAND_GENESIS_SECONDS) {
        Some(elapsed) => Some(elapsed / DRAND_PERIOD_SECONDS + 1),
        None => None,
    }
}

/// A text that is not 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no randomness: 64 lower-case hexadecimal digits are expected")]
pub struct InvalidRandomness {
    /// The text as it was given.
    pub text: String,
}

macro_rules! randomness {
    ($(#[$documentation:meta])* $name:ident) => {
        $(#[$documentation])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// From 32 bytes.
            #[must_use]
            pub fn from_bytes(bytes: &Digest) -> Self {
                Self(hex::encode(bytes))
            }

            /// 64 lower-case hexadecimal digits: the form that files and hashes hold.
            #[must_use]
            pub fn as_hex(&self) -> &str {
                &self.0
            }

            /// The 32 bytes.
            #[must_use]
            pub fn to_bytes(&self) -> Digest {
                let mut bytes = [0; 32];
                hex::decode_to_slice(&self.0, &mut bytes).expect("the constructors admit only 64 digits");
                bytes
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidRandomness;
            fn try_from(text: String) -> Result<Self, InvalidRandomness> {
                let is_valid = text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
                if is_valid { Ok(Self(text)) } else { Err(InvalidRandomness { text }) }
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidRandomness;
            fn from_str(text: &str) -> Result<Self, InvalidRandomness> {
                Self::try_from(text.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(randomness: $name) -> Self {
                randomness.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

randomness! {
    /// `R_m`: made by the miner at the start of a window. It seeds the sketch coefficients and is bound by every commit signature;
    /// a validator takes it from the file.
    MinerRandomness
}
randomness! {
    /// `R_v`: made by the validator after the upload deadline, from the block after the window. It chooses the checked groups and
    /// the challenged positions.
    ChallengeRandomness
}

/// `R_m` of a window from the hash of its first block and the randomness of a drand round.
///
/// Without drand it is SHA-256 of the hash text. The reference then takes the hash text itself, whose `0x` fails the schema
/// check of every validator.
#[must_use]
pub fn mix_miner(window_hash: &BlockHash, drand: Option<&str>) -> MinerRandomness {
    MinerRandomness::from_bytes(&mix(window_hash, drand))
}

/// `R_v` of a window from the hash of the block after it and the randomness of a drand round, or the hash alone.
#[must_use]
pub fn mix_challenge(hash_after_window: &BlockHash, drand: Option<&str>) -> ChallengeRandomness {
    ChallengeRandomness::from_bytes(&mix(hash_after_window, drand))
}

/// Both inputs are texts; the block hash keeps its `0x`.
fn mix(block_hash: &BlockHash, drand: Option<&str>) -> Digest {
    sha256([block_hash.0.as_str(), drand.unwrap_or_default()].concat().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_64_lower_case_digits_are_randomness() {
        let text = "0123456789abcdef".repeat(4);
        let randomness: MinerRandomness = text.parse().unwrap();
        assert_eq!(randomness.as_hex(), text);
        assert_eq!(MinerRandomness::from_bytes(&randomness.to_bytes()), randomness);
        for wrong in ["", &text[1..], &text.to_uppercase(), &format!("0x{}", &text[2..]), &format!("{text}0")] {
            assert!(wrong.parse::<MinerRandomness>().is_err(), "{wrong}");
            assert!(serde_json::from_value::<ChallengeRandomness>(wrong.into()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn there_is_no_round_before_the_first() {
        assert_eq!(drand_round_at(DRAND_GENESIS_SECONDS - 1), None);
        assert_eq!(drand_round_at(DRAND_GENESIS_SECONDS), Some(1));
    }
}
