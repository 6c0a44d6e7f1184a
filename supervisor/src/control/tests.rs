use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use grail_checkpoint::retention::RetentionLimits;
use grail_checkpoint::{CheckpointCache, CheckpointStore};
use grail_ipc::control::ControlError;

use super::*;
use crate::progress::Phase;

const LIMIT: Duration = Duration::from_secs(20);

struct World {
    _folder: tempfile::TempDir,
    place: Place,
    facts: Arc<Facts>,
}

impl World {
    fn new(fleet: FleetHandle) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let store = CheckpointStore::new(Arc::new(object_store::memory::InMemory::new()));
        let cache = CheckpointCache::open(root.join("checkpoints")).unwrap();
        let limits = RetentionLimits { checkpoints: 4, bytes: u64::MAX, max_age: None };
        let facts = Facts {
            state_dir: root.clone(),
            started_at: SystemTime::now(),
            started: Instant::now(),
            progress: Arc::new(Progress::default()),
            checkpoints: Checkpoints::new(store, cache, limits),
            fleet,
            shutdown: Shutdown::default(),
        };
        Self { place: Place::of(&root, &root), _folder: folder, facts: Arc::new(facts) }
    }

    async fn open(&self) -> ControlServer {
        ControlServer::open(self.place.clone(), self.facts.clone()).await.unwrap()
    }

    async fn client(&self) -> Client {
        Client::connect(&self.place.path, LIMIT).await.unwrap()
    }
}

fn idle_fleet() -> FleetHandle {
    FleetHandle::without_children()
}

#[tokio::test]
async fn status_and_stop() {
    let world = World::new(idle_fleet());
    let server = world.open().await;
    let mode = std::fs::metadata(&world.place.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = world.client().await;
    world.facts.progress.enter_phase(Phase::Waiting);
    let Answer::Status(status) = client.request(Request::Status).await.unwrap() else { panic!("a status was asked") };
    assert_eq!((status.pid, status.phase, status.awaits), (std::process::id(), Phase::Waiting, None));
    assert!(matches!(client.request(Request::Stop { now: false }).await.unwrap(), Answer::Accepted));
    assert_eq!(world.facts.shutdown.urgency(), Urgency::Drain);
    client.request(Request::Stop { now: true }).await.unwrap();
    client.request(Request::Stop { now: false }).await.unwrap();
    assert_eq!(world.facts.shutdown.urgency(), Urgency::Now, "no order makes it less urgent");
    let Answer::Status(status) = client.request(Request::Status).await.unwrap() else { panic!("a status was asked") };
    assert_eq!(status.awaits.as_deref(), Some("the next look at the chain"));

    server.close().await;
    assert!(!world.place.path.exists(), "a clean end leaves no socket");
    client.request(Request::Status).await.unwrap();
}

#[tokio::test]
async fn a_slot_that_is_not_there_is_refused_with_a_reason() {
    let world = World::new(idle_fleet());
    let _server = world.open().await;
    let mut client = world.client().await;
    let order = Request::Slot { slot: SlotId(7), command: SlotCommand::Restart };
    let refused = client.request(order).await.unwrap_err();
    assert!(refused.to_string().contains('7'), "{refused}");
    client.request(Request::Status).await.unwrap();
}

#[tokio::test]
async fn a_socket_of_a_dead_process_is_replaced() {
    let world = World::new(idle_fleet());
    drop(UnixListener::bind(&world.place.path).unwrap());
    assert!(world.place.path.exists());
    let server = world.open().await;
    world.client().await.request(Request::Status).await.unwrap();
    drop(server);
}

#[tokio::test]
async fn too_many_clients_are_turned_away_and_served_once_others_have_gone() {
    let world = World::new(idle_fleet());
    let _server = world.open().await;
    let mut clients = Vec::new();
    for _ in 0..MAX_CLIENTS {
        clients.push(world.client().await);
    }
    let refused = Client::connect(&world.place.path, LIMIT).await.unwrap_err();
    assert!(matches!(&refused, ControlError::Refused(refusal) if refusal.kind == RefusalKind::Busy), "{refused}");
    // Those that are served are not disturbed.
    for client in &mut clients {
        client.request(Request::Status).await.unwrap();
    }
    drop(clients);
    while let Err(error) = Client::connect(&world.place.path, LIMIT).await {
        assert!(matches!(&error, ControlError::Refused(refusal) if refusal.kind == RefusalKind::Busy), "{error}");
    }
}

#[tokio::test]
async fn a_long_state_directory_has_its_socket_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("s".repeat(120));
    let place = Place::of(&root, folder.path());
    assert_ne!(place.folder, None);
    let world = World { place: place.clone(), ..World::new(idle_fleet()) };
    let server = world.open().await;
    world.client().await.request(Request::Status).await.unwrap();
    server.close().await;
    assert!(!place.folder.unwrap().exists());
}
