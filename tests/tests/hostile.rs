//! Peers that break every rule of the sockets: each is refused and told of once, and costs next to no memory.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise, also in its helpers")]

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use grail_ipc::messages::{Epoch, ToWorker, Welcome};
use grail_ipc::{codec, framing};
use grail_tests::binaries::{Finished, Run};
use grail_tests::processes::{resident_bytes, strike};
use grail_tests::waiting::wait_until;
use grail_tests::world::World;
use nix::sys::signal::Signal;

/// Hostile frames of one test, and what they may cost.
const FRAMES: u64 = 10_000;
const MOST_GROWTH_BYTES: u64 = 8 << 20;
/// Frames before the memory is measured first: allocators keep what they had once.
const WARM_UP: u64 = 300;
const NOISE_BYTES: usize = 1 << 20;

/// Bytes that nobody could mean; the same in each run.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..length.div_ceil(8)).flat_map(|_| next()).take(length).collect()
}

/// A frame with a body of noise.
fn garbage(seed: u64) -> Vec<u8> {
    framing::frame(&noise(seed, 300)).unwrap().to_vec()
}

/// Everything that a peer says after it has connected.
fn say(socket: &Path, bytes: &[u8]) {
    let mut stream = UnixStream::connect(socket).unwrap();
    // A peer that is refused early can neither write nor read to the end.
    drop(stream.write_all(bytes));
    drop(stream.shutdown(std::net::Shutdown::Write));
    drop(stream.read_to_end(&mut Vec::new()));
}

/// The n-th hostile peer: a length of 4 GiB, noise in a frame, half a frame; now and then 1 MB of noise.
fn attack(socket: &Path, number: u64) {
    match number % 3 {
        _ if number.is_multiple_of(250) => say(socket, &noise(number, NOISE_BYTES)),
        0 => say(socket, &u32::MAX.to_le_bytes()),
        1 => say(socket, &garbage(number)),
        _ => say(socket, &[64, 0, 0, 0, 1, 2, 3]),
    }
}

/// Memory that the process gains by [`FRAMES`] hostile frames.
fn growth(pid: u32, socket: &Path) -> u64 {
    (0..WARM_UP).for_each(|number| attack(socket, number));
    let before = resident_bytes(pid);
    (0..FRAMES).for_each(|number| attack(socket, number));
    resident_bytes(pid).saturating_sub(before)
}

fn lines_with(text: &str, needle: &str) -> usize {
    text.lines().filter(|line| line.contains(needle)).count()
}

/// A proof worker that stands alone on the smallest model.
struct Worker {
    run: Run,
    socket: PathBuf,
    folder: tempfile::TempDir,
}

impl Worker {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("worker.sock");
        let model = grail_golden::path("models/qwen2-tied").canonicalize().unwrap();
        let arguments =
            ["serve", "--threads", "1", "--socket", socket.to_str().unwrap(), "--model", model.to_str().unwrap()];
        let run = Run::start("grail-proof-worker", &arguments, folder.path(), &[]);
        wait_until("it listens", || socket.exists());
        Self { run, socket, folder }
    }

    /// Ends it; what it logged comes back.
    fn end(self) -> String {
        strike(self.run.pid(), Signal::SIGTERM);
        let Finished { code, stderr, .. } = self.run.wait();
        assert_eq!(code, Some(0), "{stderr}");
        stderr
    }
}

fn old_version() -> Vec<u8> {
    let welcome = Welcome { protocol: 0, build: "0.0.1".to_owned(), epoch: Epoch(0) };
    codec::encode(&ToWorker::Welcome(welcome)).unwrap().to_vec()
}

#[test]
fn a_worker_refuses_each_hostile_peer_and_says_so_once() {
    let worker = Worker::start();
    let peers = [
        (u32::MAX.to_le_bytes().to_vec(), "frame of 4294967295 bytes is over the limit"),
        (noise(1, NOISE_BYTES), "is over the limit"),
        (garbage(2), "decode"),
        (old_version(), "peer speaks protocol 0 (build 0.0.1), this build speaks 2"),
        (vec![64, 0, 0, 0, 1], "in the middle of a frame"),
    ];
    for (bytes, _) in &peers {
        say(&worker.socket, bytes);
    }
    let log = worker.end();
    assert_eq!(lines_with(&log, "A peer did not answer the hello."), peers.len(), "{log}");
    for (_, refusal) in &peers {
        assert!(lines_with(&log, refusal) >= 1, "{refusal}: {log}");
    }
}

#[test]
fn ten_thousand_hostile_frames_cost_a_worker_no_memory() {
    let worker = Worker::start();
    let growth = growth(worker.run.pid(), &worker.socket);
    assert!(growth < MOST_GROWTH_BYTES, "{growth} bytes");
    let log = worker.end();
    let told = lines_with(&log, "A peer did not answer the hello.");
    assert_eq!(u64::try_from(told).unwrap(), FRAMES + WARM_UP, "each is told of once");
}

#[test]
fn ten_thousand_hostile_frames_cost_a_supervisor_no_memory() {
    let world = World::before_a_window();
    let run = world.mine(&["-v"]);
    wait_until("its children are ready", || world.count("worker_ready") == 2 && world.count("server_ready") == 1);
    let growth = growth(run.pid(), &world.socket());
    assert!(growth < MOST_GROWTH_BYTES, "{growth} bytes");
    // It still speaks to those who keep to the rules.
    assert_eq!(world.ask_json(&["status"])["pid"], run.pid());
    world.ask_json(&["stop"]);
    let mined = run.wait();
    assert_eq!(mined.code, Some(0), "{}", mined.stderr);
    let told = lines_with(&mined.stderr, "A conversation at the control socket ended.");
    assert_eq!(u64::try_from(told).unwrap(), FRAMES + WARM_UP, "each is told of once");
    world.assert_nothing_left();
}

const SOCKET_OF_ANOTHER_USER: &str = "GRAIL_TEST_SOCKET";

/// With the variable set this is the peer: it runs in a copy of this program under another uid.
#[test]
fn another_uid_is_refused_before_a_byte_is_exchanged() {
    if let Some(socket) = std::env::var_os(SOCKET_OF_ANOTHER_USER) {
        let mut stream = UnixStream::connect(socket).unwrap();
        let mut given = Vec::new();
        drop(stream.read_to_end(&mut given));
        println!("given {} bytes", given.len());
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can become another user");
        return;
    }
    let worker = Worker::start();
    let program = worker.folder.path().join("peer");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let open = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    open(worker.folder.path(), 0o755);
    open(&worker.socket, 0o666);
    let mut peer = Command::new(&program);
    peer.args(["--exact", "another_uid_is_refused_before_a_byte_is_exchanged", "--nocapture"]);
    peer.env_clear().env(SOCKET_OF_ANOTHER_USER, &worker.socket).current_dir("/").uid(65_534).gid(65_534);
    let output = peer.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("given 0 bytes"), "{said}");
    let log = worker.end();
    assert_eq!(lines_with(&log, "Refused a peer."), 1, "{log}");
    assert_eq!(lines_with(&log, "refuse a peer of uid 65534"), 1, "{log}");
}
