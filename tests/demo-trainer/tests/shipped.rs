//! The checkpoints that ship with the project are what the documentation says.

use std::path::{Path, PathBuf};

use grail_demo_trainer::evaluation::{CRITERIA, changed_elements, equal_logprobs, window};
use grail_demo_trainer::sampling::GENERATION;
use grail_demo_trainer::tasks::{self, window_sources};
use grail_model::ModelConfig;
use grail_model::weights::WeightFiles;
use grail_protocol::ids::{BlockNumber, WindowStart};
use grail_text::{ChatTemplate, Tokenizer};

/// Largest size of one checkpoint.
const MOST_BYTES: u64 = 8_000_000;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/demo")
}

fn checkpoints() -> [PathBuf; 2] {
    ["first", "second"].map(|name| demo().join(name))
}

#[test]
fn files_are_whole_and_small() {
    for folder in checkpoints() {
        let mut names = Vec::new();
        let mut bytes = 0;
        for entry in std::fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            bytes += entry.metadata().unwrap().len();
            names.push(entry.file_name().into_string().unwrap());
        }
        names.sort();
        assert_eq!(
            names,
            [
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json"
            ]
        );
        assert!(bytes <= MOST_BYTES, "{} has {bytes} bytes", folder.display());
        let config = ModelConfig::from_dir(&folder).unwrap();
        WeightFiles::open(&folder).unwrap().check(&config).unwrap();
    }
}

#[test]
fn tokenizer_and_model_agree() {
    let sources = tasks::split_sources().unwrap();
    let mut prompts = Vec::new();
    for folder in checkpoints() {
        let config = ModelConfig::from_dir(&folder).unwrap();
        let tokenizer = Tokenizer::from_dir(&folder).unwrap();
        let template = ChatTemplate::from_dir(&folder).unwrap();
        assert_eq!(tokenizer.vocab_size(), config.vocab_size);
        let eos = tokenizer.token_id("<|im_end|>").unwrap();
        assert_eq!(tokenizer.eos_token_id(), Some(eos));
        // A server stops at the configuration's tokens, a validator accepts the tokenizer's only.
        assert_eq!(config.eos_token_ids, [eos]);
        let own = tasks::prompts(&sources, &tokenizer, &template).unwrap();
        let longest = own.iter().map(Vec::len).max().unwrap();
        assert!(longest + GENERATION.max_tokens <= config.max_position_embeddings);
        prompts.push(own);
    }
    assert_eq!(prompts[0], prompts[1], "both have the same tokenizer and template");
}

#[test]
fn metadata_prescribes_what_the_program_draws_with() {
    let metadata: serde_json::Value =
        serde_json::from_slice(&std::fs::read(demo().join("metadata.json")).unwrap()).unwrap();
    assert_eq!(metadata["env_id"], "gsm8k");
    assert_eq!(metadata["env_params"]["split"], "train");
    assert_eq!(metadata["thinking_mode"], "instructed");
    assert_eq!(metadata["model_name"], "grail-demo");
    assert_eq!(metadata["generation_params"], serde_json::to_value(GENERATION).unwrap());
}

#[test]
fn the_second_checkpoint_is_a_further_step() {
    let [first, second] = checkpoints();
    let changed = changed_elements(&first, &second).unwrap();
    assert!(changed > 0.3 && changed < 1.0, "{changed}");
}

/// A few groups of each window; the program itself judges whole windows.
#[test]
fn a_sample_of_the_demo_meets_the_criteria() {
    // One thread: the steps are too small to share, and other tests run beside this one.
    grail_model::set_threads(1);
    let [first, second] = checkpoints();
    for (folder, block) in [(&first, 3_000), (&second, 3_030)] {
        let sources = window_sources("grail-demo", window_at(block), 2).unwrap();
        let judged = window(folder, &sources, 1).unwrap();
        assert_eq!(judged.shares.rows, 32);
        assert_eq!(judged.shares.misses(&CRITERIA), Vec::<String>::new());
        if folder == &second {
            let equal = equal_logprobs(&first, &judged).unwrap();
            assert!(equal < 0.5, "{equal}");
            // The rows are the second checkpoint's own.
            assert!(equal_logprobs(&second, &judged).unwrap() > 0.99);
        }
    }
}

fn window_at(block: u64) -> WindowStart {
    WindowStart::containing(BlockNumber(block))
}
