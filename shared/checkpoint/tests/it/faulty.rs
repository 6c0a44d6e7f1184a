//! A checkpoint in memory, and a store that fails where a test wants it to.

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::path::Path as FilePath;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use grail_checkpoint::layout::{Tree, object_key};
use grail_checkpoint::{
    CheckpointStore, GenerationParams, Limits, MetadataInput, PublishedFull, RetryLimits, ThinkingModeName,
    publish_full,
};
use grail_protocol::ids::{CheckpointWindow, WindowStart};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetRange, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

pub const WINDOW: CheckpointWindow = CheckpointWindow(300);

/// What the store does wrong.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The listing ends in an error after `objects` objects, the first `times` times.
    ListBreaks { objects: usize, times: usize },
    /// Bodies of `key` end after `bytes`, without an error.
    Cut { key: String, bytes: usize },
    /// Bodies of `key` break off after `bytes` with an error.
    Reset { key: String, bytes: usize },
    /// The first `times` requests for the size (`heads`) or else the bodies of `key` are answered with a server's error.
    Failing { key: String, times: usize, heads: bool },
    /// Bodies of `key` never come.
    Silent { key: String },
    /// The first body of `key` has one bit wrong.
    DamagedOnce { key: String },
    /// `key` is another object from its second body on.
    Replaced { key: String, with: Bytes },
    /// `key` is gone once its body is asked for, although it was listed.
    Vanishing { key: String },
    /// After this many bodies nothing answers any more, except for the sizes of objects.
    Outage { bodies: usize },
    /// After this many bodies no further one comes.
    HangAfter { bodies: usize },
    /// The listing says that every object is larger than any disk.
    Inflated,
    /// Every access is refused.
    Denied,
}

/// A body that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub key: String,
    pub range: Option<Range<u64>>,
}

#[derive(Debug)]
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    fault: Mutex<Option<Fault>>,
    requests: Mutex<Vec<Request>>,
    heads: AtomicUsize,
}

impl FaultyStore {
    pub fn new() -> Arc<Self> {
        Self::over(Arc::new(InMemory::new()))
    }

    pub fn over(inner: Arc<dyn ObjectStore>) -> Arc<Self> {
        let (fault, requests, heads) = (Mutex::new(None), Mutex::new(Vec::new()), AtomicUsize::new(0));
        Arc::new(Self { inner, fault, requests, heads })
    }

    pub fn fail(&self, fault: Fault) {
        *self.fault.lock().unwrap() = Some(fault);
    }

    pub fn heal(&self) {
        *self.fault.lock().unwrap() = None;
    }

