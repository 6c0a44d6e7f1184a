//! The miner's own bucket: window files are put whole and confirmed by HEAD.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use grail_protocol::ids::{Hotkey, WindowStart};
use object_store::path::Path as Key;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use tokio::time::Instant;

/// Pause after the first failure of the store; each further one doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Longest wait for an answer that carries no file.
const LOOK_LIMIT: Duration = Duration::from_secs(15);

/// A window file that did not reach the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UploadError {
    #[error("put {key}: the store refuses, and would again")]
    Refused { key: Key, source: object_store::Error },
    #[error(
        "{key} is another file of {stored} bytes already, {sent} were to be stored; a window file is never replaced"
    )]
    Occupied { key: Key, stored: u64, sent: u64 },
    #[error("{key} was stored {late:?} after the deadline, so it counts as absent")]
    Late { key: Key, late: Duration },
    #[error("{key} could not be stored before the deadline")]
    DeadlinePassed { key: Key },
}

impl UploadError {
    /// Whether more time would have helped.
    #[must_use]
    pub const fn is_for_want_of_time(&self) -> bool {
        matches!(self, Self::Late { .. } | Self::DeadlinePassed { .. })
    }
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
    /// Longest attempt to put or get a file.
    attempt: Duration,
}

impl WindowStore {
    /// Over any object store, in which one attempt to put or get a file takes no longer than `attempt`.
    #[must_use]
    pub fn new(store: Arc<dyn ObjectStore>, attempt: Duration) -> Self {
        Self { store, attempt }
    }

