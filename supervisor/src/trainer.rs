//! The trainer of the embedded default: publishes the first demo checkpoint before the first window and the second one
//! during it, as the real trainer would through the bucket.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use grail_checkpoint::{CheckpointStore, MetadataInput, PublishError, publish_full, ready};
use grail_protocol::constants::WINDOW_LENGTH;
use grail_protocol::ids::{BlockNumber, CheckpointWindow, WindowStart};

use crate::chain::{Chain, ChainError};
use crate::demo::Demo;

/// First window that the local chain reaches.
pub const FIRST_WINDOW: u64 = 3_000;
/// The second checkpoint appears this many blocks into the first window.
const SECOND_AFTER_BLOCKS: u64 = 5;

/// A demo checkpoint that could not be published.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainerError {
    #[error("publish demo checkpoint {checkpoint}")]
    Publish { checkpoint: CheckpointWindow, source: PublishError },
    #[error("list the local store")]
    List(#[source] grail_checkpoint::StoreError),
    #[error(transparent)]
    Chain(#[from] ChainError),
}

/// Publishes into the local store.
#[derive(Debug)]
pub struct LocalTrainer {
    pub store: CheckpointStore,
    pub demo: Demo,
}

impl LocalTrainer {
    /// The checkpoint of the first window; returns when it is ready.
    ///
    /// # Errors
    /// [`TrainerError`].
    pub async fn publish_first(&self) -> Result<(), TrainerError> {
        let (checkpoint, ready) = (CheckpointWindow(FIRST_WINDOW - 60), FIRST_WINDOW - 30);
        self.publish_once(checkpoint, &self.demo.first, ready).await
    }

    /// The checkpoint of the second window: waits for its block, then publishes it.
    ///
    /// # Errors
    /// [`TrainerError`].
    pub async fn publish_second(&self, chain: Arc<dyn Chain>) -> Result<(), TrainerError> {
        let due = BlockNumber(FIRST_WINDOW + SECOND_AFTER_BLOCKS);
        loop {
            let head = chain.head().await?;
            if head.block >= due {
                let ready = WindowStart::containing(head.block).block().0;
                return self.publish_once(CheckpointWindow(FIRST_WINDOW), &self.demo.second, ready).await;
            }
            tokio::time::sleep(chain.nominal_block_time().max(Duration::from_millis(20))).await;
        }
    }

    async fn publish_once(
        &self,
        checkpoint: CheckpointWindow,
        folder: &std::path::Path,
        ready: u64,
    ) -> Result<(), TrainerError> {
        let listing = self.store.list().await.map_err(TrainerError::List)?;
        if ready::markers(listing.keys()).any(|marker| marker.checkpoint == checkpoint) {
            return Ok(());
        }
        let created_at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let input = MetadataInput {
            model_name: self.demo.metadata.model_name.clone(),
            env_id: self.demo.metadata.env_id.clone(),
            env_params: self.demo.metadata.env_params.clone(),
            generation: self.demo.generation,
            thinking_mode: self.demo.metadata.thinking_mode,
            parent_window: WindowStart::try_from(checkpoint.0.saturating_sub(WINDOW_LENGTH)).ok(),
            training_config: serde_json::Map::new(),
            git_commit: env!("CARGO_PKG_VERSION").to_owned(),
            created_at,
        };
        publish_full(&self.store, checkpoint, folder, &input, ready)
            .await
            .map_err(|source| TrainerError::Publish { checkpoint, source })?;
        tracing::info!(%checkpoint, ready, "The local trainer published a checkpoint.");
        Ok(())
    }
}
