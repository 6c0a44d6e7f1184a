//! Handshakes over real sockets: who is let in and who is not.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::time::Duration;

use grail_ipc::connection::Connection;
use grail_ipc::handshake::{self, Expected, HandshakeError};
use grail_ipc::messages::{Epoch, FromWorker, Hello, PROTOCOL_VERSION, RequestId, SlotId, ToWorker, Welcome};
use grail_ipc::socket::{Folder, Listener, PeerError, RuntimeFolder, SocketError, check_uid, connect};
use grail_ipc::token::Token;
use tempfile::TempDir;

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(50);

struct Place {
    _folder: TempDir,
    path: PathBuf,
}

fn place() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let runtime = RuntimeFolder::create(&folder.path().join("run")).unwrap();
    Place { path: runtime.socket("worker-0.sock").unwrap(), _folder: folder }
}

fn token() -> Token {
    Token::from([5; 32])
}

fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        build: "test".into(),
        slot: SlotId(1),
        epoch: Epoch(4),
        token: token().as_bytes().to_vec(),
        pid: std::process::id(),
        device: "cpu".into(),
        weights: None,
    }
}

fn expected() -> Expected {
    Expected::child(SlotId(1), Epoch(4), token())
}

type WorkerEnd = Connection<FromWorker, ToWorker>;
type SupervisorEnd = Connection<ToWorker, FromWorker>;

/// Both ends of a handshake in which the worker says `hello`.
async fn shake(
    hello: Hello,
    expected: Expected,
) -> (Result<(WorkerEnd, Welcome), HandshakeError>, Result<(SupervisorEnd, Hello), HandshakeError>) {
    let place = place();
    let listener = Listener::bind(&place.path, Folder::Private).await.unwrap();
    let worker = async {
        let stream = listener.accept().await.unwrap();
        handshake::greet::<FromWorker, ToWorker>(stream, hello, LONG).await
    };
    tokio::join!(worker, handshake::connect::<ToWorker, FromWorker>(&place.path, &expected, LONG))
}

#[tokio::test]
async fn a_good_handshake_gives_both_ends_a_connection() {
    let (worker, supervisor) = shake(hello(), expected()).await;
    let (mut worker, welcome) = worker.unwrap();
    let (mut supervisor, heard) = supervisor.unwrap();
    assert_eq!((welcome.protocol, welcome.epoch), (PROTOCOL_VERSION, Epoch(4)));
    assert_eq!(heard, hello());
    supervisor.send(&ToWorker::Ping { id: RequestId(1) }).await.unwrap();
    assert_eq!(worker.recv().await.unwrap(), Some(ToWorker::Ping { id: RequestId(1) }));
    drop(supervisor);
    assert_eq!(worker.recv().await.unwrap(), None, "the end is seen");
}

#[tokio::test]
async fn a_wrong_hello_is_refused_and_the_worker_sees_a_hang_up() {
    let cases: [(Hello, &str); 5] = [
        (Hello { protocol: 99, build: "9.9".into(), ..hello() }, "protocol 99 (build 9.9), this build speaks 2"),
        (Hello { token: vec![6; 32], ..hello() }, "token of slot 1"),
        (Hello { token: vec![], ..hello() }, "token of slot 1"),
        (Hello { slot: SlotId(2), ..hello() }, "peer is slot 2, slot 1 was started"),
        (Hello { epoch: Epoch(3), ..hello() }, "peer is incarnation 3, 4 was started"),
    ];
    for (hello, text) in cases {
        let (worker, supervisor) = shake(hello, expected()).await;
        let error = supervisor.unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
        assert!(matches!(worker.unwrap_err(), HandshakeError::HungUp { awaited: "welcome" }));
    }
}

#[tokio::test]
async fn whoever_stands_alone_is_asked_for_the_version_only() {
    let alone = Hello { token: vec![], slot: SlotId(9), epoch: Epoch(0), ..hello() };
    let (worker, supervisor) = shake(alone, Expected::default()).await;
    assert_eq!(worker.unwrap().1.epoch, Epoch(0));
    assert_eq!(supervisor.unwrap().1.slot, SlotId(9));
}

