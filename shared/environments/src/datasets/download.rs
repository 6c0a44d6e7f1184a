//! Downloads from the hub, into the cache that its Python tools share.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use reqwest::{Client, Response, StatusCode, Url};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::error::HubAnswer;
use super::file::MAX_BYTES;
use super::hub_cache::{self, is_commit};
use super::located::{Layout, Located};
use super::published::{self, Part};
use super::settings::HubSettings;
use super::snapshot;
use crate::id::EnvironmentId;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For one file, of a few megabytes at most.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(500);
/// Largest answer about a repository.
const MAX_INFO_BYTES: u64 = 4 << 20;

/// Why nothing was downloaded.
#[derive(Debug, thiserror::Error)]
pub(super) enum DownloadError {
    #[error("not asked, since HF_HUB_OFFLINE is set")]
    Offline,
    #[error("nowhere to put the files: neither HF_HOME nor HOME is set")]
    Homeless,
    #[error("{0:?} is no address; correct HF_ENDPOINT")]
    Endpoint(String),
    #[error("the user or password in HF_ENDPOINT is not encoded as a part of an address; correct HF_ENDPOINT")]
    Credentials,
    #[error("no client: {}", chain(.0))]
    Client(#[source] reqwest::Error),
    #[error("{url}: {}", chain(source))]
    Request { url: String, source: reqwest::Error },
    #[error("{url}: status {status}")]
    Status { url: String, status: StatusCode },
    #[error("{url}: more than {limit} bytes")]
    TooLarge { url: String, limit: u64 },
    #[error("{url}: {source}")]
    Info { url: String, source: serde_json::Error },
    #[error("{url}: {found:?} is no commit")]
    NoCommit { url: String, found: String },
    #[error("{repository} at {commit}: {reason}")]
    NoFiles { repository: &'static str, commit: String, reason: String },
    #[error("{repository}: {name:?} is no name of a file in a snapshot")]
    Name { repository: &'static str, name: String },
    #[error("{url} has SHA-256 {actual}, the hub promised {promised}")]
    Content { url: String, actual: String, promised: String },
    #[error("writing {}: {source}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
}

impl DownloadError {
    /// What this says of the hub's answer.
    pub(super) fn answer(&self) -> HubAnswer {
        use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        let may_come = |status: StatusCode| status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
        match self {
            Self::Request { .. } | Self::Info { .. } | Self::Content { .. } => HubAnswer::None,
            Self::Status { status, .. } if may_come(*status) => HubAnswer::None,
            Self::Write { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge) => {
                HubAnswer::NoSpaceHere
            }
            _ => HubAnswer::No,
        }
    }
}

/// All that a request's failure says: the first message alone hides the cause.
fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// What the hub says about a commit.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    /// Name of the file's content in git.
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

/// Brings the files of `parts` into the hub's cache.
///
/// `revision` is resolved once; what the cache already takes it for stays, so that all splits are of one commit.
pub(super) async fn download(
    hub: &HubSettings,
    environment: EnvironmentId,
    revision: &str,
    parts: &[Part],
) -> Result<Located, DownloadError> {
    if hub.is_offline {
        return Err(DownloadError::Offline);
    }
    let cache = hub.cache.as_deref().ok_or(DownloadError::Homeless)?;
    let repository = published::repositories(environment).first().copied().unwrap_or_default();
    let folder = hub_cache::folder(cache, repository);
    let known = hub_cache::commit_of(&folder, revision);
    let (endpoint, credentials) = endpoint(hub)?;
    let repository = Repository { client: client()?, endpoint, credentials, name: repository, folder };
    let info = repository.info(known.as_deref().unwrap_or(revision)).await?;
    tracing::info!(%environment, repository = repository.name, revision, commit = %info.sha, "Downloading a data set.");
    let files = repository.bring(&info, parts).await?;
    if !is_commit(revision) {
        let reference = repository.folder.join("refs").join(revision);
        write(&reference, |path| std::fs::write(path, &info.sha))?;
    }
    let place = repository.snapshot(&info).display().to_string();
    Ok(Located { place, commit: Some(info.sha), layout: Layout::PerPart(files) })
}

fn client() -> Result<Client, DownloadError> {
    let agent = concat!("grail-supervisor/", env!("CARGO_PKG_VERSION"));
    let builder = Client::builder().user_agent(agent).connect_timeout(CONNECT_TIMEOUT).timeout(REQUEST_TIMEOUT);
    builder.build().map_err(DownloadError::Client)
}

/// Who asks the hub. Not shown: addresses are in messages, and these are not in addresses.
struct Credentials {
    user: String,
    password: Option<String>,
}

/// The hub's address, and who asks if the address says so.
fn endpoint(hub: &HubSettings) -> Result<(Url, Option<Credentials>), DownloadError> {
    let wrong = || DownloadError::Endpoint(hub.shown_endpoint());
    let mut url = Url::parse(&hub.endpoint).map_err(|_| wrong())?;
    if url.cannot_be_a_base() {
        return Err(wrong());
    }
    if url.username().is_empty() && url.password().is_none() {
        return Ok((url, None));
    }
    let plain = |text: &str| {
        let decoded = percent_encoding::percent_decode_str(text).decode_utf8();
        decoded.map(|text| text.into_owned()).map_err(|_| DownloadError::Credentials)
    };
    let credentials = Credentials { user: plain(url.username())?, password: url.password().map(plain).transpose()? };
    url.set_username("").and_then(|()| url.set_password(None)).map_err(|()| wrong())?;
    Ok((url, Some(credentials)))
}

/// Calls `make` with `path` after making its folder.
fn write<T>(path: &Path, make: impl FnOnce(&Path) -> std::io::Result<T>) -> Result<T, DownloadError> {
    let made = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| make(path));
    made.map_err(|source| DownloadError::Write { path: path.to_owned(), source })
}

struct Repository {
    client: Client,
    endpoint: Url,
    credentials: Option<Credentials>,
    name: &'static str,
    /// Its folder in the cache.
    folder: PathBuf,
}

impl Repository {
    fn snapshot(&self, info: &Info) -> PathBuf {
        self.folder.join("snapshots").join(&info.sha)
    }

    /// Address below the endpoint.
    fn url(&self, segments: &[&str]) -> Url {
        let mut url = self.endpoint.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments.iter().flat_map(|segment| segment.split('/')));
        }
        url
    }

