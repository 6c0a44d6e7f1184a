//! Local sockets: the private runtime folder, listening and connecting with the peer's uid checked.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use interprocess::local_socket::tokio::prelude::*;
use interprocess::local_socket::traits::StreamCommon;
use interprocess::local_socket::{GenericFilePath, ListenerOptions, PeerCreds};
use interprocess::os::unix::local_socket::ListenerOptionsExt;
use nix::unistd::geteuid;
use tokio::net::UnixStream;
use tracing::warn;

/// The longest path of a socket, in bytes: `sun_path` less its terminating zero.
pub const MAX_SOCKET_PATH_BYTES: usize = 107;

/// First and longest pause between two attempts to connect.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// A socket that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    #[error("create runtime folder {}", path.display())]
    CreateFolder {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "use folder {} for sockets: it must belong to uid {uid} with mode 0700, but belongs to {owner} with {mode:04o}",
        path.display()
    )]
    FolderNotPrivate { path: PathBuf, uid: u32, owner: u32, mode: u32 },
    #[error("use socket {}: its path is longer than {MAX_SOCKET_PATH_BYTES} bytes", path.display())]
    PathTooLong { path: PathBuf },
    #[error("listen on {}: another process listens there", path.display())]
    InUse { path: PathBuf },
    #[error("listen on {}", path.display())]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("accept a connection on {}", path.display())]
    Accept {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("connect to {}: nobody listened there within {limit:?}", path.display())]
    NobodyListens {
        path: PathBuf,
        limit: Duration,
        #[source]
        source: Option<io::Error>,
    },
    #[error("connect to {}", path.display())]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Peer(#[from] PeerError),
}

/// A peer that is refused before a byte is exchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    #[error("refuse a peer of uid {peer}: this process runs as uid {ours}")]
    OtherUid { peer: u32, ours: u32 },
    #[error("refuse a peer whose uid the system does not tell")]
    UnknownUid,
}

/// Decides about a peer: it must be of our own user; root is no exception.
///
/// # Errors
/// [`PeerError`].
pub fn check_uid(peer: Option<u32>, ours: u32) -> Result<(), PeerError> {
    match peer {
        Some(peer) if peer == ours => Ok(()),
        Some(peer) => Err(PeerError::OtherUid { peer, ours }),
        None => Err(PeerError::UnknownUid),
    }
}

/// Decides about a peer that gives orders to a supervisor: our own user, or root, who could do worse without asking.
///
/// # Errors
/// [`PeerError`].
pub fn check_operator(peer: Option<u32>, ours: u32) -> Result<(), PeerError> {
    if peer == Some(0) { Ok(()) } else { check_uid(peer, ours) }
}

/// A folder of mode 0700 that belongs to us, for sockets.
#[derive(Debug, Clone)]
pub struct RuntimeFolder {
    path: PathBuf,
}

impl RuntimeFolder {
    /// Makes the folder if it is missing (its parents too) and checks it.
    ///
    /// # Errors
    /// [`SocketError::CreateFolder`], [`SocketError::FolderNotPrivate`].
    pub fn create(path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::CreateFolder { path: path.to_owned(), source };
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(error)),
        }
        check_private(path)?;
        Ok(Self { path: path.to_owned() })
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path of the socket `name` in it.
    ///
    /// # Errors
    /// [`SocketError::PathTooLong`].
    pub fn socket(&self, name: &str) -> Result<PathBuf, SocketError> {
        let path = self.path.join(name);
        check_length(&path)?;
        Ok(path)
    }
}

/// Refuses a folder that others may enter.
fn check_private(path: &Path) -> Result<(), SocketError> {
    // Not the target of a link: whoever owns the link could turn it elsewhere.
    let metadata = std::fs::symlink_metadata(path)
        .map_err(|source| SocketError::CreateFolder { path: path.to_owned(), source })?;
    let (uid, mode) = (geteuid().as_raw(), metadata.permissions().mode() & 0o7777);
    if !metadata.is_dir() || metadata.uid() != uid || mode & 0o077 != 0 {
        return Err(SocketError::FolderNotPrivate { path: path.to_owned(), uid, owner: metadata.uid(), mode });
    }
    Ok(())
}

fn check_length(path: &Path) -> Result<(), SocketError> {
    if path.as_os_str().len() > MAX_SOCKET_PATH_BYTES {
        return Err(SocketError::PathTooLong { path: path.to_owned() });
    }
    Ok(())
}

/// Who may reach the folder of a listening socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Folder {
    /// Only we: what a supervisor prepares for its children.
    Private,
    /// Anybody: a process that stands alone relies on the socket's mode and the uid check.
    Any,
}

