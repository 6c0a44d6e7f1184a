//! What the miner needs to know of the chain, and the two places it can come from.

mod local;

use std::time::{Duration, SystemTime};

use futures::future::BoxFuture;
use grail_protocol::ids::{BlockHash, BlockNumber, WindowStart};

pub use local::{LocalChain, LocalChainError, LocalChainSettings};

/// The newest block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub block: BlockNumber,
    /// When the block was made.
    pub time: SystemTime,
}

/// A chain that could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    #[error("block {wanted} does not exist yet: the newest block is {head}")]
    NotYet { wanted: BlockNumber, head: BlockNumber },
    #[error("block {block} lies before the first block {first} of this chain")]
    BeforeFirst { block: BlockNumber, first: BlockNumber },
    #[error("the clock of this machine stands before the chain's first block: set the clock")]
    ClockBeforeGenesis,
}

/// Source of blocks: a node, or the simulated chain of the embedded default.
pub trait Chain: Send + Sync + std::fmt::Debug {
    /// The newest block.
    fn head(&self) -> BoxFuture<'_, Result<Head, ChainError>>;

    /// Hash of an existing block, as the node prints it.
    fn block_hash(&self, block: BlockNumber) -> BoxFuture<'_, Result<BlockHash, ChainError>>;

    /// When `block` was made or is expected.
    fn expected_time(&self, block: BlockNumber) -> BoxFuture<'_, Result<SystemTime, ChainError>>;

    /// The first window that can be mined at all: a simulated chain begins shortly before it.
    fn first_window(&self) -> WindowStart;

    /// Block time to assume before the first measurement.
    fn nominal_block_time(&self) -> Duration;
}

/// The window that begins next, or the first one that can be mined.
///
/// # Errors
/// [`ChainError`] if the chain cannot be asked.
pub async fn next_window(chain: &dyn Chain) -> Result<WindowStart, ChainError> {
    let (current, first) = (WindowStart::containing(chain.head().await?.block), chain.first_window());
    Ok(if current < first { first } else { current.next() })
}
