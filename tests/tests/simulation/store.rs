//! An object store in memory that fails as the schedule says and counts what is put.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use crate::schedule::StoreFault;

#[derive(Debug, Default)]
pub struct SimStore {
    objects: InMemory,
    faults: Mutex<VecDeque<StoreFault>>,
    /// Questions that are not answered yet.
    unread: AtomicUsize,
    /// Keys in the order of their puts, also of those that failed.
    puts: Mutex<Vec<String>>,
    /// What the miner saw and did that must fit together.
    pub log: Arc<Log>,
}

/// In the order in which it happened.
#[derive(Debug, Default)]
pub struct Log(Mutex<Vec<Seen>>);

impl Log {
    pub fn add(&self, seen: Seen) {
        self.0.lock().unwrap().push(seen);
    }

    pub fn all(&self) -> Vec<Seen> {
        self.0.lock().unwrap().clone()
    }
}

/// A complete listing of the trainer's store as it arrived, or the put of a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    Listed(Vec<String>),
    Put(String),
    /// A window that is in the store, and whose life has seen its end.
    Over(u64),
}

impl SimStore {
    pub fn new(faults: &[StoreFault], unread: usize) -> Arc<Self> {
        let faults = Mutex::new(faults.iter().copied().collect());
        Arc::new(Self { faults, unread: AtomicUsize::new(unread), ..Self::default() })
    }

    pub fn puts_of(&self, key: &str) -> usize {
        self.puts.lock().unwrap().iter().filter(|put| *put == key).count()
    }
}

impl fmt::Display for SimStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated store")
    }
}

pub fn failure() -> Error {
    Error::Generic { store: "simulated", source: "the store is away".into() }
}

#[async_trait::async_trait]
impl ObjectStore for SimStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.puts.lock().unwrap().push(location.to_string());
        self.log.add(Seen::Put(location.to_string()));
        let fault = self.faults.lock().unwrap().pop_front();
        match fault {
            Some(StoreFault::Fails) => return Err(failure()),
            Some(StoreFault::Slow(pause)) => tokio::time::sleep(pause).await,
            _ => {}
        }
        let stored = self.objects.put_opts(location, payload, options).await?;
        if fault == Some(StoreFault::StoresAndFails) { Err(failure()) } else { Ok(stored) }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.objects.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let fewer = |left: usize| left.checked_sub(1);
        if self.unread.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer).is_ok() {
            return Err(failure());
        }
        self.objects.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.objects.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.objects.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.objects.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.objects.copy_opts(from, to, options).await
    }
}