/// A listening socket of mode 0600; dropping it unlinks the path.
#[derive(Debug)]
pub struct Listener {
    inner: interprocess::local_socket::tokio::Listener,
    path: PathBuf,
}

impl Listener {
    /// Listens on `path`. A socket file that a dead process left there is replaced.
    ///
    /// # Errors
    /// [`SocketError`], [`SocketError::InUse`] if somebody listens there.
    pub async fn bind(path: &Path, folder: Folder) -> Result<Self, SocketError> {
        check_length(path)?;
        if let (Folder::Private, Some(parent)) = (folder, path.parent()) {
            check_private(parent)?;
        }
        let failed = |source| SocketError::Listen { path: path.to_owned(), source };
        let listen = || {
            let name = path.to_fs_name::<GenericFilePath>()?;
            ListenerOptions::new().name(name).mode(0o600).create_tokio()
        };
        let inner = match listen() {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if connect_once(path).await.is_ok() {
                    return Err(SocketError::InUse { path: path.to_owned() });
                }
                std::fs::remove_file(path).map_err(failed)?;
                listen().map_err(failed)?
            }
            other => other.map_err(failed)?,
        };
        Ok(Self { inner, path: path.to_owned() })
    }

    /// The path it listens on.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next peer of our own user; others are dropped with a warning. Safe to cancel.
    ///
    /// # Errors
    /// [`SocketError::Accept`].
    pub async fn accept(&self) -> Result<UnixStream, SocketError> {
        loop {
            let (stream, uid) = self.accept_any().await?;
            match check_uid(uid, geteuid().as_raw()) {
                Ok(()) => return Ok(stream),
                Err(error) => warn!(socket = %self.path.display(), %error, "Refused a peer."),
            }
        }
    }

    /// The next peer, whoever it is, with its uid; the caller decides about it. Safe to cancel.
    ///
    /// # Errors
    /// [`SocketError::Accept`].
    pub async fn accept_any(&self) -> Result<(UnixStream, Option<u32>), SocketError> {
        let stream =
            self.inner.accept().await.map_err(|source| SocketError::Accept { path: self.path.clone(), source })?;
        let uid = uid_of(&stream);
        Ok((into_tokio(stream), uid))
    }
}

/// Connects to `path`, trying again until `limit` has passed while nobody listens there, and checks the peer's uid.
///
/// # Errors
/// [`SocketError::NobodyListens`] after `limit`, [`SocketError::Peer`], [`SocketError::Connect`] for what waiting does not cure.
pub async fn connect(path: &Path, limit: Duration) -> Result<UnixStream, SocketError> {
    let (stream, uid) = connect_any(path, limit).await?;
    check_uid(uid, geteuid().as_raw())?;
    Ok(stream)
}

/// [`connect`] without the check of the peer's uid, which is handed to the caller.
///
/// # Errors
/// As [`connect`], but [`SocketError::Peer`].
pub async fn connect_any(path: &Path, limit: Duration) -> Result<(UnixStream, Option<u32>), SocketError> {
    check_length(path)?;
    let mut last = None;
    let attempts = async {
        let mut pause = FIRST_PAUSE;
        loop {
            match connect_once(path).await {
                Ok(stream) => return Ok(stream),
                Err(error) if is_curable(&error) => last = Some(error),
                Err(source) => return Err(SocketError::Connect { path: path.to_owned(), source }),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    };
    let Ok(attempt) = tokio::time::timeout(limit, attempts).await else {
        return Err(SocketError::NobodyListens { path: path.to_owned(), limit, source: last });
    };
    let stream = attempt?;
    let uid = uid_of(&stream);
    Ok((into_tokio(stream), uid))
}

fn is_curable(error: &io::Error) -> bool {
    // `NotConnected`: the listener's backlog was full.
    matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::NotConnected
            | io::ErrorKind::WouldBlock
            | io::ErrorKind::Interrupted
    )
}

async fn connect_once(path: &Path) -> io::Result<LocalSocketStream> {
    let stream = LocalSocketStream::connect(path.to_fs_name::<GenericFilePath>()?).await?;
    let LocalSocketStream::UdSocket(socket) = &stream;
    // With a full backlog the socket becomes writable without being connected.
    socket.inner().peer_addr()?;
    Ok(stream)
}

/// Effective uid of the process at the other end (SO_PEERCRED).
fn uid_of(stream: &LocalSocketStream) -> Option<u32> {
    stream.peer_creds().ok().as_ref().and_then(PeerCreds::euid)
}

fn into_tokio(stream: LocalSocketStream) -> UnixStream {
    let LocalSocketStream::UdSocket(stream) = stream;
    stream.into()
}
