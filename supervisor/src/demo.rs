//! The embedded default: two trained checkpoints, their metadata and a data set, carried by the binary itself.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use grail_checkpoint::{GenerationParams, MetadataInput, PolicyDefect, ThinkingModeName};
use grail_environments::datasets::DatasetSettings;
use grail_environments::{EnvironmentId, Split, gsm8k, humaneval, math, mbpp};
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
/// Rows of the environments whose data this program may carry.
const DATA_FILES: [(EnvironmentId, Embedded); 3] = [
    (EnvironmentId::Gsm8k, ("gsm_train.jsonl.gz", gsm8k::EMBEDDED_TRAIN)),
    (EnvironmentId::Mbpp, ("mbpp.jsonl.gz", mbpp::EMBEDDED)),
    (EnvironmentId::HumanEval, ("HumanEval.jsonl.gz", humaneval::EMBEDDED)),
];
/// Folder of made-up rows in the place of MATH.
const STAND_IN: &str = "math-stand-in";
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
    folder: PathBuf,
    pub first: PathBuf,
    pub second: PathBuf,
    /// File or folder with the rows of every environment whose data is at hand.
    pub rows: BTreeMap<EnvironmentId, PathBuf>,
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
        let unpack = |folder: &Path, files: &[Embedded]| {
            unpack_files(folder, files).map_err(|source| DemoError::Unpack { folder: folder.to_owned(), source })
        };
        unpack(&first, FIRST)?;
        unpack(&second, SECOND)?;
        let mut rows = BTreeMap::new();
        for (environment, file) in DATA_FILES {
            unpack(folder, &[file])?;
            rows.insert(environment, folder.join(file.0));
        }
        let metadata: DemoMetadata = serde_json::from_slice(METADATA)?;
        let generation = GenerationParams::from_json(&metadata.generation_params)?;
        Ok(Self { folder: folder.to_owned(), first, second, rows, metadata, generation })
    }

    /// The demo with checkpoints that name `environment` on its default split. For math, whose rows no package may ship, made-up
    /// ones are written.
    ///
    /// # Errors
    /// What the file system says, for instance that it is full.
    pub fn for_environment(mut self, environment: EnvironmentId) -> Result<Self, DemoError> {
        // Every environment has a default split.
        if let Ok(split) = Split::resolve(environment, None) {
            self.metadata.env_params.insert("split".to_owned(), split.as_str().into());
        }
        environment.as_str().clone_into(&mut self.metadata.env_id);
        if environment == EnvironmentId::Math {
            let folder = self.folder.join(STAND_IN);
            for file in math::stand_in_files() {
                let path = folder.join(&file.path);
                let failed = |source| DemoError::Unpack { folder: folder.clone(), source };
                std::fs::create_dir_all(path.parent().unwrap_or(&folder)).map_err(failed)?;
                unpack_file(&path, file.text.as_bytes()).map_err(failed)?;
            }
            self.rows.insert(environment, folder);
        }
        Ok(self)
    }

    /// What a checkpoint of the demo says of itself: without a parent, of the beginning of time.
    #[must_use]
    pub fn metadata_input(&self) -> MetadataInput {
        MetadataInput {
            model_name: self.metadata.model_name.clone(),
            env_id: self.metadata.env_id.clone(),
            env_params: self.metadata.env_params.clone(),
            generation: self.generation,
            thinking_mode: self.metadata.thinking_mode,
            parent_window: None,
            training_config: serde_json::Map::new(),
            git_commit: env!("CARGO_PKG_VERSION").to_owned(),
            created_at: 0.0,
        }
    }

    /// `settings` with the demo's rows for every environment for which they name no path.
    #[must_use]
    pub fn datasets(&self, mut settings: DatasetSettings) -> DatasetSettings {
        for (environment, rows) in &self.rows {
            settings.sources.entry(*environment).or_default().path.get_or_insert_with(|| rows.clone());
        }
        settings
    }
}

fn unpack_files(folder: &Path, files: &[Embedded]) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    for (name, content) in files {
        unpack_file(&folder.join(name), content)?;
    }
    Ok(())
}

fn unpack_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let is_there = std::fs::read(path).is_ok_and(|found| found == content);
    if is_there { Ok(()) } else { durable::write(path, content) }
}