    /// The bodies that were asked for since the last call.
    pub fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }

    /// Number of requests for the size of an object.
    pub fn heads(&self) -> usize {
        self.heads.load(Ordering::Relaxed)
    }

    /// Keys of the bodies that were asked for since the last call, each once.
    pub fn take_keys(&self) -> BTreeSet<String> {
        self.take_requests().into_iter().map(|request| request.key).collect()
    }

    pub async fn overwrite(&self, key: &str, bytes: impl Into<Bytes>) {
        self.inner.put(&Path::parse(key).unwrap(), bytes.into().into()).await.unwrap();
    }

    pub async fn remove(&self, key: &str) {
        self.inner.delete(&Path::parse(key).unwrap()).await.unwrap();
    }

    pub async fn body(&self, key: &str) -> Bytes {
        self.inner.get(&Path::parse(key).unwrap()).await.unwrap().bytes().await.unwrap()
    }

    fn fault(&self) -> Option<Fault> {
        self.fault.lock().unwrap().clone()
    }

    /// Refuses a request before it reaches the store.
    fn refuse(&self, location: &Path, head: bool) -> Result<()> {
        let path = location.to_string();
        let mut fault = self.fault.lock().unwrap();
        match fault.as_mut() {
            Some(Fault::Denied) => Err(object_store::Error::PermissionDenied { path, source: "no".into() }),
            Some(Fault::Failing { key, times, heads }) if *key == path && *times > 0 && *heads == head => {
                *times -= 1;
                Err(server_error())
            }
            Some(Fault::Vanishing { key }) if *key == path && !head => {
                Err(object_store::Error::NotFound { path, source: "gone".into() })
            }
            Some(Fault::Outage { bodies: 0 }) if !head => Err(server_error()),
            Some(Fault::Outage { bodies }) if !head => {
                *bodies -= 1;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    async fn answer(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let head = options.head;
        if head {
            self.heads.fetch_add(1, Ordering::Relaxed);
        } else {
            let range = match &options.range {
                Some(GetRange::Bounded(range)) => Some(range.clone()),
                Some(other) => panic!("nobody asks for {other}"),
                None => None,
            };
            self.requests.lock().unwrap().push(Request { key: location.to_string(), range });
        }
        self.refuse(location, head)?;
        let mut answer = self.inner.get_opts(location, options).await?;
        if head {
            return Ok(answer);
        }
        let mut body = std::mem::replace(&mut answer.payload, GetResultPayload::Stream(stream::empty().boxed()));
        match self.fault() {
            Some(Fault::Cut { key, bytes }) if key == location.as_ref() => {
                let whole = collect(body).await?;
                body = GetResultPayload::Stream(stream::iter([Ok(start(&whole, bytes))]).boxed());
            }
            Some(Fault::Reset { key, bytes }) if key == location.as_ref() => {
                let whole = collect(body).await?;
                body = GetResultPayload::Stream(stream::iter([Ok(start(&whole, bytes)), Err(server_error())]).boxed());
            }
            Some(Fault::HangAfter { bodies: 0 }) => body = GetResultPayload::Stream(stream::pending().boxed()),
            Some(Fault::HangAfter { bodies }) => self.fail(Fault::HangAfter { bodies: bodies - 1 }),
            Some(Fault::Silent { key }) if key == location.as_ref() => {
                body = GetResultPayload::Stream(stream::pending().boxed());
            }
            Some(Fault::DamagedOnce { key }) if key == location.as_ref() => {
                self.heal();
                let mut whole = collect(body).await?.to_vec();
                whole[0] ^= 1;
                body = GetResultPayload::Stream(stream::iter([Ok(Bytes::from(whole))]).boxed());
            }
            Some(Fault::Replaced { key, with }) if key == location.as_ref() => {
                self.heal();
                self.overwrite(&key, with).await;
            }
            _ => {}
        }
        answer.payload = body;
        Ok(answer)
    }
}

fn start(whole: &Bytes, bytes: usize) -> Bytes {
    whole.slice(..bytes.min(whole.len()))
}

fn server_error() -> object_store::Error {
    object_store::Error::Generic { store: "test", source: "500 Internal Server Error".into() }
}

async fn collect(body: GetResultPayload) -> Result<Bytes> {
    let GetResultPayload::Stream(pieces) = body else { panic!("a store in memory streams") };
    let pieces: Vec<Bytes> = futures::TryStreamExt::try_collect(pieces).await?;
    Ok(pieces.concat().into())
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the test store")
    }
}

type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

impl ObjectStore for FaultyStore {
    fn put_opts<'s, 'l, 'a>(
        &'s self,
        location: &'l Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Answer<'a, PutResult>
    where
        's: 'a,
        'l: 'a,
    {
        self.inner.put_opts(location, payload, options)
    }

    fn put_multipart_opts<'s, 'l, 'a>(
        &'s self,
        location: &'l Path,
        options: PutMultipartOptions,
    ) -> Answer<'a, Box<dyn MultipartUpload>>
    where
        's: 'a,
        'l: 'a,
    {
        self.inner.put_multipart_opts(location, options)
    }

    fn get_opts<'s, 'l, 'a>(&'s self, location: &'l Path, options: GetOptions) -> Answer<'a, GetResult>
    where
        's: 'a,
        'l: 'a,
    {
        Box::pin(self.answer(location, options))
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let listed = self.inner.list(prefix);
        let mut fault = self.fault.lock().unwrap();
        match fault.as_mut() {
            Some(Fault::ListBreaks { objects, times }) if *times > 0 => {
                *times -= 1;
                listed.take(*objects).chain(stream::iter([Err(server_error())])).boxed()
            }
            Some(Fault::Inflated) => {
                let inflate = |object: ObjectMeta| ObjectMeta { size: 1 << 60, ..object };
                listed.map(move |object| object.map(inflate)).boxed()
            }
            Some(Fault::Denied) => {
                let denied = object_store::Error::PermissionDenied { path: String::new(), source: "no".into() };
                stream::iter([Err(denied)]).boxed()
            }
            _ => listed,
        }
    }

    fn list_with_delimiter<'s, 'p, 'a>(&'s self, prefix: Option<&'p Path>) -> Answer<'a, ListResult>
    where
        's: 'a,
        'p: 'a,
    {
        self.inner.list_with_delimiter(prefix)
    }

    fn copy_opts<'s, 'f, 't, 'a>(&'s self, from: &'f Path, to: &'t Path, options: CopyOptions) -> Answer<'a, ()>
    where
        's: 'a,
        'f: 'a,
        't: 'a,
    {
        self.inner.copy_opts(from, to, options)
    }
}

/// The checkpoint side of a faulty store, impatient.
pub fn checkpoints(store: &Arc<FaultyStore>) -> CheckpointStore {
    CheckpointStore::with_limits(Arc::clone(store) as Arc<dyn ObjectStore>, impatient())
}

/// Limits under which failures are soon final, with ranges that small objects have several of.
pub fn impatient() -> Limits {
    let retry = RetryLimits { attempts: 3, first_wait: Duration::ZERO, longest_wait: Duration::ZERO };
    let stall = Duration::from_secs(20);
    Limits { stall, retry, range_bytes: 1000, parallel_ranges: 3, ..Limits::default() }
}

/// Waits for nobody.
pub fn hasty(store: &Arc<FaultyStore>) -> CheckpointStore {
    let limits = Limits { stall: Duration::from_millis(50), ..impatient() };
    CheckpointStore::with_limits(Arc::clone(store) as Arc<dyn ObjectStore>, limits)
}

/// A model folder with two tensors and two other files.
pub fn model_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tensors: [(&str, &[u8]); 2] = [("model.embed_tokens.weight", &[1, 2, 3, 4]), ("model.norm.weight", &[5, 6])];
    write_safetensors(&folder.path().join("model.safetensors"), &tensors);
    std::fs::write(folder.path().join("config.json"), b"{\"tie_word_embeddings\": true}").unwrap();
    std::fs::create_dir(folder.path().join("extra")).unwrap();
    std::fs::write(folder.path().join("extra/notes.txt"), b"nested").unwrap();
    std::fs::write(folder.path().join("metadata.json"), b"never published").unwrap();
    folder
}