#[tokio::test]
async fn a_supervisor_of_another_version_or_epoch_is_refused_by_the_worker() {
    let wrong = [
        (Welcome { protocol: 7, build: "7.0".into(), epoch: Epoch(4) }, "protocol 7 (build 7.0), this build speaks 2"),
        (Welcome { protocol: PROTOCOL_VERSION, build: String::new(), epoch: Epoch(5) }, "incarnation 5, 4 was started"),
    ];
    for (welcome, text) in wrong {
        let place = place();
        let listener = Listener::bind(&place.path, Folder::Private).await.unwrap();
        let supervisor = async {
            let mut connection = SupervisorEnd::new(connect(&place.path, LONG).await.unwrap());
            connection.recv().await.unwrap();
            connection.send(&ToWorker::Welcome(welcome)).await.unwrap();
            connection
        };
        let worker = async {
            let stream = listener.accept().await.unwrap();
            handshake::greet::<FromWorker, ToWorker>(stream, hello(), LONG).await
        };
        let (_open, greeted) = tokio::join!(supervisor, worker);
        let error = greeted.unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
}

#[tokio::test]
async fn silence_and_other_words_end_the_handshake() {
    let place = place();
    let listener = Listener::bind(&place.path, Folder::Private).await.unwrap();
    let silent = connect(&place.path, LONG).await.unwrap();
    let greeted = handshake::greet::<FromWorker, ToWorker>(listener.accept().await.unwrap(), hello(), SHORT).await;
    assert!(matches!(greeted.unwrap_err(), HandshakeError::Deadline { awaited: "welcome", .. }));
    drop(silent);

    let mut hasty = SupervisorEnd::new(connect(&place.path, LONG).await.unwrap());
    hasty.send(&ToWorker::Shutdown).await.unwrap();
    let greeted = handshake::greet::<FromWorker, ToWorker>(listener.accept().await.unwrap(), hello(), LONG).await;
    assert!(matches!(greeted.unwrap_err(), HandshakeError::Unexpected { awaited: "welcome" }));

    // A worker that loads for ever: connected, but no hello.
    let slow = handshake::connect::<ToWorker, FromWorker>(&place.path, &expected(), SHORT).await;
    assert!(matches!(slow.unwrap_err(), HandshakeError::Deadline { awaited: "hello", .. }));
}

#[tokio::test]
async fn garbage_instead_of_a_hello_is_an_error() {
    use tokio::io::AsyncWriteExt;
    for garbage in [&[0xff; 16][..], &[3, 0, 0, 0, 1, 2, 3]] {
        let place = place();
        let listener = Listener::bind(&place.path, Folder::Private).await.unwrap();
        let expected = expected();
        let worker = async {
            let mut stream = listener.accept().await.unwrap();
            stream.write_all(garbage).await.unwrap();
            stream
        };
        let (_open, greeted) =
            tokio::join!(worker, handshake::connect::<ToWorker, FromWorker>(&place.path, &expected, LONG));
        assert!(matches!(greeted.unwrap_err(), HandshakeError::Connection(_)));
    }
}

#[tokio::test]
async fn connecting_waits_for_the_listener_and_no_longer_than_its_limit() {
    let place = place();
    let nobody = connect(&place.path, SHORT).await.unwrap_err();
    assert!(matches!(nobody, SocketError::NobodyListens { source: Some(_), .. }), "{nobody}");
    let late = async {
        tokio::task::yield_now().await;
        let listener = Listener::bind(&place.path, Folder::Private).await.unwrap();
        listener.accept().await.unwrap();
    };
    let (connected, ()) = tokio::join!(connect(&place.path, LONG), late);
    connected.unwrap();
}

#[tokio::test]
async fn a_listener_unlinks_its_path_and_replaces_only_a_dead_one() {
    let place = place();
    let listener = Listener::bind(&place.path, Folder::Private).await.unwrap();
    let mode = std::fs::metadata(&place.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = Listener::bind(&place.path, Folder::Private).await.unwrap_err();
    assert!(matches!(second, SocketError::InUse { .. }), "{second}");
    drop(listener);
    assert!(!place.path.exists());

    // What a process that was killed leaves behind.
    drop(std::os::unix::net::UnixListener::bind(&place.path).unwrap());
    assert!(place.path.exists());
    Listener::bind(&place.path, Folder::Private).await.unwrap();
}

#[tokio::test]
async fn a_folder_that_others_may_enter_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let open = folder.path().join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, PermissionsExt::from_mode(0o750)).unwrap();
    let refused = RuntimeFolder::create(&open).unwrap_err();
    assert!(refused.to_string().contains("with 0750"), "{refused}");
    assert!(Listener::bind(&open.join("s"), Folder::Private).await.is_err());
    Listener::bind(&open.join("s"), Folder::Any).await.unwrap();

    let real = folder.path().join("real");
    RuntimeFolder::create(&real).unwrap();
    RuntimeFolder::create(&real).expect("an existing private folder is fine");
    let link = folder.path().join("link");
    symlink(&real, &link).unwrap();
    assert!(matches!(RuntimeFolder::create(&link), Err(SocketError::FolderNotPrivate { .. })));
}

#[test]
fn paths_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = RuntimeFolder::create(&folder.path().join("run")).unwrap();
    let refused = runtime.socket(&"x".repeat(107)).unwrap_err();
    assert!(matches!(refused, SocketError::PathTooLong { .. }), "{refused}");
}

#[test]
fn only_our_own_uid_is_let_in() {
    assert_eq!(check_uid(Some(1_000), 1_000), Ok(()));
    assert_eq!(check_uid(Some(0), 1_000), Err(PeerError::OtherUid { peer: 0, ours: 1_000 }));
    assert_eq!(check_uid(Some(1_001), 1_000), Err(PeerError::OtherUid { peer: 1_001, ours: 1_000 }));
    assert_eq!(check_uid(None, 1_000), Err(PeerError::UnknownUid));
}
