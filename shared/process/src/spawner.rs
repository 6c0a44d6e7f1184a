//! The one thread that forks.
//!
//! The parent-death signal of a child fires when the *thread* that forked it ends, so a thread of a pool must never do it. This
//! one lives as long as the process.

use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::sync::{OnceLock, mpsc};

use tokio::sync::oneshot;

/// A child to start.
struct Job {
    command: Command,
    /// What the child inherits; open here until it has been forked, also when whoever asked has gone.
    inherited: Vec<OwnedFd>,
    reply: oneshot::Sender<io::Result<Child>>,
}

static SPAWNER: OnceLock<Option<mpsc::Sender<Job>>> = OnceLock::new();

/// Starts `command` from the spawning thread. `None` if that thread cannot be had.
pub(crate) async fn spawn(command: Command, inherited: Vec<OwnedFd>) -> Option<io::Result<Child>> {
    let spawner = SPAWNER.get_or_init(start).as_ref()?;
    let (reply, started) = oneshot::channel();
    spawner.send(Job { command, inherited, reply }).ok()?;
    started.await.ok()
}

fn start() -> Option<mpsc::Sender<Job>> {
    let (sender, inbox) = mpsc::channel::<Job>();
    let serve = move || {
        // The sender lies in a static, so this never ends.
        while let Ok(Job { mut command, inherited, reply }) = inbox.recv() {
            let started = command.spawn();
            drop(inherited);
            if let Err(Ok(mut unclaimed)) = reply.send(started) {
                // Whoever asked has gone: nobody would ever stop this child.
                unclaimed.kill().and_then(|()| unclaimed.wait()).map(drop).unwrap_or_default();
            }
        }
    };
    match std::thread::Builder::new().name("grail-spawner".into()).spawn(serve) {
        Ok(_detached) => Some(sender),
        Err(error) => {
            tracing::error!(%error, "Cannot start the thread that starts children.");
            None
        }
    }
}
