//! `<window file>.context.json`: every fact that a verifier needs beside the file. Paths in it are relative to the file itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use grail_protocol::ids::{BlockHash, CheckpointWindow, Hotkey, TokenId, WindowStart};
use grail_protocol::randomness::{ChallengeRandomness, InvalidRandomness};
use serde::{Deserialize, Serialize};

use crate::checkpoints::CheckpointFiles;

/// A context file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContextError {
    #[error("read the context {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error(
        "{} names the rows {}, which are not there; correct dataset_rows, or leave it out to have them looked for",
        path.display(), rows.display()
    )]
    Rows { path: PathBuf, rows: PathBuf },
    #[error("{} is no verification context: {detail}", path.display())]
    Malformed { path: PathBuf, detail: String },
    #[error(
        "{} says {field} {stated}, but {} says {found}; correct one of them, or leave {field} out of the context",
        path.display(), source_file.display()
    )]
    Contradiction { path: PathBuf, field: &'static str, stated: String, found: String, source_file: PathBuf },
}

/// Sampling policy as the checkpoint's metadata has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContextSampling {
    pub max_tokens: i64,
    pub temperature: f64,
    pub top_p: f64,
    pub top_k: i64,
    pub repetition_penalty: f64,
}

/// Facts of one window file. Unknown fields are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Context {
    pub hotkey: Hotkey,
    pub window: WindowStart,
    pub window_hash: BlockHash,
    pub checkpoint_window: CheckpointWindow,
    /// Folder of the checkpoint, with its tokenizer.
    pub model_dir: PathBuf,
    /// `float32` or `bfloat16`.
    pub dtype: String,
    pub env_id: String,
    pub env_params: BTreeMap<String, serde_json::Value>,
    /// File or folder with the rows of the environment's data set; looked for as a miner does if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset_rows: Option<PathBuf>,
    pub generation_params: ContextSampling,
    pub thinking_mode: String,
    /// Split to use when `env_params` names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env_split: Option<String>,
    /// `R_v`; a fresh one is drawn when it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub challenge_randomness: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eos_token_id: Option<TokenId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vocab_size: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_position_embeddings: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_name: Option<String>,
}

impl Context {
    /// Reads a context and makes its paths absolute or relative to the working directory.
    ///
    /// # Errors
    /// If it cannot be read or lacks a required field.
    pub fn read(path: &Path) -> Result<Self, ContextError> {
        let text = std::fs::read(path).map_err(|source| ContextError::Read { path: path.to_owned(), source })?;
        let mut context: Self = serde_json::from_slice(&text)
            .map_err(|error| ContextError::Malformed { path: path.to_owned(), detail: error.to_string() })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        context.model_dir = folder.join(&context.model_dir);
        context.dataset_rows = context.dataset_rows.map(|rows| folder.join(rows));
        Ok(context)
    }

    /// The context file of a window file.
    #[must_use]
    pub fn path_beside(window_file: &Path) -> PathBuf {
        let mut name = window_file.as_os_str().to_owned();
        name.push(".context.json");
        PathBuf::from(name)
    }

    /// The split of the environment: `env_params.split` wins over `env_split`.
    #[must_use]
    pub fn split(&self) -> Option<&str> {
        self.env_params.get("split").and_then(serde_json::Value::as_str).or(self.env_split.as_deref())
    }
}

/// Refuses a context with rows that are not there.
///
/// # Errors
/// [`ContextError::Rows`] names them.
pub fn check_rows(context: &Context, path: &Path) -> Result<(), ContextError> {
    match context.dataset_rows.as_ref().filter(|rows| !rows.exists()) {
        Some(rows) => Err(ContextError::Rows { path: path.to_owned(), rows: rows.clone() }),
        None => Ok(()),
    }
}

