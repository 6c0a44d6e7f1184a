//! The tokenizer: a small byte-level BPE with Qwen2's pre-tokenizer, trained on the tasks and on synthetic completions, and
//! the files that `transformers` wants beside it.

use std::path::Path;

use anyhow::Context as _;
use grail_environments::ThinkingMode;
use serde_json::json;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, SplitDelimiterBehavior, TokenizerImpl};

use crate::rng::Rng;
use crate::synthesis;
use crate::tasks::Source;

/// Entries of the vocabulary, special tokens included.
pub const VOCAB_SIZE: usize = 2_048;
/// Longest sequence of the model, prompt and completion.
pub const MAX_POSITIONS: usize = 1_024;
/// Fills up batches.
pub const PAD: &str = "<|endoftext|>";
/// Starts a message.
pub const MESSAGE_START: &str = "<|im_start|>";
/// Ends a message and so a completion.
pub const EOS: &str = "<|im_end|>";
/// Ids of the special tokens in the order in which they are trained.
const SPECIAL: [&str; 3] = [PAD, MESSAGE_START, EOS];
/// Qwen2's pattern; every digit is a token of its own.
const PATTERN: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The plain ChatML template that trainers install for the instructed mode.
const CHAT_TEMPLATE: &str = include_str!("../assets/chat_template.jinja");
/// Synthetic completions of each task that the tokenizer is trained on.
const COMPLETIONS_PER_TASK: usize = 2;

type Trained = TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// Trains a tokenizer on `sources` and writes its four files into `folder`.
///
/// # Errors
/// If the folder cannot be written or the sources are too few for the vocabulary.
pub fn write(folder: &Path, sources: &[Source], seed: u64) -> anyhow::Result<()> {
    let tokenizer = train(corpus(sources, seed)).map_err(anyhow::Error::from_boxed).context("train the tokenizer")?;
    let size = tokenizer.get_vocab_size(true);
    anyhow::ensure!(size == VOCAB_SIZE, "the texts give a vocabulary of {size} entries, {VOCAB_SIZE} are wanted");
    std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let path = folder.join("tokenizer.json");
    tokenizer
        .save(&path, false)
        .map_err(anyhow::Error::from_boxed)
        .with_context(|| format!("write {}", path.display()))?;
    write_json(&folder.join("tokenizer_config.json"), &tokenizer_config())?;
    write_json(&folder.join("special_tokens_map.json"), &json!({"eos_token": added(EOS), "pad_token": added(PAD)}))
}

/// Writes an indented JSON document with a final newline.
///
/// # Errors
/// If the file cannot be written.
pub fn write_json(path: &Path, document: &serde_json::Value) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(document)?;
    text.push('\n');
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// Texts of the prompts and of some completions; special tokens are left out, they take no part in the training.
fn corpus(sources: &[Source], seed: u64) -> Vec<String> {
    let mut rng = Rng::new(seed, 1);
    let mut texts = Vec::with_capacity(sources.len() * (COMPLETIONS_PER_TASK + 1));
    for source in sources {
        // The system prompt is part of every prompt, so its words weigh as much as the questions' together.
        let system = ThinkingMode::Instructed.system_prompt();
        texts.push(format!("system\n{system}\nuser\n{}\nassistant\n", source.question));
        for _ in 0..COMPLETIONS_PER_TASK {
            texts.push(synthesis::completion(&source.worked, 0.5, &mut rng).text);
        }
    }
    texts
}

fn train(texts: Vec<String>) -> tokenizers::Result<Trained> {
    let split = Split::new(SplitPattern::Regex(PATTERN.to_owned()), SplitDelimiterBehavior::Isolated, false)?;
    let byte_level = ByteLevel::new(false, false, false);
    let mut tokenizer = Trained::new(BPE::default());
    tokenizer
        .with_normalizer(Some(NFC))
        .with_pre_tokenizer(Some(Sequence::new(vec![split.into(), byte_level.into()])))
        .with_post_processor(Some(byte_level))
        .with_decoder(Some(byte_level));
    let mut trainer = BpeTrainer::builder()
        .vocab_size(VOCAB_SIZE)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(SPECIAL.map(|token| AddedToken::from(token, true)).to_vec())
        .build();
    tokenizer.train(&mut trainer, texts.into_iter())?;
    Ok(tokenizer)
}

fn added(token: &str) -> serde_json::Value {
    json!({"content": token, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false})
}

fn tokenizer_config() -> serde_json::Value {
    let decoder: serde_json::Map<String, serde_json::Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, token)| {
            let mut entry = added(token);
            entry["special"] = json!(true);
            (id.to_string(), entry)
        })
        .collect();
    json!({
        "add_bos_token": false,
        "add_prefix_space": false,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": [MESSAGE_START],
        "bos_token": null,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": false,
        "eos_token": EOS,
        "errors": "replace",
        "model_max_length": MAX_POSITIONS,
        "pad_token": PAD,
        "split_special_tokens": false,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": null,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use grail_text::Tokenizer;

    use super::*;
    use crate::tasks;

    /// The template is what reference trainers install.
    #[test]
    fn template_is_the_trainers_chatml() {
        let templates: BTreeMap<String, String> = grail_golden::json("environments/prompts/chat_templates.json");
        assert_eq!(templates["grail_instructed_chatml"], CHAT_TEMPLATE);
    }

    #[test]
    fn tokenizer_is_deterministic_and_loses_nothing() {
        let sources = tasks::split_sources().unwrap();
        let sources = &sources[..600];
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        for folder in &folders {
            write(folder.path(), sources, 5).unwrap();
        }
        for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
            let [first, second] = [0, 1].map(|at| std::fs::read(folders[at].path().join(file)).unwrap());
            assert!(first == second, "{file} differs between two runs");
        }
        let tokenizer = Tokenizer::from_dir(folders[0].path()).unwrap();
        assert_eq!(tokenizer.vocab_size(), VOCAB_SIZE);
        let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(|token| tokenizer.token_id(token).unwrap().0);
        assert_eq!(special, [0, 1, 2]);
        assert_eq!(tokenizer.eos_token_id(), tokenizer.token_id(EOS));
        assert_eq!(tokenizer.pad_token_id(), tokenizer.token_id(PAD));
        let mut rng = Rng::new(1, 9);
        for source in sources {
            let completion = synthesis::completion(&source.worked, 0.5, &mut rng).text;
            for text in [&source.question, &completion, "naïve 中文 🦀 1,234.50\r\n\t<|im_start|>x<|im_end|>"] {
                let ids = tokenizer.encode(text).unwrap();
                assert_eq!(tokenizer.decode(&ids).unwrap(), *text);
            }
        }
        assert_eq!(tokenizer.encode("1234").unwrap().len(), 4, "digits stand alone");
    }
}
