//! The trainer of the embedded default: publishes the first demo checkpoint before the first window and the second one, as a
//! DELTA, during it, as the real trainer would through the bucket.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use grail_checkpoint::{
    CheckpointStore, DeltaFormat, DeltaInput, MetadataInput, PublishError, publish_delta, publish_full, ready,
};
use grail_environments::EnvironmentId;
use grail_protocol::constants::WINDOW_LENGTH;
use grail_protocol::ids::{BlockNumber, CheckpointWindow, WindowStart};

use crate::chain::{Chain, ChainError};
use crate::demo::Demo;

/// First window that the local chain reaches.
pub const FIRST_WINDOW: u64 = 3_000;
/// The checkpoint of the first window.
const FIRST_CHECKPOINT: CheckpointWindow = CheckpointWindow(FIRST_WINDOW - 60);
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
    #[error("read what the local store says of checkpoint {FIRST_CHECKPOINT}")]
    Metadata(#[source] grail_checkpoint::StoreError),
    #[error(
        "the local store holds checkpoints for {found}, not for {asked}; name another folder with --state-dir, or leave out \
         --env and GRAIL_LOCAL_ENV"
    )]
    OtherEnvironment { asked: EnvironmentId, found: String },
}

/// Publishes into the local store.
#[derive(Debug)]
pub struct LocalTrainer {
    pub store: CheckpointStore,
    pub demo: Demo,
}

/// The environment that the demo checkpoints of `store` name, or are to name: the same for both.
///
/// # Errors
/// [`TrainerError::OtherEnvironment`] if the store holds checkpoints for another one than is `asked` for.
pub async fn environment(store: &CheckpointStore, asked: Option<EnvironmentId>) -> Result<EnvironmentId, TrainerError> {
    let published = store.published(FIRST_CHECKPOINT).await.map_err(TrainerError::Metadata)?;
    let found = published.policy().ok().map(|policy| policy.env_id.clone());
    let named = found.as_deref().and_then(|id| id.parse::<EnvironmentId>().ok());
    match (asked, found) {
        (Some(asked), Some(found)) if named != Some(asked) => Err(TrainerError::OtherEnvironment { asked, found }),
        (asked, _) => Ok(named.or(asked).unwrap_or(EnvironmentId::Gsm8k)),
    }
}

impl LocalTrainer {
    /// The checkpoint of the first window; returns when it is ready.
    ///
    /// # Errors
    /// [`TrainerError`].
    pub async fn publish_first(&self) -> Result<(), TrainerError> {
        let (checkpoint, ready) = (FIRST_CHECKPOINT, FIRST_WINDOW - 30);
        if self.is_published(checkpoint).await? {
            return Ok(());
        }
        publish_full(&self.store, checkpoint, &self.demo.first, &self.input(checkpoint), ready)
            .await
            .map_err(|source| TrainerError::Publish { checkpoint, source })?;
        tracing::info!(%checkpoint, ready, "The local trainer published a FULL checkpoint.");
        Ok(())
    }

    /// The checkpoint of the second window, as a DELTA of the first one's: waits for its block, then publishes it.
    ///
    /// # Errors
    /// [`TrainerError`].
    pub async fn publish_second(&self, chain: Arc<dyn Chain>) -> Result<(), TrainerError> {
        let due = BlockNumber(FIRST_WINDOW + SECOND_AFTER_BLOCKS);
        loop {
            let head = chain.head().await?;
            if head.block >= due {
                let ready = WindowStart::containing(head.block).block().0;
                return self.publish_delta(CheckpointWindow(FIRST_WINDOW), ready).await;
            }
            tokio::time::sleep(chain.nominal_block_time().max(Duration::from_millis(20))).await;
        }
    }

    async fn publish_delta(&self, checkpoint: CheckpointWindow, ready: u64) -> Result<(), TrainerError> {
        if self.is_published(checkpoint).await? {
            return Ok(());
        }
        let delta = DeltaInput {
            window: checkpoint,
            folder: &self.demo.second,
            base_window: FIRST_CHECKPOINT,
            base_folder: &self.demo.first,
            anchor: Some(FIRST_CHECKPOINT),
            format: DeltaFormat::V31,
            ready: Some(ready),
        };
        let published = publish_delta(&self.store, &delta, &self.input(checkpoint))
            .await
            .map_err(|source| TrainerError::Publish { checkpoint, source })?;
        tracing::info!(%checkpoint, base = %FIRST_CHECKPOINT, ready, changed = published.listed,
            elements = published.elements, bytes = published.bytes, "The local trainer published a DELTA checkpoint.");
        Ok(())
    }

    async fn is_published(&self, checkpoint: CheckpointWindow) -> Result<bool, TrainerError> {
        let listing = self.store.list().await.map_err(TrainerError::List)?;
        Ok(ready::markers(listing.keys()).any(|marker| marker.checkpoint == checkpoint))
    }

    fn input(&self, checkpoint: CheckpointWindow) -> MetadataInput {
        let created_at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        MetadataInput {
            parent_window: WindowStart::try_from(checkpoint.0.saturating_sub(WINDOW_LENGTH)).ok(),
            created_at,
            ..self.demo.metadata_input()
        }
    }
}
