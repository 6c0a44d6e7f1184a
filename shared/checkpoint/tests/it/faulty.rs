//! A checkpoint in memory, and a store that fails where a test wants it to.

use std::fmt;
use std::future::Future;
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
    CheckpointStore, GenerationParams, Limits, MetadataInput, PublishedFull, ThinkingModeName, publish_full,
};
use grail_protocol::ids::{CheckpointWindow, WindowStart};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

pub const WINDOW: CheckpointWindow = CheckpointWindow(300);

/// What the store does wrong.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The listing ends in an error after `pages` objects.
    ListBreaks { objects: usize },
    /// Bodies of `key` end after `bytes`, without an error.
    Cut { key: String, bytes: usize },
    /// Bodies of `key` never come.
    Silent { key: String },
    /// The first body of `key` has one bit wrong.
    DamagedOnce { key: String },
    /// Every access is refused.
    Denied,
}

#[derive(Debug)]
pub struct FaultyStore {
    inner: Arc<InMemory>,
    fault: Mutex<Option<Fault>>,
    pub bodies: AtomicUsize,
}

impl FaultyStore {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { inner: Arc::new(InMemory::new()), fault: Mutex::new(None), bodies: AtomicUsize::new(0) })
    }

    pub fn fail(&self, fault: Fault) {
        *self.fault.lock().unwrap() = Some(fault);
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

    async fn answer(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let head = options.head;
        let fault = self.fault();
        if matches!(fault, Some(Fault::Denied)) {
            return Err(object_store::Error::PermissionDenied { path: location.to_string(), source: "no".into() });
        }
        let mut answer = self.inner.get_opts(location, options).await?;
        if head {
            return Ok(answer);
        }
        self.bodies.fetch_add(1, Ordering::Relaxed);
        let mut body = std::mem::replace(&mut answer.payload, GetResultPayload::Stream(stream::empty().boxed()));
        match fault {
            Some(Fault::Cut { key, bytes }) if key == location.as_ref() => {
                let whole = collect(body).await?;
                body = GetResultPayload::Stream(stream::iter([Ok(whole.slice(..bytes))]).boxed());
            }
            Some(Fault::Silent { key }) if key == location.as_ref() => {
                body = GetResultPayload::Stream(stream::pending().boxed());
            }
            Some(Fault::DamagedOnce { key }) if key == location.as_ref() => {
                *self.fault.lock().unwrap() = None;
                let mut whole = collect(body).await?.to_vec();
                whole[0] ^= 1;
                body = GetResultPayload::Stream(stream::iter([Ok(Bytes::from(whole))]).boxed());
            }
            _ => {}
        }
        answer.payload = body;
        Ok(answer)
    }
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
        match self.fault() {
            Some(Fault::ListBreaks { objects }) => {
                let broken = object_store::Error::Generic { store: "test", source: "page 2 is missing".into() };
                listed.take(objects).chain(stream::iter([Err(broken)])).boxed()
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
    let limits = Limits { stall: Duration::from_millis(50), ..Limits::default() };
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
