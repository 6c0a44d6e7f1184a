//! `env score`: completions from a file, judged as the miner judges them.

use std::io::Read;
use std::path::{Path, PathBuf};

use futures::{StreamExt, stream};
use grail_environments::{Environment, EnvironmentId, Evaluation, EvaluatorError, Task, ThinkingMode, Unevaluable};
use grail_process::with_causes;
use grail_protocol::ids::EnvironmentSeed;
use serde::{Deserialize, Serialize};

use super::{EnvCommandError, EnvSite, Pick, RowsChoice, SCHEMA, task};
use crate::commands::CommandError;

/// Completions that are judged at once.
const IN_FLIGHT: usize = 32;

/// What to judge.
#[derive(Debug, Clone)]
pub struct ScoreOptions {
    pub choice: RowsChoice,
    /// The task of lines that name none.
    pub pick: Option<Pick>,
    /// JSON lines; `-` is standard input.
    pub file: PathBuf,
    pub thinking_mode: ThinkingMode,
}

/// Verdicts as JSON lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scores {
    pub text: String,
    pub completeness: Completeness,
}

/// Whether every completion has a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Completeness {
    Complete,
    /// Some have none, and never will.
    Undecidable,
    /// The sandbox failed for some; another try may do better.
    SandboxFailed,
}

/// A line of the file. Other fields are allowed and left alone.
#[derive(Debug, Deserialize)]
struct Line {
    completion: String,
    task: Option<String>,
    seed: Option<u64>,
}

/// A line of the answer.
#[derive(Debug, Serialize)]
struct Scored {
    schema: u32,
    /// Number of the line in the file, from 1.
    line: usize,
    environment: EnvironmentId,
    task: String,
    thinking_mode: ThinkingMode,
    #[serde(skip_serializing_if = "Option::is_none")]
    evaluation: Option<Evaluation>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unevaluable: Option<NoVerdict>,
}

/// Why there is no verdict.
#[derive(Debug, Serialize)]
struct NoVerdict {
    kind: NoVerdictKind,
    detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum NoVerdictKind {
    /// Validators may judge it otherwise: the miner drops such a group.
    Undecidable,
    /// Nothing is known about the completion.
    SandboxFailed,
}

impl Scored {
    fn completeness(&self) -> Completeness {
        match self.unevaluable.as_ref().map(|none| none.kind) {
            None => Completeness::Complete,
            Some(NoVerdictKind::Undecidable) => Completeness::Undecidable,
            Some(NoVerdictKind::SandboxFailed) => Completeness::SandboxFailed,
        }
    }
}

impl From<&Unevaluable> for NoVerdict {
    fn from(error: &Unevaluable) -> Self {
        let kind = match error {
            Unevaluable::Evaluator { source: EvaluatorError::Sandbox { .. }, .. } => NoVerdictKind::SandboxFailed,
            _ => NoVerdictKind::Undecidable,
        };
        Self { kind, detail: with_causes(error) }
    }
}

/// Judges every completion of the file.
///
/// # Errors
/// [`CommandError`] if the file, the rows or the evaluators are of no use; nothing is judged then.
pub async fn score(site: &EnvSite, options: &ScoreOptions) -> Result<Scores, CommandError> {
    let text =
        read(&options.file).map_err(|source| EnvCommandError::Completions { path: options.file.clone(), source })?;
    let environment = options.choice.open(site).await?;
    let lines = lines(&text, options, &*environment)?;
    site.evaluators.start_for(environment.id()).await.map_err(EnvCommandError::from)?;
    let judged = lines.iter().map(|(number, task, completion)| {
        let environment = &environment;
        async move {
            let verdict = environment.evaluate(task, completion, options.thinking_mode).await;
            let (evaluation, unevaluable) = match verdict {
                Ok(evaluation) => (Some(evaluation), None),
                Err(error) => (None, Some(NoVerdict::from(&error))),
            };
            Scored {
                schema: SCHEMA,
                environment: environment.id(),
                line: *number,
                task: task.id.clone(),
                thinking_mode: options.thinking_mode,
                evaluation,
                unevaluable,
            }
        }
    });
    let scored: Vec<Scored> = stream::iter(judged).buffered(IN_FLIGHT).collect().await;
    site.evaluators.shut_down().await;
    let mut text = String::new();
    for line in &scored {
        text += &serde_json::to_string(line).map_err(|error| CommandError::Output(error.into()))?;
        text.push('\n');
    }
    let completeness = scored.iter().map(Scored::completeness).max().unwrap_or(Completeness::Complete);
    Ok(Scores { text, completeness })
}

fn read(path: &Path) -> std::io::Result<String> {
    if path != Path::new("-") {
        return std::fs::read_to_string(path);
    }
    let mut text = String::new();
    std::io::stdin().lock().read_to_string(&mut text)?;
    Ok(text)
}

/// Number, task and completion of every line that is not blank.
fn lines(
    text: &str,
    options: &ScoreOptions,
    environment: &dyn Environment,
) -> Result<Vec<(usize, Task, String)>, EnvCommandError> {
    let numbered = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let read = |(index, text): (usize, &str)| {
        let number = index + 1;
        let wrong = |detail: String| EnvCommandError::Line { path: options.file.clone(), line: number, detail };
        let line: Line = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
        let pick = match (line.task, line.seed) {
            (Some(_), Some(_)) => return Err(wrong("it names both `task` and `seed`; leave one out".to_owned())),
            (Some(id), None) => Some(Pick::Id(id)),
            (None, Some(seed)) => Some(Pick::Seed(EnvironmentSeed(seed))),
            (None, None) => options.pick.clone(),
        };
        let nameless =
            || wrong("it names no `task` and no `seed`; name one there, or one for all with --task".to_owned());
        let task = task(environment, &pick.ok_or_else(nameless)?).map_err(|error| wrong(with_causes(&error)))?;
        Ok((number, task, line.completion))
    };
    numbered.map(read).collect()
}
