//! The simulated chain: blocks follow the wall clock from a genesis that is kept in the state directory, hashes follow from
//! the seed. A restart, and `verify --local` afterwards, see the same blocks.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::FutureExt;
use futures::future::BoxFuture;
use grail_protocol::ids::{BlockHash, BlockNumber, WindowStart};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Chain, ChainError, Head};
use crate::clock::Clock;
use crate::durable;

/// First block of every local chain.
const GENESIS: BlockNumber = BlockNumber(2_990);
const FILE: &str = "chain.json";
const SCHEMA: u32 = 1;

/// A local chain that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LocalChainError {
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("write {}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{} is no chain description: {detail}; move the state directory away or name another with --state-dir", path.display())]
    Malformed { path: PathBuf, detail: String },
    #[error(
        "{} was made with {what} {existing}, but {requested} is asked for; name another state directory with --state-dir, or leave the option out",
        path.display()
    )]
    Differs { path: PathBuf, what: &'static str, existing: String, requested: String },
    #[error("{} holds no local chain yet: run `grail-supervisor mine --local` first", path.display())]
    Absent { path: PathBuf },
}

/// What a new local chain is made from. `None` takes what an existing one has.
#[derive(Debug, Clone, Default)]
pub struct LocalChainSettings {
    pub seed: Option<String>,
    pub block_time: Option<Duration>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct ChainFile {
    schema: u32,
    seed: String,
    genesis_unix_ms: u64,
    genesis_block: u64,
    block_ms: u64,
}

/// Seed of the embedded default.
pub const DEFAULT_SEED: &str = "grail-demo";
/// Block time of the embedded default.
pub const DEFAULT_BLOCK_TIME: Duration = Duration::from_millis(1_000);

/// The simulated chain.
#[derive(Debug, Clone)]
pub struct LocalChain {
    file: ChainFile,
    clock: Clock,
}

impl LocalChain {
    /// Opens the chain of `state_dir`, or starts a new one now.
    ///
    /// # Errors
    /// If the folder cannot be read or written, or holds a chain with other settings than those asked for.
    pub fn open_or_start(
        state_dir: &Path,
        settings: &LocalChainSettings,
        clock: &Clock,
    ) -> Result<Self, LocalChainError> {
        let path = state_dir.join(FILE);
        match Self::open(state_dir, clock) {
            Ok(chain) => chain.check(&path, settings),
            Err(LocalChainError::Absent { .. }) => Self::start(&path, settings, clock),
            Err(error) => Err(error),
        }
    }

    /// Opens the chain of `state_dir`.
    ///
    /// # Errors
    /// If there is none or it cannot be read.
    pub fn open(state_dir: &Path, clock: &Clock) -> Result<Self, LocalChainError> {
        let path = state_dir.join(FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(LocalChainError::Absent { path: state_dir.to_owned() });
            }
            Err(source) => return Err(LocalChainError::Read { path, source }),
        };
        let malformed = |detail: String| LocalChainError::Malformed { path: path.clone(), detail };
        let file: ChainFile = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        if file.schema != SCHEMA {
            return Err(malformed(format!("schema {} is not {SCHEMA}", file.schema)));
        }
        if file.block_ms == 0 {
            return Err(malformed("block_ms is 0".to_owned()));
        }
        Ok(Self { file, clock: clock.clone() })
    }

    fn start(path: &Path, settings: &LocalChainSettings, clock: &Clock) -> Result<Self, LocalChainError> {
        let block_time = settings.block_time.unwrap_or(DEFAULT_BLOCK_TIME);
        let file = ChainFile {
            schema: SCHEMA,
            seed: settings.seed.clone().unwrap_or_else(|| DEFAULT_SEED.to_owned()),
            genesis_unix_ms: unix_ms(clock.now()),
            genesis_block: GENESIS.0,
            block_ms: u64::try_from(block_time.as_millis()).unwrap_or(u64::MAX).max(1),
        };
        durable::write_json(path, &file).map_err(|source| LocalChainError::Write { path: path.to_owned(), source })?;
        Ok(Self { file, clock: clock.clone() })
    }

    fn check(self, path: &Path, settings: &LocalChainSettings) -> Result<Self, LocalChainError> {
        let differs = |what, existing: String, requested: String| LocalChainError::Differs {
            path: path.to_owned(),
            what,
            existing,
            requested,
        };
        if let Some(seed) = &settings.seed
            && *seed != self.file.seed
        {
            return Err(differs("seed", self.file.seed, seed.clone()));
        }
        if let Some(block_time) = settings.block_time
            && block_time != self.nominal_block_time()
        {
            let (existing, requested) = (self.nominal_block_time(), block_time);
            return Err(differs("block time", format!("{existing:?}"), format!("{requested:?}")));
        }
        Ok(self)
    }

    /// Seed from which hashes and beacons follow.
    #[must_use]
    pub fn seed(&self) -> &str {
        &self.file.seed
    }

