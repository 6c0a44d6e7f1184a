//! Downloads from a hub on the loopback interface.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};
use grail_environments::datasets::{DatasetError, DatasetSettings, HubAnswer, SourceSettings};
use grail_environments::{EnvironmentId, Split};
use parquet::basic::Compression;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::files::{self, Form, write_parquet};
use crate::{COMMIT, assert_opens, datasets, expected, settings, with_source};

const OTHER: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// What a hub has, and what it was asked.
#[derive(Debug, Default)]
struct Content {
    /// Commit that `main` means.
    main: String,
    /// Files by name, the same in every commit.
    files: BTreeMap<String, Vec<u8>>,
    /// Whether what is said of a file is true.
    lies: bool,
    /// Answers with an error before the first right one.
    failures: usize,
    asked: Vec<String>,
}

#[derive(Clone, Debug)]
struct Hub {
    content: Arc<Mutex<Content>>,
    endpoint: String,
}

impl Hub {
    async fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let content = Content { main: COMMIT.to_owned(), files, ..Content::default() };
        let content = Arc::new(Mutex::new(content));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let endpoint = format!("http://{}", listener.local_addr().expect("it is bound"));
        let router = Router::new().fallback(answer).with_state(Arc::clone(&content));
        tokio::spawn(async move { axum::serve(listener, router).await.expect("the hub serves") });
        Self { content, endpoint }
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().expect("nothing panics while it holds the lock")
    }

    fn settings(&self, home: &Path) -> DatasetSettings {
        let mut settings = settings(home);
        (settings.hub.endpoint, settings.hub.is_offline) = (self.endpoint.clone(), false);
        settings
    }
}

async fn answer(State(content): State<Arc<Mutex<Content>>>, request: Request) -> Response {
    let mut content = content.lock().expect("nothing panics while it holds the lock");
    let path = request.uri().path().to_owned();
    content.asked.push(path.clone());
    if content.failures > 0 {
        content.failures -= 1;
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    if let Some((_, revision)) = path.strip_prefix("/api/datasets/").and_then(|rest| rest.split_once("/revision/")) {
        assert_eq!(request.uri().query(), Some("blobs=true"));
        let sha = if revision == "main" { content.main.clone() } else { revision.to_owned() };
        let sibling = |(name, bytes): (&String, &Vec<u8>)| {
            let sha256 = hex::encode(Sha256::digest(if content.lies { b"else".as_slice() } else { bytes.as_slice() }));
            let id = "c".repeat(40);
            match name.ends_with(".md") {
                true => json!({"rfilename": name, "blobId": id, "size": bytes.len()}),
                false => json!({"rfilename": name, "blobId": id, "lfs": {"sha256": sha256, "size": bytes.len()}}),
            }
        };
        let siblings: Vec<_> = content.files.iter().map(sibling).collect();
        return axum::Json(json!({"id": "x", "sha": sha, "siblings": siblings})).into_response();
    }
    if path.contains("/resolve/") {
        // As the hub does for large files.
        let (_, rest) = path.split_once("/resolve/").expect("it is there");
        let (_, name) = rest.split_once('/').expect("a file has a name");
        return Redirect::temporary(&format!("/content/{name}")).into_response();
    }
    let name = path.strip_prefix("/content/").unwrap_or_default();
    content.files.get(name).map_or(StatusCode::NOT_FOUND.into_response(), |bytes| bytes.clone().into_response())
}

/// Files of MBPP by name in the repository.
fn mbpp() -> BTreeMap<String, Vec<u8>> {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let splits = [("train", 601..=974), ("validation", 511..=600), ("test", 11..=510)];
    let file = |(split, numbers)| {
        let path = folder.path().join("file");
        write_parquet(&path, &files::mbpp(numbers), Form::Plain, Compression::SNAPPY);
        (format!("full/{split}-00000-of-00001.parquet"), std::fs::read(&path).expect("the file is readable"))
    };
    splits.into_iter().map(file).collect()
}

#[tokio::test]
async fn what_is_downloaded_is_in_the_cache() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start(mbpp()).await;
    hub.content().failures = 1;
    assert_opens(hub.settings(home.path()), EnvironmentId::Mbpp, Split::Train).await;
    let asked = std::mem::take(&mut hub.content().asked);
    let info = "/api/datasets/google-research-datasets/mbpp/revision/main";
    assert_eq!(asked[..2], [info, info], "tried again after a failure");
    let resolve = format!("/datasets/google-research-datasets/mbpp/resolve/{COMMIT}/full/");
    assert_eq!(asked.iter().filter(|path| path.starts_with(&resolve)).count(), 2, "{asked:?}");

    let folder = home.path().join("hub/datasets--google-research-datasets--mbpp");
    assert_eq!(std::fs::read_to_string(folder.join("refs/main")).unwrap(), COMMIT);
    let file = folder.join("snapshots").join(COMMIT).join("full/train-00000-of-00001.parquet");
    let blob = hex::encode(Sha256::digest(std::fs::read(&file).unwrap()));
    assert_eq!(std::fs::read_link(&file).unwrap(), Path::new("../../../blobs").join(blob));

    // Read again without a hub.
    assert_opens(settings(home.path()), EnvironmentId::Mbpp, Split::Train).await;
    assert_eq!(hub.content().asked.len(), 0);
}

