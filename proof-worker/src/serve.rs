//! `serve`: a supervisor's child, or alone.

use std::sync::Arc;
use std::time::Duration;

use grail_ipc::connection::ConnectionError;
use grail_ipc::handshake::{self, HandshakeError};
use grail_ipc::messages::{Epoch, FromWorker, Hello, PROTOCOL_VERSION, SlotId, ToWorker, Welcome};
use grail_ipc::socket::{Folder, Listener};
use grail_ipc::token::Token;
use grail_process::fault::{Armed, FaultPlan, Point, VARIABLE};
use grail_process::with_causes;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};

use crate::cli::ServeArguments;
use crate::compute::Compute;
use crate::error::WorkerError;
use crate::fault::{self, SpoiltHello};
use crate::prover::Loader;
use crate::session::{SessionEnd, serve_peer};
use crate::torch::TorchLoader;

/// How long a supervisor may take to connect after the model is loaded.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);

/// How long a peer may take to answer a hello.
const WELCOME_LIMIT: Duration = Duration::from_secs(10);

/// How long the current batch may go on when the program ends.
const BATCH_LIMIT: Duration = Duration::from_secs(2);

/// Runs `serve` to its end.
///
/// # Errors
/// [`WorkerError`].
pub fn run(arguments: ServeArguments) -> Result<(), WorkerError> {
    let plan = FaultPlan::from_environment()?;
    if !plan.is_empty() {
        warn!(variable = VARIABLE, faults = %plan, "Faults will be injected into this worker.");
    }
    let faults = Arc::new(plan.armed(arguments.slot, arguments.epoch));
    let token = match arguments.token_fd {
        Some(descriptor) => {
            Some(Token::read_from_number(descriptor).map_err(|source| WorkerError::Token { descriptor, source })?)
        }
        None => None,
    };
    let loader = TorchLoader::new(&arguments.model)?.with_shadow(arguments.reload_shadow);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| WorkerError::Start { what: "start the I/O runtime", source })?;
    let served = runtime.block_on(serve(&arguments, token, Arc::new(loader), faults));
    // The loading of a model may still run; the process ends without it.
    runtime.shutdown_background();
    served
}

/// Serves with the provers that `loader` makes, and does wrong what `faults` say.
///
/// # Errors
/// [`WorkerError`].
pub async fn serve(
    arguments: &ServeArguments,
    token: Option<Token>,
    loader: Arc<dyn Loader>,
    faults: Arc<Armed>,
) -> Result<(), WorkerError> {
    let mut stop = StopSignals::new()?;
    let folder = if token.is_some() { Folder::Private } else { Folder::Any };
    // Bound before the model is loaded, so that a supervisor can connect at once and wait for the hello.
    let listener = Listener::bind(&arguments.socket, folder).await?;
    let compute = tokio::select! {
        compute = Compute::start(loader, arguments.model.folder.clone(), Arc::clone(&faults)) => compute?,
        name = stop.next() => {
            info!(signal = name, "Told to end while the model was loaded.");
            return Ok(());
        }
    };
    let place = Place { slot: SlotId(arguments.slot), epoch: Epoch(arguments.epoch), faults: &faults };
    let served = tokio::select! {
        served = serve_peers(listener, &compute, place, token) => served,
        name = stop.next() => {
            info!(signal = name, "Told to end.");
            Ok(())
        }
    };
    if !compute.end(BATCH_LIMIT).await {
        leave_at_once();
    }
    served
}

/// Who this worker is, and what it does wrong.
#[derive(Debug, Clone, Copy)]
struct Place<'f> {
    slot: SlotId,
    epoch: Epoch,
    faults: &'f Armed,
}