/// Holds the optional facts of `context` against the files that state them too.
///
/// # Errors
/// [`ContextError::Contradiction`] names both values and both files.
pub fn check_contradictions(context: &Context, path: &Path, files: &CheckpointFiles) -> Result<(), ContextError> {
    let contradiction = |field, stated: String, found: String, source_file: &str| ContextError::Contradiction {
        path: path.to_owned(),
        field,
        stated,
        found,
        source_file: context.model_dir.join(source_file),
    };
    if let Some(stated) = context.eos_token_id.filter(|stated| *stated != files.eos_token) {
        let (stated, found) = (stated.to_string(), files.eos_token.to_string());
        return Err(contradiction("eos_token_id", stated, found, "tokenizer_config.json"));
    }
    let numbers = [
        ("vocab_size", context.vocab_size, files.vocab_size),
        ("max_position_embeddings", context.max_position_embeddings, files.max_position_embeddings),
    ];
    for (field, stated, found) in numbers {
        if let Some(stated) = stated.filter(|stated| *stated != found) {
            return Err(contradiction(field, stated.to_string(), found.to_string(), "config.json"));
        }
    }
    match (&context.model_name, published_model_name(&context.model_dir)?) {
        (Some(stated), Some(found)) if *stated != found => {
            Err(contradiction("model_name", stated.clone(), found, LOCAL_METADATA))
        }
        _ => Ok(()),
    }
}

/// `challenge_randomness` of a context.
///
/// # Errors
/// [`ContextError::Malformed`] if it is not 64 hexadecimal digits, with or without `0x`.
pub fn challenge_of(path: &Path, text: &str) -> Result<ChallengeRandomness, ContextError> {
    text.trim().trim_start_matches("0x").to_lowercase().parse().map_err(|error: InvalidRandomness| {
        ContextError::Malformed { path: path.to_owned(), detail: format!("challenge_randomness: {error}") }
    })
}

/// `dtype` of a context: the precision in which a file is judged.
///
/// # Errors
/// [`ContextError::Malformed`] for any other word.
pub fn dtype_of(context: &Context, path: &Path) -> Result<&'static str, ContextError> {
    match context.dtype.as_str() {
        "float32" => Ok("float32"),
        "bfloat16" => Ok("bfloat16"),
        other => {
            let detail = format!("dtype is {other:?}; write \"float32\" or \"bfloat16\"");
            Err(ContextError::Malformed { path: path.to_owned(), detail })
        }
    }
}

const LOCAL_METADATA: &str = "metadata.json";

/// The model's name as the checkpoint's own metadata has it, if it lies in the folder.
fn published_model_name(model_dir: &Path) -> Result<Option<String>, ContextError> {
    #[derive(Deserialize)]
    struct Named {
        model_name: Option<String>,
    }
    let path = model_dir.join(LOCAL_METADATA);
    match std::fs::read(&path) {
        Ok(text) => serde_json::from_slice::<Named>(&text)
            .map(|named| named.model_name)
            .map_err(|error| ContextError::Malformed { path, detail: error.to_string() }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ContextError::Read { path, source }),
    }
}

/// `target` as seen from `folder`: relative if both are absolute, unchanged otherwise.
#[must_use]
pub fn relative_to(folder: &Path, target: &Path) -> PathBuf {
    if !folder.is_absolute() || !target.is_absolute() {
        return target.to_owned();
    }
    let shared = folder.components().zip(target.components()).take_while(|(a, b)| a == b).count();
    let up = folder.components().count() - shared;
    std::iter::repeat_n(PathBuf::from(".."), up)
        .chain(target.components().skip(shared).map(|part| PathBuf::from(part.as_os_str())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_relative_to_the_file() {
        let relative = relative_to(Path::new("/s/windows"), Path::new("/s/checkpoints/checkpoint-1"));
        assert_eq!(relative, Path::new("../checkpoints/checkpoint-1"));
        assert_eq!(relative_to(Path::new("/a"), Path::new("b")), Path::new("b"));
    }

    #[test]
    fn the_context_of_the_vectors_is_understood() {
        let vectors: serde_json::Value = grail_golden::json("protocol/window_verdicts.json");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("context.json");
        std::fs::write(&path, vectors["context"].to_string()).unwrap();
        let context = Context::read(&path).unwrap();
        assert_eq!(context.split(), Some("train"));
        assert_eq!(context.model_dir, folder.path().join("../models/qwen3-tied"));
        assert_eq!(context.eos_token_id, Some(TokenId(414)));
    }

    #[test]
    fn a_missing_field_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("context.json");
        std::fs::write(&path, r#"{"hotkey": "5F"}"#).unwrap();
        let error = Context::read(&path).unwrap_err().to_string();
        assert!(error.contains("window"), "{error}");
    }
}
