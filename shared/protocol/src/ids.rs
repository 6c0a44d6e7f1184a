//! Newtypes for numbers and texts that must never be swapped.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::constants::{ROLLOUTS_PER_PROBLEM, WINDOW_LENGTH};

/// Height of a block on the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockNumber(pub u64);

/// First block of a window; always a multiple of [`WINDOW_LENGTH`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct WindowStart(u64);

impl WindowStart {
    /// The window that contains `block`.
    #[must_use]
    pub const fn containing(block: BlockNumber) -> Self {
        Self(block.0 - block.0 % WINDOW_LENGTH)
    }

    /// First block of the window.
    #[must_use]
    pub const fn block(self) -> BlockNumber {
        BlockNumber(self.0)
    }

    /// First block after the window: its hash challenges the window, its time bounds the upload.
    #[must_use]
    pub const fn end(self) -> BlockNumber {
        BlockNumber(self.0 + WINDOW_LENGTH)
    }

    /// The window after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + WINDOW_LENGTH)
    }
}

/// A block number that starts no window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} starts no window: a window starts at a multiple of {WINDOW_LENGTH}")]
pub struct NotAWindowStart(pub u64);

impl TryFrom<u64> for WindowStart {
    type Error = NotAWindowStart;
    fn try_from(block: u64) -> Result<Self, Self::Error> {
        if block.is_multiple_of(WINDOW_LENGTH) { Ok(Self(block)) } else { Err(NotAWindowStart(block)) }
    }
}

impl From<WindowStart> for u64 {
    fn from(window: WindowStart) -> Self {
        window.0
    }
}

/// Window for which the trainer made a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CheckpointWindow(pub u64);

/// Number of groups attempted before this one in its window; written as `rollout_group`. Signed because files may hold any
/// 64-bit number; a miner counts from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GroupIndex(pub i64);

/// Place of a rollout in its group, `0..16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RolloutIndex(u8);

impl RolloutIndex {
    /// `None` unless `index < 16`.
    #[must_use]
    pub const fn new(index: u8) -> Option<Self> {
        if (index as usize) < ROLLOUTS_PER_PROBLEM { Some(Self(index)) } else { None }
    }

    /// All places of a group in order.
    pub fn all() -> impl ExactSizeIterator<Item = Self> + Clone {
        (0..16_u8).map(Self)
    }

    /// The number itself.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }
}

/// `16 · group + rollout`; unique in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nonce(pub i64);

impl Nonce {
    /// Nonce of one rollout.
    #[must_use]
    pub const fn new(group: GroupIndex, rollout: RolloutIndex) -> Self {
        Self(group.0 * 16 + rollout.0 as i64)
    }
}

/// Id of one vocabulary entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenId(pub u32);

/// Seed of an environment: first four digest bytes of hotkey, window hash and group (see [`crate::seed`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EnvironmentSeed(pub u64);

/// Hash of a block as the node prints it: text with `0x`, never decoded before it is hashed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockHash(pub String);

/// Public key of a miner as SS58 text, format 42.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Hotkey(pub String);

/// xxh3-128 over a checkpoint's tensors in file dtype and in order of name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WeightsHash(pub u128);

impl fmt::Debug for WeightsHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WeightsHash({self})")
    }
}

impl fmt::Display for WeightsHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// A text that is no weights hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no weights hash: 32 hexadecimal digits are expected")]
pub struct NotAWeightsHash(pub String);

impl std::str::FromStr for WeightsHash {
    type Err = NotAWeightsHash;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(NotAWeightsHash(text.to_owned()));
        }
        u128::from_str_radix(text, 16).map(Self).map_err(|_| NotAWeightsHash(text.to_owned()))
    }
}

impl Serialize for WeightsHash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for WeightsHash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

macro_rules! display_as_inner {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
display_as_inner!(
    BlockNumber,
    WindowStart,
    CheckpointWindow,
    GroupIndex,
    RolloutIndex,
    Nonce,
    TokenId,
    EnvironmentSeed,
    BlockHash,
    Hotkey
);
