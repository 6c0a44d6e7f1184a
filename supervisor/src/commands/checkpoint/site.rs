//! Where checkpoints come from and where they are kept: the same questions are put to every such place.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use grail_checkpoint::{CheckpointCache, CheckpointStore};
use grail_protocol::ids::{CheckpointWindow, WindowStart};

use super::CheckpointCommandError;
use crate::chain::{Chain, LocalChain, LocalChainError, next_window};
use crate::clock::Clock;
use crate::commands::CommandError;
use crate::commands::control::{self, Whereabouts};
use crate::commands::local::open_store;
use crate::state::{checkpoints_of, store_of};

/// A trainer's store, the cache of this host, and who else works with them.
#[derive(Debug)]
pub struct Site {
    pub store: CheckpointStore,
    pub cache: CheckpointCache,
    /// Says which window is next; unknown without it.
    pub chain: Option<Arc<dyn Chain>>,
    /// Where a supervisor would be that uses the cache.
    pub supervisor: Whereabouts,
}

impl Site {
    /// The embedded default's: store, cache and chain lie in the state directory.
    ///
    /// # Errors
    /// If there is no such directory, or what it holds cannot be used.
    pub fn local(state_dir: &Path, runtime_base: PathBuf) -> Result<Self, CommandError> {
        let absent = || CheckpointCommandError::NoState { folder: state_dir.to_owned() };
        let root = state_dir.canonicalize().map_err(|_| absent())?;
        let (store, cache) = (store_of(&root), checkpoints_of(&root));
        // A folder that was named by mistake must not become a state directory.
        if !store.is_dir() && !cache.is_dir() {
            return Err(absent().into());
        }
        let chain: Option<Arc<dyn Chain>> = match LocalChain::open(&root, &Clock::system()) {
            Ok(chain) => Some(Arc::new(chain)),
            Err(LocalChainError::Absent { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Self {
            store: CheckpointStore::new(open_store(&store)?),
            cache: CheckpointCache::open(cache)?,
            chain,
            supervisor: Whereabouts { folders: vec![root], runtime_base },
        })
    }

    /// The window that begins next on the chain; `None` without a chain.
    pub(super) async fn next_window(&self) -> Result<Option<WindowStart>, CommandError> {
        let Some(chain) = &self.chain else { return Ok(None) };
        Ok(Some(next_window(&**chain).await?))
    }

    /// The checkpoints that a running supervisor uses; `None` if none runs.
    pub(super) async fn in_use(&self) -> Result<Option<BTreeSet<CheckpointWindow>>, CommandError> {
        match control::checkpoints_in_use(&self.supervisor).await {
            Ok(in_use) => Ok(Some(in_use)),
            Err(CommandError::NobodyThere { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use grail_process::ExitCode;

    use super::*;

    #[test]
    fn a_folder_that_is_no_state_directory_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        for state in [folder.path().to_owned(), folder.path().join("absent")] {
            let error = Site::local(&state, folder.path().to_owned()).unwrap_err();
            assert_eq!(error.exit_code(), ExitCode::MissingInput);
            let text = error.to_string();
            assert!(text.contains(state.to_str().unwrap()) && text.contains("--state-dir"), "{text}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn without_chain_and_supervisor_there_is_no_next_window_and_nothing_in_use() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("store")).unwrap();
        let site = Site::local(folder.path(), folder.path().to_owned()).unwrap();
        assert_eq!(site.next_window().await.unwrap(), None);
        assert_eq!(site.in_use().await.unwrap(), None);
    }
}