    /// Puts `content` under `key`, tries again while there is time, and believes only what a HEAD says afterwards. `deadline` is
    /// the same moment by the wall clock and by the monotonic one.
    ///
    /// An object that is there is never replaced: one in time would become one that may be late.
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
        let passed = || UploadError::DeadlinePassed { key: key.clone() };
        if limit <= Instant::now() {
            return Err(passed());
        }
        // Nothing runs on behind the deadline.
        let found = tokio::time::timeout_at(limit, self.put_until_it_is_there(key, &content)).await;
        let found = found.map_err(|_| passed())??;
        if found.size != sent {
            return Err(UploadError::Occupied { key: key.clone(), stored: found.size, sent });
        }
        match SystemTime::from(found.last_modified).duration_since(deadline) {
            Ok(late) if !late.is_zero() => Err(UploadError::Late { key: key.clone(), late }),
            _ => Ok(()),
        }
    }

    async fn put_until_it_is_there(&self, key: &Key, content: &Bytes) -> Result<ObjectMeta, UploadError> {
        let mut pauses = pauses();
        let mut is_put = false;
        loop {
            if !is_put {
                let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
                let put = self.store.put_opts(key, PutPayload::from_bytes(content.clone()), options);
                match tokio::time::timeout(self.attempt, put).await {
                    Ok(Ok(_) | Err(object_store::Error::AlreadyExists { .. })) => is_put = true,
                    Ok(Err(source)) if is_refusal(&source) => return Err(refused(key, source)),
                    Ok(Err(error)) => report(&error),
                    Err(_) => report_slow(self.attempt),
                }
            }
            // It may be there although the put failed: an answer that is lost says nothing.
            match tokio::time::timeout(LOOK_LIMIT, self.store.head(key)).await {
                Ok(Ok(found)) => return Ok(found),
                Ok(Err(object_store::Error::NotFound { .. })) => is_put = false,
                Ok(Err(source)) if is_refusal(&source) => return Err(refused(key, source)),
                Ok(Err(error)) => report(&error),
                Err(_) => report_slow(LOOK_LIMIT),
            }
            pauses.next_pause().await;
        }
    }

    /// The window file under `key` and when it was stored, `None` if there is none; asks until the store answers.
    pub async fn stored(&self, key: &Key) -> Option<(Bytes, SystemTime)> {
        let mut pauses = pauses();
        loop {
            let read = async {
                let found = self.store.get(key).await?;
                let stored = found.meta.last_modified.into();
                object_store::Result::Ok((found.bytes().await?, stored))
            };
            match tokio::time::timeout(self.attempt, read).await {
                Ok(Ok(found)) => return Some(found),
                Ok(Err(object_store::Error::NotFound { .. })) => return None,
                Ok(Err(error)) => report(&error),
                Err(_) => report_slow(self.attempt),
            }
            pauses.next_pause().await;
        }
    }

    /// Removes a window file; tries until it is gone.
    pub async fn withdraw(&self, key: &Key) {
        let mut pauses = pauses();
        loop {
            match tokio::time::timeout(LOOK_LIMIT, self.store.delete(key)).await {
                Ok(Ok(()) | Err(object_store::Error::NotFound { .. })) => return,
                Ok(Err(error)) => report(&error),
                Err(_) => report_slow(LOOK_LIMIT),
            }
            pauses.next_pause().await;
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

/// Whether the store would say the same again, whatever the time.
fn is_refusal(error: &object_store::Error) -> bool {
    use object_store::Error::{NotImplemented, NotSupported, PermissionDenied, Unauthenticated};
    matches!(error, PermissionDenied { .. } | Unauthenticated { .. } | NotSupported { .. } | NotImplemented { .. })
}

fn refused(key: &Key, source: object_store::Error) -> UploadError {
    UploadError::Refused { key: key.clone(), source }
}

fn report_slow(limit: Duration) {
    tracing::warn!(?limit, "The store did not answer in time; trying again.");
}

fn report(error: &object_store::Error) {
    tracing::warn!(error = grail_process::with_causes(error), "The store failed; trying again.");
}

/// Growing pauses between tries.
#[derive(Debug)]
struct Pauses(Duration);

const fn pauses() -> Pauses {
    Pauses(FIRST_PAUSE)
}

impl Pauses {
    async fn next_pause(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(LONGEST_PAUSE);
    }
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
        let store = WindowStore::new(Arc::new(InMemory::new()), Duration::from_secs(90));
        let minute = Duration::from_secs(60);
        let deadline = (SystemTime::now() + minute, Instant::now() + minute);
        store.put_confirmed(&key(), Bytes::from_static(b"rows"), deadline).await.unwrap();
        assert_eq!(store.get(&key()).await.unwrap(), Bytes::from_static(b"rows"));
        assert_eq!(key().to_string(), "grail/windows/5F-window-3000.parquet");
    }

    #[tokio::test]
    async fn a_file_that_is_there_is_never_replaced() {
        let store = WindowStore::new(Arc::new(InMemory::new()), Duration::from_secs(90));
        let minute = Duration::from_secs(60);
        let deadline = || (SystemTime::now() + minute, Instant::now() + minute);
        store.put_confirmed(&key(), Bytes::from_static(b"rows"), deadline()).await.unwrap();
        let stored = store.stored(&key()).await.unwrap();
        // The same once more, as after an answer that was lost, is success.
        store.put_confirmed(&key(), Bytes::from_static(b"rows"), deadline()).await.unwrap();
        assert_eq!(store.stored(&key()).await.unwrap(), stored, "not even its time has changed");
        let error = store.put_confirmed(&key(), Bytes::from_static(b"others"), deadline()).await.unwrap_err();
        assert!(matches!(error, UploadError::Occupied { stored: 4, sent: 6, .. }), "{error}");
        assert_eq!(store.get(&key()).await.unwrap(), Bytes::from_static(b"rows"));
        store.withdraw(&key()).await;
        store.withdraw(&key()).await;
        assert_eq!(store.stored(&key()).await, None);
    }

    #[tokio::test]
    async fn nothing_is_put_after_the_deadline() {
        let store = WindowStore::new(Arc::new(InMemory::new()), Duration::from_secs(90));
        let deadline = (SystemTime::now() - Duration::from_secs(1), Instant::now());
        let error = store.put_confirmed(&key(), Bytes::from_static(b"rows"), deadline).await.unwrap_err();
        assert!(matches!(error, UploadError::DeadlinePassed { .. }));
        assert!(store.get(&key()).await.is_err());
    }
}
