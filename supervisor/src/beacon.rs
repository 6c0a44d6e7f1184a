//! Where the second half of a window's randomness comes from.

use std::sync::Arc;

use grail_protocol::ids::{BlockHash, BlockNumber};
use grail_protocol::randomness::{ChallengeRandomness, MinerRandomness, mix_challenge, mix_miner};

use crate::chain::LocalChain;

/// Source of public randomness.
#[derive(Debug, Clone)]
pub enum Beacon {
    /// Block hashes alone (`--no-drand`).
    BlockHashOnly,
    /// The local chain's stand-in for drand.
    Local(Arc<LocalChain>),
}

impl Beacon {
    /// `R_m` of a window that is planned at `block`, and whether a beacon went into it.
    #[must_use]
    pub fn miner_randomness(&self, window_hash: &BlockHash, block: BlockNumber) -> (MinerRandomness, bool) {
        match self {
            Self::BlockHashOnly => (mix_miner(window_hash, None), false),
            Self::Local(chain) => (mix_miner(window_hash, Some(&chain.beacon_at(block))), true),
        }
    }

    /// `R_v` of a window whose challenge block is `block`.
    #[must_use]
    pub fn challenge_randomness(&self, block_hash: &BlockHash, block: BlockNumber) -> ChallengeRandomness {
        match self {
            Self::BlockHashOnly => mix_challenge(block_hash, None),
            Self::Local(chain) => mix_challenge(block_hash, Some(&chain.beacon_at(block))),
        }
    }
}