/// A safetensors file of bf16 vectors.
pub fn write_safetensors(path: &FilePath, tensors: &[(&str, &[u8])]) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    header.insert("__metadata__".to_owned(), serde_json::json!({"format": "pt"}));
    for (name, bytes) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        let entry =
            serde_json::json!({"dtype": "BF16", "shape": [bytes.len() / 2], "data_offsets": [start, data.len()]});
        header.insert((*name).to_owned(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let file = [(header.len() as u64).to_le_bytes().as_slice(), &header, &data].concat();
    std::fs::write(path, file).unwrap();
}

pub fn metadata_input() -> MetadataInput {
    MetadataInput {
        env_id: "gsm8k".to_owned(),
        env_params: serde_json::json!({"split": "train"}).as_object().unwrap().clone(),
        generation: GenerationParams {
            max_tokens: 96,
            temperature: 0.9,
            top_p: 1.0,
            top_k: 0,
            repetition_penalty: 1.0,
        },
        thinking_mode: ThinkingModeName::Instructed,
        model_name: "demo/tiny".to_owned(),
        parent_window: Some(WindowStart::try_from(270).unwrap()),
        training_config: serde_json::Map::new(),
        git_commit: "unknown".to_owned(),
        created_at: 1_700_000_000.0,
    }
}

/// Publishes [`model_folder`] as checkpoint [`WINDOW`], ready in the same window.
pub async fn publish(store: &Arc<FaultyStore>) -> PublishedFull {
    let folder = model_folder();
    publish_full(&checkpoints(store), WINDOW, folder.path(), &metadata_input(), WINDOW.0).await.unwrap()
}

pub fn full_key(name: &str) -> String {
    object_key(WINDOW, Tree::Full, name)
}
