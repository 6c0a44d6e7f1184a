//! `env prompt`.

use std::path::{Path, PathBuf};

use grail_environments::{ThinkingMode, messages};
use grail_text::{PromptError, RenderOptions};
use serde_json::{Value, json};

use super::{EnvCommandError, EnvSite, Pick, RowsChoice, SCHEMA, document, task};
use crate::checkpoints::CheckpointFiles;
use crate::commands::CommandError;
use crate::commands::control::Form;

/// Metadata that are kept beside the files of a checkpoint.
const METADATA: &str = "metadata.json";

/// Whose prompt is shown.
#[derive(Debug, Clone)]
pub struct PromptOptions {
    pub choice: RowsChoice,
    pub pick: Pick,
    /// Folder of the checkpoint.
    pub checkpoint: PathBuf,
    /// `None` = as the checkpoint's metadata say.
    pub thinking_mode: Option<ThinkingMode>,
}

/// The prompt of a task as text and as ids.
///
/// # Errors
/// [`CommandError`] if there is no such task or checkpoint, or if the template fails.
pub async fn prompt(site: &EnvSite, options: &PromptOptions, form: Form) -> Result<String, CommandError> {
    let folder = &options.checkpoint;
    if !folder.is_dir() {
        return Err(EnvCommandError::NoCheckpoint { folder: folder.clone() }.into());
    }
    let thinking_mode = match options.thinking_mode {
        Some(mode) => mode,
        None => published_mode(folder)?,
    };
    let failed = |source| EnvCommandError::Checkpoint { folder: folder.clone(), source };
    let files = CheckpointFiles::read(folder).map_err(failed)?;
    let environment = options.choice.open(site).await?;
    let task = task(&*environment, &options.pick)?;
    let origin = options.choice.origin();
    let render = RenderOptions { enable_thinking: thinking_mode.enable_thinking() };
    let text = files.template.render(&messages(&task, thinking_mode), render);
    let text = text.map_err(PromptError::from).map_err(EnvCommandError::from)?;
    let ids = files.tokenizer.encode(&text).map_err(PromptError::from).map_err(EnvCommandError::from)?;
    match form {
        Form::Text => {
            let listed = ids.iter().map(|id| id.0.to_string()).collect::<Vec<_>>().join(" ");
            let (environment, count) = (environment.id(), ids.len());
            let title = format!("{environment} {}, {thinking_mode}: {count} tokens{}", task.id, origin.remark());
            Ok(format!("{title}\n\n{text}\n\n{listed}\n"))
        }
        Form::Json => document(&json!({
            "schema": SCHEMA,
            "environment": environment.id(),
            "rows": origin,
            "task": task.id,
            "thinking_mode": thinking_mode,
            "text": text,
            "ids": ids,
        })),
    }
}

fn published_mode(folder: &Path) -> Result<ThinkingMode, EnvCommandError> {
    let unknown = |detail: String| EnvCommandError::ThinkingMode { folder: folder.to_owned(), detail };
    let text = std::fs::read(folder.join(METADATA)).map_err(|error| unknown(error.to_string()))?;
    let metadata: Value = serde_json::from_slice(&text).map_err(|error| unknown(error.to_string()))?;
    let mode = metadata.get("thinking_mode").and_then(Value::as_str);
    mode.ok_or_else(|| unknown("it names no thinking mode".to_owned()))?
        .parse()
        .map_err(|error: grail_environments::ParseThinkingModeError| unknown(error.to_string()))
}