async fn serve_peers(
    listener: Listener,
    compute: &Compute,
    place: Place<'_>,
    token: Option<Token>,
) -> Result<(), WorkerError> {
    match token {
        Some(token) => {
            let limit = CONNECT_LIMIT;
            let greeted = tokio::time::timeout(limit, greet_supervisor(&listener, compute, place, &token)).await;
            let connection = greeted.map_err(|_| WorkerError::Nobody { seconds: limit.as_secs() })??;
            // Unlinks the path: nobody else is to come.
            drop(listener);
            match serve_peer(connection, compute, place.epoch, place.faults).await? {
                SessionEnd::HungUp => info!("The supervisor hung up."),
                SessionEnd::Shutdown => {}
            }
            Ok(())
        }
        None => serve_one_after_the_other(&listener, compute, place).await,
    }
}

type Peer = grail_ipc::Connection<FromWorker, ToWorker>;

/// The first peer that answers the hello as a supervisor does.
async fn greet_supervisor(
    listener: &Listener,
    compute: &Compute,
    place: Place<'_>,
    token: &Token,
) -> Result<Peer, WorkerError> {
    loop {
        let stream = listener.accept().await?;
        match greet(stream, hello(compute, place, token.as_bytes()), place.faults).await {
            Ok((connection, welcome)) => {
                info!(slot = %place.slot, epoch = %place.epoch, supervisor = welcome.build, "Serving.");
                return Ok(connection);
            }
            Err(error @ HandshakeError::Version { .. }) => return Err(error.into()),
            Err(error) => warn!(error = with_causes(&error), "A peer did not answer the hello."),
        }
    }
}

async fn serve_one_after_the_other(
    listener: &Listener,
    compute: &Compute,
    place: Place<'_>,
) -> Result<(), WorkerError> {
    info!(socket = %listener.path().display(), device = compute.device(), "Waiting for peers.");
    loop {
        let stream = listener.accept().await?;
        let (connection, welcome) = match greet(stream, hello(compute, place, &[]), place.faults).await {
            Ok(greeted) => greeted,
            Err(error) => {
                warn!(error = with_causes(&error), "A peer did not answer the hello.");
                continue;
            }
        };
        info!(peer = welcome.build, "Serving a peer.");
        match serve_peer(connection, compute, place.epoch, place.faults).await {
            Ok(SessionEnd::HungUp) => info!("The peer hung up; waiting for the next."),
            Ok(SessionEnd::Shutdown) => return Ok(()),
            Err(WorkerError::Connection(error)) => {
                warn!(error = with_causes(&error), "A peer sent nonsense; waiting for the next.");
            }
            Err(error) => return Err(error),
        }
    }
}

async fn greet(mut stream: UnixStream, mut hello: Hello, faults: &Armed) -> Result<(Peer, Welcome), HandshakeError> {
    match faults.reach(Point::Hello) {
        None => {}
        Some(act) if act.is_of_process() => act.befall_process(),
        Some(act) => match fault::spoil_hello(act, hello).map_err(ConnectionError::from)? {
            SpoiltHello::Message(spoilt) => hello = spoilt,
            SpoiltHello::Bytes(bytes) => {
                stream.write_all(&bytes).await.map_err(ConnectionError::Write)?;
                return Err(HandshakeError::HungUp { awaited: "welcome" });
            }
        },
    }
    handshake::greet(stream, hello, WELCOME_LIMIT).await
}

fn hello(compute: &Compute, place: Place<'_>, token: &[u8]) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        build: env!("CARGO_PKG_VERSION").to_owned(),
        slot: place.slot,
        epoch: place.epoch,
        token: token.to_vec(),
        pid: std::process::id(),
        device: compute.device().to_owned(),
        weights: compute.weights(),
    }
}

/// SIGTERM and SIGINT.
struct StopSignals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl StopSignals {
    fn new() -> Result<Self, WorkerError> {
        let watch = |kind| signal(kind).map_err(|source| WorkerError::Start { what: "watch for signals", source });
        Ok(Self { terminate: watch(SignalKind::terminate())?, interrupt: watch(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Ends the process while its computing thread is busy: returning from `main` would tear libtorch down under it, which crashes.
fn leave_at_once() {
    error!("The current batch takes too long; leaving without it.");
    if let Err(error) = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL) {
        error!(%error, "Cannot end this process.");
    }
}
