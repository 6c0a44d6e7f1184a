//! The embedded default: two trained checkpoints, their metadata and a data set, carried by the binary itself.

use std::io;
use std::path::{Path, PathBuf};

use grail_checkpoint::{GenerationParams, PolicyDefect, ThinkingModeName};
use serde::Deserialize;

use crate::durable;

/// A file of an embedded checkpoint.
type Embedded = (&'static str, &'static [u8]);

macro_rules! embedded_checkpoint {
    ($folder:literal) => {
        &[
            ("config.json", include_bytes!(concat!("../../deploy/demo/", $folder, "/config.json"))),
            (
                "generation_config.json",
                include_bytes!(concat!("../../deploy/demo/", $folder, "/generation_config.json")),
            ),
            ("model.safetensors", include_bytes!(concat!("../../deploy/demo/", $folder, "/model.safetensors"))),
            (
                "special_tokens_map.json",
                include_bytes!(concat!("../../deploy/demo/", $folder, "/special_tokens_map.json")),
            ),
            ("tokenizer.json", include_bytes!(concat!("../../deploy/demo/", $folder, "/tokenizer.json"))),
            ("tokenizer_config.json", include_bytes!(concat!("../../deploy/demo/", $folder, "/tokenizer_config.json"))),
        ]
    };
}

const FIRST: &[Embedded] = embedded_checkpoint!("first");
const SECOND: &[Embedded] = embedded_checkpoint!("second");
const METADATA: &[u8] = include_bytes!("../../deploy/demo/metadata.json");

/// What the demo checkpoints' metadata say, beside their files.
#[derive(Debug, Clone, Deserialize)]
pub struct DemoMetadata {
    pub model_name: String,
    pub env_id: String,
    pub env_params: serde_json::Map<String, serde_json::Value>,
    pub generation_params: serde_json::Value,
    pub thinking_mode: ThinkingModeName,
}

/// Folders of the unpacked demo.
#[derive(Debug, Clone)]
pub struct Demo {
    pub first: PathBuf,
    pub second: PathBuf,
    pub dataset_rows: PathBuf,
    pub metadata: DemoMetadata,
    /// `metadata.generation_params`, checked as a miner checks it.
    pub generation: GenerationParams,
}

/// A demo that cannot be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DemoError {
    #[error("unpack the demo into {}", folder.display())]
    Unpack { folder: PathBuf, source: io::Error },
    #[error("metadata of the demo in this binary is damaged")]
    Metadata(#[from] serde_json::Error),
    #[error("metadata of the demo in this binary is damaged")]
    Policy(#[from] PolicyDefect),
}

impl Demo {
    /// Unpacks what is not there yet into `folder`.
    ///
    /// # Errors
    /// What the file system says, for instance that it is full.
    pub fn unpack(folder: &Path) -> Result<Self, DemoError> {
        let (first, second) = (folder.join("first"), folder.join("second"));
        let unpack = |folder: &Path, files| {
            unpack_files(folder, files).map_err(|source| DemoError::Unpack { folder: folder.to_owned(), source })
        };
        unpack(&first, FIRST)?;
        unpack(&second, SECOND)?;
        let rows: Embedded = ("gsm_train.jsonl.gz", grail_environments::gsm8k::EMBEDDED_TRAIN);
        unpack(folder, &[rows])?;
        let metadata: DemoMetadata = serde_json::from_slice(METADATA)?;
        let generation = GenerationParams::from_json(&metadata.generation_params)?;
        Ok(Self { first, second, dataset_rows: folder.join(rows.0), metadata, generation })
    }
}

fn unpack_files(folder: &Path, files: &[Embedded]) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    for (name, content) in files {
        let path = folder.join(name);
        // Files are replaced as a whole, so one of the right length is the right one, unless somebody edited it.
        let there = std::fs::read(&path).is_ok_and(|found| found == *content);
        if !there {
            durable::write(&path, content)?;
        }
    }
    Ok(())
}
