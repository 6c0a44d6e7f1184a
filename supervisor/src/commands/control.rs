//! `status`, `stop`, and the orders for one slot: a running supervisor is spoken to through its control socket.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use grail_ipc::control::{ControlError, RefusalKind};
use grail_ipc::messages::SlotId;
use grail_ipc::socket::SocketError;
use grail_protocol::ids::CheckpointWindow;
use serde_json::{Value, json};

use super::CommandError;
use crate::control::{Answer, Client, Place, Request, SCHEMA, Status};
use crate::fleet::SlotCommand;
use crate::terminal::{note, printable};

/// The longest answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How often a supervisor that stops is asked what it waits for.
const ASK_PERIOD: Duration = Duration::from_secs(1);

/// Where a supervisor is looked for.
#[derive(Debug, Clone)]
pub struct Whereabouts {
    /// State directories, the likeliest first.
    pub folders: Vec<PathBuf>,
    pub runtime_base: PathBuf,
}

/// What the commands print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Text,
    Json,
}

/// Whether `stop` returns before the supervisor is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    UntilGone,
    No,
}

/// The state of the supervisor, as text.
///
/// # Errors
/// [`CommandError`] if none is reached.
pub async fn status(whereabouts: &Whereabouts, form: Form) -> Result<String, CommandError> {
    let mut reached = reach(whereabouts).await?;
    let status = reached.status().await?;
    match form {
        Form::Text => Ok(status.render(unix_ms())),
        Form::Json => document(&status.to_json().map_err(|error| CommandError::Output(error.into()))?),
    }
}

/// The checkpoints whose folders a supervisor needs.
///
/// # Errors
/// [`CommandError::NobodyThere`] if none runs; others if one runs and what it uses is not known.
pub async fn checkpoints_in_use(whereabouts: &Whereabouts) -> Result<BTreeSet<CheckpointWindow>, CommandError> {
    Ok(reach(whereabouts).await?.status().await?.checkpoints_in_use)
}

/// Gives one slot an order.
///
/// # Errors
/// [`CommandError::Refused`] with the supervisor's reason, or why it is not reached.
pub async fn slot(
    whereabouts: &Whereabouts,
    slot: SlotId,
    command: SlotCommand,
    form: Form,
) -> Result<String, CommandError> {
    let mut reached = reach(whereabouts).await?;
    reached.ask(Request::Slot { slot, command }).await?;
    match form {
        Form::Text => Ok(format!("slot {slot}: the order was taken; `grail-supervisor status` shows how it goes on\n")),
        Form::Json => document(&json!({ "schema": SCHEMA, "slot": slot, "command": command, "accepted": true })),
    }
}

/// Has one worker, or all and the generation server, read the present checkpoint again.
///
/// # Errors
/// [`CommandError::Refused`] with the supervisor's reason, or why it is not reached.
pub async fn reload_checkpoint(
    whereabouts: &Whereabouts,
    slot: Option<SlotId>,
    form: Form,
) -> Result<String, CommandError> {
    let mut reached = reach(whereabouts).await?;
    reached.ask(Request::ReloadCheckpoint { slot }).await?;
    let who = slot.map_or_else(|| "all slots and the generation server".to_owned(), |slot| format!("slot {slot}"));
    match form {
        Form::Text => Ok(format!("{who}: the order was taken; `grail-supervisor status` shows how it goes on\n")),
        Form::Json => {
            document(&json!({ "schema": SCHEMA, "slot": slot, "command": "reload-checkpoint", "accepted": true }))
        }
    }
}

/// Tells the supervisor to stop and, unless `wait` says otherwise, waits until it is gone, naming on standard error what it
/// waits for.
///
/// # Errors
/// [`CommandError`] if none is reached.
pub async fn stop(whereabouts: &Whereabouts, now: bool, wait: Wait, form: Form) -> Result<String, CommandError> {
    let mut reached = reach(whereabouts).await?;
    let pid = reached.client.peer().pid;
    reached.ask(Request::Stop { now }).await?;
    if wait == Wait::UntilGone {
        reached.wait_until_gone().await?;
    }
    let gone = wait == Wait::UntilGone;
    match form {
        Form::Json => document(&json!({ "schema": SCHEMA, "pid": pid, "stopping": true, "gone": gone })),
        Form::Text if gone => Ok(format!("the supervisor (pid {pid}) is gone\n")),
        Form::Text => Ok(format!("the supervisor (pid {pid}) was told to stop\n")),
    }
}

