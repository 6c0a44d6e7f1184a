//! `env list`.

use std::collections::BTreeSet;
use std::fmt::Write;

use grail_environments::datasets::DatasetError;
use grail_environments::{EnvironmentId, Split};
use grail_process::with_causes;
use serde::Serialize;

use super::{EnvSite, SCHEMA, document};
use crate::commands::CommandError;
use crate::commands::control::Form;
use crate::environments::{EnvironmentSource, SourceError};

/// All environments.
#[derive(Debug, Serialize)]
struct Environments {
    schema: u32,
    environments: Vec<Listed>,
}

/// One environment on this host.
#[derive(Debug, Serialize)]
struct Listed {
    environment: EnvironmentId,
    /// The split that is mined unless a checkpoint names another.
    default_split: Split,
    splits: Vec<ListedSplit>,
    /// Why answers cannot be judged on this host.
    evaluator_missing: Option<String>,
}

#[derive(Debug, Serialize)]
struct ListedSplit {
    split: Split,
    tasks: Option<usize>,
    /// Why there are no tasks on this host.
    missing: Option<String>,
}

/// The environments and what they lack on this host. Nothing is downloaded.
///
/// # Errors
/// [`CommandError`] if the answer cannot be written.
pub async fn list(site: &EnvSite, form: Form) -> Result<String, CommandError> {
    let mut datasets = site.datasets.clone();
    let has_hub = !std::mem::replace(&mut datasets.hub.is_offline, true);
    let source = EnvironmentSource::new(datasets, site.evaluators.clone());
    let mut environments = Vec::new();
    for id in EnvironmentId::ALL {
        let evaluator_missing = site.evaluators.start_for(id).await.err().map(|error| with_causes(&error));
        let mut splits = Vec::new();
        for split in splits_of(id).iter().copied() {
            let opened = source.open_without_evaluators(id, split).await;
            let (tasks, missing) = match opened {
                Ok(environment) => (Some(environment.task_count()), None),
                Err(error) => (None, Some(missing(&error, has_hub))),
            };
            splits.push(ListedSplit { split, tasks, missing });
        }
        let default_split = Split::resolve(id, None).unwrap_or(Split::Train);
        environments.push(Listed { environment: id, default_split, splits, evaluator_missing });
    }
    site.evaluators.shut_down().await;
    let answer = Environments { schema: SCHEMA, environments };
    match form {
        Form::Text => Ok(answer.render()),
        Form::Json => document(&answer),
    }
}

/// What lacks and what to do, without the list of all places that were looked at.
fn missing(error: &SourceError, has_hub: bool) -> String {
    let SourceError::Dataset { source, .. } = error else { return with_causes(error) };
    match &**source {
        DatasetError::NotFound { remedy, .. } if has_hub => {
            format!("not on this host; the first window that needs it asks the hub, or {remedy}")
        }
        DatasetError::NotFound { remedy, .. } => format!("not on this host, and the hub is not to be asked; {remedy}"),
        other => with_causes(other),
    }
}

const fn splits_of(id: EnvironmentId) -> &'static [Split] {
    match id {
        EnvironmentId::Gsm8k | EnvironmentId::Math => &[Split::Train, Split::Val, Split::Test],
        EnvironmentId::Mbpp => &[Split::Train, Split::Val],
        EnvironmentId::HumanEval => &[Split::Test],
    }
}

impl Environments {
    fn render(&self) -> String {
        let mut text = String::new();
        let mut line = |line: String| writeln!(text, "{line}").unwrap_or_default();
        for listed in &self.environments {
            let tasks = |split: &ListedSplit| match split.tasks {
                Some(tasks) => format!("{} {tasks}", split.split),
                None => format!("{} missing", split.split),
            };
            let splits = listed.splits.iter().map(tasks).collect::<Vec<_>>().join(", ");
            line(format!("{:<10} {splits}", listed.environment.as_str()));
            let mut told = BTreeSet::new();
            for split in &listed.splits {
                if let Some(missing) = split.missing.as_ref().filter(|missing| told.insert(missing.as_str())) {
                    line(format!("{:<10} {}: {missing}", "", split.split));
                }
            }
            if let Some(missing) = &listed.evaluator_missing {
                line(format!("{:<10} answers cannot be judged: {missing}", ""));
            }
        }
        text
    }
}
