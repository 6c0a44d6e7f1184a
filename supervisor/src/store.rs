//! The miner's own bucket: window files are put whole and confirmed by HEAD.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use grail_protocol::ids::{Hotkey, WindowStart};
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use tokio::time::Instant;

/// Waits between the tries of an upload.
const BACK_OFF: [Duration; 3] = [Duration::from_millis(500), Duration::from_secs(1), Duration::from_secs(2)];

/// A window file that did not reach the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UploadError {
    #[error("put {key}")]
    Put { key: Key, source: object_store::Error },
    #[error("confirm {key} after the upload")]
    Head { key: Key, source: object_store::Error },
    #[error("{key} holds {stored} bytes, {sent} were sent")]
    Size { key: Key, stored: u64, sent: u64 },
    #[error("{key} was stored {late:?} after the deadline, so it counts as absent")]
    Late { key: Key, late: Duration },
    #[error("{key} could not be stored before the deadline")]
    DeadlinePassed { key: Key },
}

/// Key of a window file.
#[must_use]
pub fn window_key(hotkey: &Hotkey, window: WindowStart) -> Key {
    Key::from(format!("grail/windows/{hotkey}-window-{window}.parquet"))
}

/// The miner's bucket.
#[derive(Debug, Clone)]
pub struct WindowStore {
    store: Arc<dyn ObjectStore>,
}

impl WindowStore {
    /// Over any object store.
    #[must_use]
    pub fn new(store: Arc<dyn ObjectStore>) -> Self {
        Self { store }
    }

    /// Puts `content` under `key`, tries again while there is time, and believes only what a HEAD says afterwards. `deadline` is
    /// the same moment by the wall clock and by the monotonic one.
    ///
    /// # Errors
    /// If the object is not there, not whole or not in time.
    pub async fn put_confirmed(
        &self,
        key: &Key,
        content: Bytes,
        (deadline, limit): (SystemTime, Instant),
    ) -> Result<(), UploadError> {
        let sent = content.len() as u64;
        // A put that ends late would replace an object that was in time, so nothing runs on behind the deadline.
        let put = || async {
            let payload = PutPayload::from_bytes(content.clone());
            self.store.put(key, payload).await.map(drop).map_err(|source| UploadError::Put { key: key.clone(), source })
        };
        // Only the look is repeated once the object is stored.
        let look =
            || async { self.store.head(key).await.map_err(|source| UploadError::Head { key: key.clone(), source }) };
        let stored = async {
            with_retries(put).await?;
            with_retries(look).await
        };
        let passed = || UploadError::DeadlinePassed { key: key.clone() };
        if limit <= Instant::now() {
            return Err(passed());
        }
        let found = tokio::time::timeout_at(limit, stored).await.map_err(|_| passed())??;
        if found.size != sent {
            return Err(UploadError::Size { key: key.clone(), stored: found.size, sent });
        }
        match SystemTime::from(found.last_modified).duration_since(deadline) {
            Ok(late) if !late.is_zero() => Err(UploadError::Late { key: key.clone(), late }),
            _ => Ok(()),
        }
    }

    /// Content of a window file.
    ///
    /// # Errors
    /// What the store says, for instance that there is none.
    pub async fn get(&self, key: &Key) -> object_store::Result<Bytes> {
        self.store.get(key).await?.bytes().await
    }
}

async fn with_retries<T, F: Future<Output = Result<T, UploadError>>>(
    attempt: impl Fn() -> F,
) -> Result<T, UploadError> {
    for pause in BACK_OFF {
        match attempt().await {
            Ok(done) => return Ok(done),
            Err(error) => tracing::warn!(error = grail_process::with_causes(&error), "The store failed; trying again."),
        }
        tokio::time::sleep(pause).await;
    }
    attempt().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::memory::InMemory;

    fn key() -> Key {
        window_key(&Hotkey("5F".into()), WindowStart::try_from(3_000).unwrap())
    }

    #[tokio::test]
    async fn a_put_is_confirmed_and_read_back() {
        let store = WindowStore::new(Arc::new(InMemory::new()));
        let minute = Duration::from_secs(60);
        let deadline = (SystemTime::now() + minute, Instant::now() + minute);
        store.put_confirmed(&key(), Bytes::from_static(b"rows"), deadline).await.unwrap();
        assert_eq!(store.get(&key()).await.unwrap(), Bytes::from_static(b"rows"));
        assert_eq!(key().to_string(), "grail/windows/5F-window-3000.parquet");
    }

    #[tokio::test]
    async fn nothing_is_put_after_the_deadline() {
        let store = WindowStore::new(Arc::new(InMemory::new()));
        let deadline = (SystemTime::now() - Duration::from_secs(1), Instant::now());
        let error = store.put_confirmed(&key(), Bytes::from_static(b"rows"), deadline).await.unwrap_err();
        assert!(matches!(error, UploadError::DeadlinePassed { .. }));
        assert!(store.get(&key()).await.is_err());
    }
}