struct Reached {
    folder: PathBuf,
    client: Client,
}

/// Connects to the first of the folders in which a supervisor listens.
async fn reach(whereabouts: &Whereabouts) -> Result<Reached, CommandError> {
    for folder in &whereabouts.folders {
        // Links are resolved as the supervisor does it.
        let root = match folder.canonicalize() {
            Ok(root) => root,
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                let source = SocketError::Connect { path: folder.clone(), source: error };
                return Err(failed(folder.clone(), source.into()));
            }
            // A folder that is not there has no supervisor either.
            Err(_) => continue,
        };
        let place = Place::of(&root, &whereabouts.runtime_base);
        match Client::connect(&place.path, ANSWER_LIMIT).await {
            Ok(client) => return Ok(Reached { folder: root, client }),
            Err(error) if error.is_nobody_there() => {}
            Err(source) => return Err(failed(root, source)),
        }
    }
    Err(CommandError::NobodyThere { folders: whereabouts.folders.clone() })
}

fn failed(folder: PathBuf, source: ControlError) -> CommandError {
    match &source {
        error if error.is_not_permitted() => CommandError::NotTheirs { folder, source },
        ControlError::Refused(refusal) if refusal.kind == RefusalKind::Request => CommandError::Refused { source },
        _ => CommandError::Control { folder, source },
    }
}

impl Reached {
    async fn ask(&mut self, request: Request) -> Result<Answer, CommandError> {
        self.client.request(request).await.map_err(|source| failed(self.folder.clone(), source))
    }

    async fn status(&mut self) -> Result<Status, CommandError> {
        match self.ask(Request::Status).await? {
            Answer::Status(status) => Ok(*status),
            Answer::Accepted => {
                let source = ControlError::Unexpected { awaited: "status" };
                Err(CommandError::Control { folder: self.folder.clone(), source })
            }
        }
    }

    /// The connection ends with the process: it is never closed before.
    ///
    /// # Errors
    /// [`CommandError::Control`] if it is there and does not answer.
    async fn wait_until_gone(&mut self) -> Result<(), CommandError> {
        let mut said = String::new();
        loop {
            let status = match self.status().await {
                Ok(status) => status,
                Err(_) if tokio::time::timeout(ASK_PERIOD, self.client.hung_up()).await.is_ok() => return Ok(()),
                Err(error) => return Err(error),
            };
            let awaits = status.awaits.unwrap_or_default();
            if awaits != said {
                note(format_args!("waiting for {}", printable(&awaits)));
                said = awaits;
            }
            if tokio::time::timeout(ASK_PERIOD, self.client.hung_up()).await.is_ok() {
                return Ok(());
            }
        }
    }
}

fn document(value: &Value) -> Result<String, CommandError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| CommandError::Output(error.into()))?;
    Ok(text + "\n")
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use grail_process::ExitCode;

    use super::*;

    fn whereabouts(folder: PathBuf) -> Whereabouts {
        Whereabouts { runtime_base: folder.clone(), folders: vec![folder.clone(), folder.join("local")] }
    }

    #[tokio::test]
    async fn where_nobody_is_the_folders_and_the_remedy_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = status(&whereabouts(folder.path().to_owned()), Form::Text).await.unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::Unavailable);
        let text = error.to_string();
        let local = folder.path().join("local").display().to_string();
        assert!(text.contains(&local) && text.contains("grail-supervisor mine"), "{text}");
        // A socket that nobody listens at is nobody, too.
        drop(std::os::unix::net::UnixListener::bind(folder.path().join("control.sock")).unwrap());
        let error = stop(&whereabouts(folder.path().to_owned()), true, Wait::No, Form::Json).await.unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::Unavailable);
    }

    #[test]
    fn refusals_have_their_own_codes() {
        let refused = |kind| {
            let refusal = grail_ipc::control::Refusal { kind, reason: "a reason".into() };
            let error = failed("/state".into(), ControlError::Refused(refusal));
            (error.exit_code(), grail_process::with_causes(&error))
        };
        assert_eq!(refused(RefusalKind::Request), (ExitCode::No, "the supervisor refuses: a reason".to_owned()));
        assert_eq!(refused(RefusalKind::NotPermitted).0, ExitCode::NotPermitted);
        assert_eq!(refused(RefusalKind::Busy).0, ExitCode::Temporary);
        assert_eq!(refused(RefusalKind::Version).0, ExitCode::Temporary);
    }
}