    /// Hash of any block, whether it exists yet or not.
    #[must_use]
    pub fn hash_of(seed: &str, block: BlockNumber) -> BlockHash {
        let digest = Sha256::digest(format!("grail-local-chain|{seed}|{block}"));
        BlockHash(format!("0x{}", hex::encode(digest)))
    }

    /// The stand-in for a drand round at `block`: 64 lower-case hex digits.
    #[must_use]
    pub fn beacon_at(&self, block: BlockNumber) -> String {
        hex::encode(Sha256::digest(format!("grail-local-beacon|{}|{block}", self.file.seed)))
    }

    fn time_of(&self, block: BlockNumber) -> Result<SystemTime, ChainError> {
        let first = BlockNumber(self.file.genesis_block);
        let blocks = block.0.checked_sub(first.0).ok_or(ChainError::BeforeFirst { block, first })?;
        let ms = self.file.genesis_unix_ms.saturating_add(blocks.saturating_mul(self.file.block_ms));
        Ok(UNIX_EPOCH + Duration::from_millis(ms))
    }

    fn head_at(&self, now: SystemTime) -> Result<Head, ChainError> {
        let elapsed = unix_ms(now).checked_sub(self.file.genesis_unix_ms).ok_or(ChainError::ClockBeforeGenesis)?;
        let block = BlockNumber(self.file.genesis_block + elapsed / self.file.block_ms);
        Ok(Head { block, time: self.time_of(block)? })
    }
}

impl Chain for LocalChain {
    fn head(&self) -> BoxFuture<'_, Result<Head, ChainError>> {
        async { self.head_at(self.clock.now()) }.boxed()
    }

    fn block_hash(&self, block: BlockNumber) -> BoxFuture<'_, Result<BlockHash, ChainError>> {
        async move {
            let head = self.head_at(self.clock.now())?.block;
            if block > head {
                return Err(ChainError::NotYet { wanted: block, head });
            }
            Ok(Self::hash_of(&self.file.seed, block))
        }
        .boxed()
    }

    fn expected_time(&self, block: BlockNumber) -> BoxFuture<'_, Result<SystemTime, ChainError>> {
        async move { self.time_of(block) }.boxed()
    }

    fn first_window(&self) -> WindowStart {
        WindowStart::containing(BlockNumber(self.file.genesis_block)).next()
    }

    fn nominal_block_time(&self) -> Duration {
        Duration::from_millis(self.file.block_ms)
    }
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(seed: &str) -> LocalChainSettings {
        LocalChainSettings { seed: Some(seed.to_owned()), block_time: Some(Duration::from_millis(500)) }
    }

    #[test]
    fn a_restart_sees_the_same_blocks() {
        let state = tempfile::tempdir().unwrap();
        let first = LocalChain::open_or_start(state.path(), &settings("a"), &Clock::system()).unwrap();
        let second = LocalChain::open_or_start(state.path(), &LocalChainSettings::default(), &Clock::system()).unwrap();
        let now = SystemTime::now() + Duration::from_secs(100);
        assert_eq!(first.head_at(now).unwrap(), second.head_at(now).unwrap());
        assert_eq!(first.beacon_at(BlockNumber(3_000)), second.beacon_at(BlockNumber(3_000)));
    }

    #[test]
    fn blocks_follow_the_clock() {
        let state = tempfile::tempdir().unwrap();
        let chain = LocalChain::open_or_start(state.path(), &settings("a"), &Clock::system()).unwrap();
        let genesis = chain.time_of(GENESIS).unwrap();
        for (ms, block) in [(0, 0), (499, 0), (500, 1), (15_000, 30)] {
            let head = chain.head_at(genesis + Duration::from_millis(ms)).unwrap();
            assert_eq!(head.block.0, GENESIS.0 + block, "{ms} ms");
        }
        assert!(matches!(chain.head_at(genesis - Duration::from_secs(1)), Err(ChainError::ClockBeforeGenesis)));
    }

    #[test]
    fn another_seed_is_refused_by_name() {
        let state = tempfile::tempdir().unwrap();
        LocalChain::open_or_start(state.path(), &settings("a"), &Clock::system()).unwrap();
        let error = LocalChain::open_or_start(state.path(), &settings("b"), &Clock::system()).unwrap_err().to_string();
        assert!(error.contains("seed a") && error.contains("b is asked for"), "{error}");
    }

    #[test]
    fn hashes_differ_by_block_and_seed() {
        let hash = LocalChain::hash_of("a", BlockNumber(1));
        assert_eq!(hash.0.len(), 66);
        assert_ne!(hash, LocalChain::hash_of("a", BlockNumber(2)));
        assert_ne!(hash, LocalChain::hash_of("b", BlockNumber(1)));
    }

    #[test]
    fn a_broken_file_is_named() {
        let state = tempfile::tempdir().unwrap();
        std::fs::write(state.path().join(FILE), "{").unwrap();
        let error = LocalChain::open(state.path(), &Clock::system()).unwrap_err().to_string();
        assert!(error.contains(FILE), "{error}");
        assert!(matches!(
            LocalChain::open(tempfile::tempdir().unwrap().path(), &Clock::system()),
            Err(LocalChainError::Absent { .. })
        ));
    }
}