#[tokio::test]
async fn all_splits_are_of_one_commit() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start(mbpp()).await;
    assert_opens(hub.settings(home.path()), EnvironmentId::Mbpp, Split::Train).await;
    hub.content().main = OTHER.to_owned();
    hub.content().asked.clear();
    assert_opens(hub.settings(home.path()), EnvironmentId::Mbpp, Split::Val).await;
    let asked = std::mem::take(&mut hub.content().asked);
    assert!(asked.iter().all(|path| !path.contains(OTHER) && !path.ends_with("/main")), "{asked:?}");
    assert!(asked[0].ends_with(&format!("/revision/{COMMIT}")), "{asked:?}");
    let resolved = asked.iter().filter(|path| path.contains("/resolve/")).count();
    assert_eq!(resolved, 1, "the test file is there already: {asked:?}");
}

#[tokio::test]
async fn a_pinned_commit_is_asked_for() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start(mbpp()).await;
    let source = SourceSettings { revision: Some(OTHER.to_owned()), ..SourceSettings::default() };
    let pinned = with_source(hub.settings(home.path()), EnvironmentId::Mbpp, source);
    assert_opens(pinned, EnvironmentId::Mbpp, Split::Val).await;
    assert!(hub.content().asked.iter().all(|path| !path.contains(COMMIT) && !path.contains("main")));
    assert!(!home.path().join("hub/datasets--google-research-datasets--mbpp/refs").exists());
}

#[tokio::test]
async fn older_layouts_are_downloaded_by_their_readme() {
    let home = tempfile::tempdir().unwrap();
    let readme = "---\nconfigs:\n- config_name: full\n  data_files:\n  - split: validation\n    path: data/val*\n  \
         - split: test\n    path: data/test.parquet\n---\n";
    let mut files: BTreeMap<_, _> = mbpp();
    for (from, to) in [("validation", "data/val.parquet"), ("test", "data/test.parquet")] {
        let bytes = files.remove(&format!("full/{from}-00000-of-00001.parquet")).unwrap();
        files.insert(to.to_owned(), bytes);
    }
    files.insert("README.md".to_owned(), readme.as_bytes().to_vec());
    let hub = Hub::start(files).await;
    assert_opens(hub.settings(home.path()), EnvironmentId::Mbpp, Split::Val).await;
    assert_opens(settings(home.path()), EnvironmentId::Mbpp, Split::Val).await;
}

#[tokio::test]
async fn what_the_hub_did_not_promise_is_not_kept() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start(mbpp()).await;
    hub.content().lies = true;
    let error = datasets(hub.settings(home.path())).open(EnvironmentId::Mbpp, Split::Val).await.unwrap_err();
    assert!(error.to_string().contains("the hub promised"), "{error}");
    let folder = home.path().join("hub/datasets--google-research-datasets--mbpp");
    assert!(!folder.join("snapshots").exists() && !folder.join("refs").exists());
    // A failure is not remembered.
    let datasets = datasets(hub.settings(home.path()));
    assert!(datasets.open(EnvironmentId::Mbpp, Split::Val).await.is_err());
    hub.content().lies = false;
    let opened = datasets.open(EnvironmentId::Mbpp, Split::Val).await.unwrap();
    assert_eq!(opened.task_count(), expected(EnvironmentId::Mbpp, Split::Val).task_count());
}

#[tokio::test]
async fn no_file_lands_outside_the_cache() {
    let home = tempfile::tempdir().unwrap();
    let readme = "---\nconfigs:\n- config_name: full\n  data_files:\n  - split: validation\n    path: \"**/evil\"\n  \
         - split: test\n    path: \"**/evil\"\n---\n";
    let names = [("README.md", readme), ("../../../../evil", "rows")];
    let hub = Hub::start(names.map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec())).into()).await;
    let error = datasets(hub.settings(home.path())).open(EnvironmentId::Mbpp, Split::Val).await.unwrap_err();
    assert!(error.to_string().contains("is no name of a file in a snapshot"), "{error}");
    assert!(!home.path().join("evil").exists());
}

#[tokio::test]
async fn an_unreachable_hub_is_one_place_of_several() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start(BTreeMap::new()).await;
    let error = datasets(hub.settings(home.path())).open(EnvironmentId::Mbpp, Split::Val).await.unwrap_err();
    assert!(error.to_string().contains("no full/validation-*.parquet"), "{error}");
    let may_come = |error: &DatasetError| matches!(error, DatasetError::NotFound { hub: HubAnswer::None, .. });
    assert!(!may_come(&error), "the hub answered");
    let mut settings = hub.settings(home.path());
    for (endpoint, said, is_temporary) in [
        ("http://127.0.0.1:1", "127.0.0.1", true),
        ("not an address", "correct HF_ENDPOINT", false),
        ("http://me:secret@127.0.0.1:1", "127.0.0.1", true),
        ("http://me:secret@no host", "correct HF_ENDPOINT", false),
    ] {
        settings.hub.endpoint = endpoint.to_owned();
        let error = datasets(settings.clone()).open(EnvironmentId::Mbpp, Split::Val).await.unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
        assert_eq!(may_come(&error), is_temporary, "{error}");
        assert!(!format!("{error:?} {error}").contains("secret"), "{error:?}");
    }
}