    async fn info(&self, revision: &str) -> Result<Info, DownloadError> {
        let mut url = self.url(&["api/datasets", self.name, "revision", revision]);
        url.set_query(Some("blobs=true"));
        let text = self.get(&url, MAX_INFO_BYTES).await?;
        let info: Info =
            serde_json::from_slice(&text).map_err(|source| DownloadError::Info { url: url.to_string(), source })?;
        if is_commit(&info.sha) { Ok(info) } else { Err(DownloadError::NoCommit { url: url.into(), found: info.sha }) }
    }

    /// Paths of each part's files, which are in the snapshot then.
    async fn bring(&self, info: &Info, parts: &[Part]) -> Result<Vec<Vec<PathBuf>>, DownloadError> {
        let names: Vec<String> = info.siblings.iter().map(|sibling| sibling.rfilename.clone()).collect();
        let files = |readme: Option<&str>| -> Result<Vec<Vec<String>>, String> {
            parts.iter().map(|part| snapshot::files_of(&names, readme, part)).collect()
        };
        let found = match files(None) {
            Ok(found) => found,
            Err(_) => {
                let readme = self.readme(info).await?;
                files(readme.as_deref()).map_err(|reason| DownloadError::NoFiles {
                    repository: self.name,
                    commit: info.sha.clone(),
                    reason,
                })?
            }
        };
        let mut paths = Vec::with_capacity(found.len());
        for names in found {
            let mut of_part = Vec::with_capacity(names.len());
            for name in names {
                of_part.push(self.fetch(info, &name).await?);
            }
            paths.push(of_part);
        }
        Ok(paths)
    }

    async fn readme(&self, info: &Info) -> Result<Option<String>, DownloadError> {
        const NAME: &str = "README.md";
        if !info.siblings.iter().any(|sibling| sibling.rfilename == NAME) {
            return Ok(None);
        }
        let path = self.fetch(info, NAME).await?;
        std::fs::read_to_string(&path).map(Some).map_err(|source| DownloadError::Write { path, source })
    }

