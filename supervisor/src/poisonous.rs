//! Jobs that killed workers, kept for inspection: each as a line that `grail-proof-worker prove` reads.

use std::path::{Path, PathBuf};

use grail_ipc::jobs::ProveJob;
use grail_protocol::ids::{TokenId, WindowStart};
use serde::Serialize;

use crate::durable;
use grail_process::with_causes;

#[derive(Debug, Serialize)]
struct Line<'j> {
    prompt: &'j [TokenId],
    completions: &'j [Vec<TokenId>],
    randomness: String,
    eos_token: TokenId,
}

/// Writes `job` into `folder`. That it cannot be kept must not cost more than the group is lost for: it is logged.
pub fn keep(folder: &Path, window: WindowStart, job: &ProveJob) {
    match write(folder, window, job) {
        Ok(path) => tracing::error!(%window, group = %job.group, weights = %job.weights, file = %path.display(),
            "A group killed its workers; its job is kept for inspection."),
        Err(error) => {
            tracing::error!(%window, group = %job.group, folder = %folder.display(), error = with_causes(&error),
            "A group killed its workers, and its job cannot be kept.")
        }
    }
}

fn write(folder: &Path, window: WindowStart, job: &ProveJob) -> std::io::Result<PathBuf> {
    std::fs::create_dir_all(folder)?;
    let path = folder.join(format!("window-{window}-group-{}.jsonl", job.group));
    let line = Line {
        prompt: &job.prompt,
        completions: &job.completions,
        randomness: hex::encode(&job.randomness),
        eos_token: job.eos_token,
    };
    let mut text = serde_json::to_vec(&line)?;
    text.push(b'\n');
    durable::write(&path, &text)?;
    Ok(path)
}
