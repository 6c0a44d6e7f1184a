//! The control conversation over real sockets: versions, bounds, refusals.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::path::PathBuf;
use std::time::Duration;

use grail_ipc::connection::{Connection, ConnectionError};
use grail_ipc::control::{
    self, CONTROL_VERSION, ControlClient, ControlError, FromSupervisor, Greeting, MAX_REQUEST_BYTES, Patience, Refusal,
    RefusalKind, ToSupervisor,
};
use grail_ipc::framing::FrameError;
use grail_ipc::socket::{Folder, Listener, PeerError, check_operator, connect};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;

const LONG: Duration = Duration::from_secs(20);
const PATIENCE: Patience = Patience { turn: LONG, idle: LONG, pause: Duration::ZERO };

type Client = ControlClient<String, String>;
type RawClient = Connection<ToSupervisor<String>, FromSupervisor<String>>;

/// A server of one client that repeats requests and refuses `no`.
async fn server(patience: Patience) -> (TempDir, PathBuf, JoinHandle<Result<(), ControlError>>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let listener = Listener::bind(&path, Folder::Any).await.unwrap();
    let served = tokio::spawn(async move {
        let (stream, uid) = listener.accept_any().await.unwrap();
        assert_eq!(uid, Some(nix::unistd::geteuid().as_raw()));
        control::serve(stream, patience, |request: String| match request.as_str() {
            "no" => Err(Refusal { kind: RefusalKind::Request, reason: "not now".into() }),
            _ => Ok(format!("{request}!")),
        })
        .await
    });
    (folder, path, served)
}

#[tokio::test]
async fn requests_are_answered_in_turn_and_a_refusal_does_not_end_it() {
    let (_folder, path, served) = server(PATIENCE).await;
    let mut client = Client::connect(&path, LONG).await.unwrap();
    assert_eq!(client.peer(), &Greeting::ours());
    assert_eq!(client.request("a".into()).await.unwrap(), "a!");
    let refused = client.request("no".into()).await.unwrap_err();
    assert_eq!(refused.to_string(), "not now");
    assert!(!refused.is_not_permitted());
    assert_eq!(client.request("b".into()).await.unwrap(), "b!");
    drop(client);
    served.await.unwrap().unwrap();
}

#[tokio::test]
async fn another_version_is_refused_with_both_numbers_on_both_ends() {
    let (_folder, path, served) = server(PATIENCE).await;
    let mut old: RawClient = Connection::new(connect(&path, LONG).await.unwrap());
    assert!(matches!(old.recv().await.unwrap(), Some(FromSupervisor::Greeting(_))));
    let greeting = Greeting { protocol: 9, build: "9.1".into(), pid: 1 };
    old.send(&ToSupervisor::Greeting(greeting)).await.unwrap();
    let Some(FromSupervisor::Refused(refusal)) = old.recv().await.unwrap() else { panic!("a refusal is due") };
    let both = format!("control protocol 9 (build 9.1), this build speaks {CONTROL_VERSION}");
    assert!(refusal.reason.contains(&both) && refusal.kind == RefusalKind::Version, "{refusal:?}");
    assert!(served.await.unwrap().unwrap_err().to_string().contains(&both));

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let listener = Listener::bind(&path, Folder::Any).await.unwrap();
    let newer = async {
        let (stream, _) = listener.accept_any().await.unwrap();
        let mut connection: Connection<FromSupervisor<String>, ToSupervisor<String>> = Connection::new(stream);
        let greeting = Greeting { protocol: 8, build: "8.0".into(), pid: 1 };
        connection.send(&FromSupervisor::Greeting(greeting)).await.unwrap();
        connection
    };
    let (_open, client) = tokio::join!(newer, Client::connect(&path, LONG));
    assert!(matches!(client.unwrap_err(), ControlError::Version { ours: CONTROL_VERSION, theirs: 8, .. }));
}

#[tokio::test]
async fn a_request_over_the_limit_ends_the_conversation() {
    let (_folder, path, served) = server(PATIENCE).await;
    let mut client = Client::connect(&path, LONG).await.unwrap();
    client.request("x".repeat(MAX_REQUEST_BYTES)).await.unwrap_err();
    let error = served.await.unwrap().unwrap_err();
    let ControlError::Connection(ConnectionError::Frame(FrameError::TooLong { limit_bytes, .. })) = error else {
        panic!("{error:?}")
    };
    assert_eq!(limit_bytes, MAX_REQUEST_BYTES);
}

#[tokio::test]
async fn who_says_nothing_is_dropped() {
    let short = Duration::from_millis(20);
    let (_folder, path, served) = server(Patience { turn: short, ..PATIENCE }).await;
    let _silent = connect(&path, LONG).await.unwrap();
    assert!(matches!(served.await.unwrap(), Err(ControlError::Deadline { awaited: "greeting", .. })));

    let (_folder, path, served) = server(Patience { idle: short, ..PATIENCE }).await;
    let _idle = Client::connect(&path, LONG).await.unwrap();
    assert!(matches!(served.await.unwrap(), Err(ControlError::Deadline { awaited: "request", .. })));
}

#[tokio::test]
async fn noise_instead_of_a_greeting_is_refused() {
    let (_folder, path, served) = server(PATIENCE).await;
    let mut noisy = connect(&path, LONG).await.unwrap();
    noisy.write_all(&[0xff; 64]).await.unwrap();
    let error = served.await.unwrap().unwrap_err();
    assert!(matches!(error, ControlError::Connection(ConnectionError::Frame(_))), "{error:?}");
}

#[tokio::test]
async fn who_is_turned_away_is_told_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let listener = Listener::bind(&path, Folder::Any).await.unwrap();
    let turned_away = async {
        let (stream, _) = listener.accept_any().await.unwrap();
        let refusal = Refusal { kind: RefusalKind::NotPermitted, reason: "not you".into() };
        control::turn_away(stream, refusal, LONG).await;
    };
    let (client, ()) = tokio::join!(Client::connect(&path, LONG), turned_away);
    let error = client.unwrap_err();
    assert!(error.is_not_permitted() && error.to_string() == "not you", "{error}");
    drop(listener);
    assert!(Client::connect(&path, LONG).await.unwrap_err().is_nobody_there());
}

#[test]
fn our_own_user_and_root_are_operators() {
    assert_eq!(check_operator(Some(1_000), 1_000), Ok(()));
    assert_eq!(check_operator(Some(0), 1_000), Ok(()));
    assert_eq!(check_operator(Some(1_001), 1_000), Err(PeerError::OtherUid { peer: 1_001, ours: 1_000 }));
    assert_eq!(check_operator(None, 1_000), Err(PeerError::UnknownUid));
}