    /// Path in the snapshot of the file `name`, downloaded unless it is there.
    async fn fetch(&self, info: &Info, name: &str) -> Result<PathBuf, DownloadError> {
        let is_plain = Path::new(name).components().all(|component| matches!(component, Component::Normal(_)));
        if !is_plain {
            return Err(DownloadError::Name { repository: self.name, name: name.to_owned() });
        }
        let path = self.snapshot(info).join(name);
        if path.is_file() {
            return Ok(path);
        }
        let url = self.url(&["datasets", self.name, "resolve", &info.sha, name]);
        let content = self.get(&url, MAX_BYTES).await?;
        let actual = hex::encode(Sha256::digest(&content));
        let sibling = info.siblings.iter().find(|sibling| sibling.rfilename == name);
        let promised = sibling.and_then(|sibling| sibling.lfs.as_ref()).map(|lfs| lfs.sha256.clone());
        if let Some(promised) = promised.filter(|promised| *promised != actual) {
            return Err(DownloadError::Content { url: url.into(), actual, promised });
        }
        let git_name = sibling.filter(|sibling| sibling.lfs.is_none()).and_then(|sibling| sibling.blob_id.clone());
        let blob = git_name.filter(|id| is_commit(id)).unwrap_or(actual);
        self.store(&path, name, &blob, &content)?;
        tracing::debug!(repository = self.name, file = name, bytes = content.len(), "A file is downloaded.");
        Ok(path)
    }

    /// Puts `content` beside the other blobs and links `path` to it.
    fn store(&self, path: &Path, name: &str, blob: &str, content: &[u8]) -> Result<(), DownloadError> {
        let blobs = self.folder.join("blobs");
        write(&blobs.join(blob), |target| {
            // Renamed when whole, so that nobody reads half of it.
            let mut file = tempfile::NamedTempFile::new_in(&blobs)?;
            std::io::Write::write_all(&mut file, content)?;
            file.as_file().sync_all()?;
            file.persist(target).map_err(|error| error.error)
        })?;
        let up = "../".repeat(name.split('/').count() + 1);
        write(path, |path| {
            // A link that leads nowhere is left over from a cache that was cleaned in part.
            if path.is_symlink() && !path.exists() {
                std::fs::remove_file(path)?;
            }
            match std::os::unix::fs::symlink(format!("{up}blobs/{blob}"), path) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && path.is_file() => Ok(()),
                made => made,
            }
        })
    }

    /// Content at `url`, tried again where that may help.
    async fn get(&self, url: &Url, limit: u64) -> Result<Vec<u8>, DownloadError> {
        let mut attempt = 1;
        loop {
            let error = match self.get_once(url, limit).await {
                Ok(content) => return Ok(content),
                Err(error) => error,
            };
            let is_passing = match &error {
                DownloadError::Request { .. } => true,
                DownloadError::Status { status, .. } => {
                    status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS
                }
                _ => false,
            };
            if !is_passing || attempt == ATTEMPTS {
                return Err(error);
            }
            tracing::debug!(%url, attempt, %error, "A download failed; trying again.");
            tokio::time::sleep(PAUSE * attempt).await;
            attempt += 1;
        }
    }

    async fn get_once(&self, url: &Url, limit: u64) -> Result<Vec<u8>, DownloadError> {
        let failed =
            |source: reqwest::Error| DownloadError::Request { url: url.to_string(), source: source.without_url() };
        let mut request = self.client.get(url.clone());
        if let Some(Credentials { user, password }) = &self.credentials {
            request = request.basic_auth(user, password.as_ref());
        }
        let mut response: Response = request.send().await.map_err(failed)?;
        let status = response.status();
        if !status.is_success() {
            return Err(DownloadError::Status { url: url.to_string(), status });
        }
        let mut content = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            content.extend_from_slice(&chunk);
            if content.len() as u64 > limit {
                return Err(DownloadError::TooLarge { url: url.to_string(), limit });
            }
        }
        Ok(content)
    }
}
