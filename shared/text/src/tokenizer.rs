//! The tokenizer of a checkpoint.

use std::collections::HashSet;
use std::path::Path;

use grail_protocol::ids::TokenId;
use tokenizers::AddedToken;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::processors::template::TemplateProcessing;

use crate::config::{SpecialTokens, TokenizerClass, TokenizerConfig, read};
use crate::error::{LoadError, TokenizeError};

/// Name of the file that describes the tokenizer itself.
const TOKENIZER_FILE: &str = "tokenizer.json";

/// Tokenizer as `AutoTokenizer.from_pretrained` of `transformers` 4.57 sets it up from the same files.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: SpecialTokens,
    clean_up_spaces: bool,
    vocab_size: usize,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and, where that one leaves it a say, `special_tokens_map.json`.
    ///
    /// # Errors
    /// [`LoadError`] names the file, the value and what to do.
    pub fn from_dir(folder: &Path) -> Result<Self, LoadError> {
        let config = TokenizerConfig::from_dir(folder)?;
        let path = folder.join(TOKENIZER_FILE);
        let broken = |detail: String| LoadError::Tokenizer { path: path.clone(), detail };
        let mut inner = tokenizers::Tokenizer::from_bytes(read(&path)?).map_err(|error| broken(error.to_string()))?;
        // A prompt is never cut nor filled up, whatever the file was saved with.
        inner.with_truncation(None).map_err(|error| broken(error.to_string()))?;
        inner.with_padding(None);
        inner.set_encode_special_tokens(config.split_special_tokens);
        add_tokens(&mut inner, &config);
        set_prefix_space(&mut inner, &config)?;
        if config.class == TokenizerClass::Llama {
            set_llama_post_processor(&mut inner, &config)?;
        }
        let vocab_size = inner.get_vocab_size(true);
        Ok(Self { inner, special: config.special, clean_up_spaces: config.clean_up_spaces, vocab_size })
    }

    /// Ids of `text`, with the special tokens that the tokenizer adds to every text (none for Qwen).
    ///
    /// # Errors
    /// [`TokenizeError`] if a part of the text has no id, which byte-level tokenizers exclude.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>, TokenizeError> {
        let encoding = self
            .inner
            .encode_fast(text, true)
            .map_err(|error| TokenizeError::Encode { bytes: text.len(), detail: error.to_string() })?;
        Ok(encoding.get_ids().iter().copied().map(TokenId).collect())
    }

    /// Text of `tokens`. Special tokens are kept, ids outside the vocabulary give nothing, bytes that form no UTF-8 give
    /// U+FFFD; spaces before punctuation go if the configuration asks for it.
    ///
    /// # Errors
    /// [`TokenizeError`] if the tokenizer's decoder fails, which byte-level ones do not.
    pub fn decode(&self, tokens: &[TokenId]) -> Result<String, TokenizeError> {
        let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
        let text = self
            .inner
            .decode(&ids, false)
            .map_err(|error| TokenizeError::Decode { tokens: tokens.len(), detail: error.to_string() })?;
        Ok(if self.clean_up_spaces { clean_up(&text) } else { text })
    }

    /// Id of the token that ends a completion; `None` if the configuration names none.
    #[must_use]
    pub fn eos_token_id(&self) -> Option<TokenId> {
        self.id_of_role("eos_token")
    }

    /// Id that fills up batches; the end token where the configuration names none.
    #[must_use]
    pub fn pad_token_id(&self) -> Option<TokenId> {
        self.id_of_role("pad_token").or_else(|| self.eos_token_id())
    }

    /// Number of tokens, added ones included. A model may have more rows.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Special tokens by role.
    #[must_use]
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// Id of the token spelled `token` in the vocabulary.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        self.inner.token_to_id(token).map(TokenId)
    }

    fn id_of_role(&self, role: &str) -> Option<TokenId> {
        self.special.content(role).and_then(|token| self.token_id(token))
    }
}

/// Adds the tokens that only the configuration knows, or knows with other flags.
fn add_tokens(tokenizer: &mut tokenizers::Tokenizer, config: &TokenizerConfig) {
    let known: HashSet<AddedToken> = tokenizer.get_added_tokens_decoder().into_values().collect();
    let mut missing: Vec<AddedToken> = config.added.values().filter(|token| !known.contains(token)).cloned().collect();
    let contents: HashSet<String> = known.iter().chain(&missing).map(|token| token.content.clone()).collect();
    let special: HashSet<&str> = config.special.all().map(|token| token.content.as_str()).collect();
    for token in config.special.all() {
        match &token.flags {
            Some(flags) => missing.push(flags.clone()),
            None if !contents.contains(&token.content) => missing.push(AddedToken::from(token.content.clone(), true)),
            None => {}
        }
    }
    for token in &mut missing {
        token.special |= special.contains(token.content.as_str());
    }
    missing.retain(|token| !known.contains(token));
    if missing.is_empty() {
        return;
    }
    let new: Vec<&str> = missing
        .iter()
        .map(|token| token.content.as_str())
        .filter(|token| tokenizer.token_to_id(token).is_none())
        .collect();
    if !new.is_empty() {
        tracing::warn!(tokens = ?new, "The configuration names tokens that tokenizer.json lacks; they get new ids.");
    }
    tokenizer.add_tokens(&missing);
}

/// `transformers` lets the configuration (by default: no) decide about a space before the text.
fn set_prefix_space(tokenizer: &mut tokenizers::Tokenizer, config: &TokenizerConfig) -> Result<(), LoadError> {
    if config.class == TokenizerClass::Llama && config.add_prefix_space.is_some() {
        return Err(LoadError::Field {
            path: config.path.clone(),
            key: "add_prefix_space".to_owned(),
            value: format!("{:?}", config.add_prefix_space.unwrap_or_default()),
            expected: "nothing: with LlamaTokenizer it asks for a conversion from SentencePiece, which is not supported",
        });
    }
    let wanted = config.add_prefix_space.unwrap_or(false);
    if let Some(PreTokenizerWrapper::ByteLevel(byte_level)) = tokenizer.get_pre_tokenizer()
        && byte_level.add_prefix_space != wanted
    {
        let changed = byte_level.add_prefix_space(wanted);
        tokenizer.with_pre_tokenizer(Some(changed));
    }
    Ok(())
}

/// `LlamaTokenizerFast` writes its own post-processor: by default the start token before every text.
fn set_llama_post_processor(tokenizer: &mut tokenizers::Tokenizer, config: &TokenizerConfig) -> Result<(), LoadError> {
    let mut template = String::from("$A:0");
    let mut tokens = Vec::new();
    let additions =
        [("bos_token", config.add_bos_token.unwrap_or(true)), ("eos_token", config.add_eos_token.unwrap_or(false))];
    for (role, _) in additions.into_iter().filter(|(_, wanted)| *wanted) {
        let id = config.special.content(role).and_then(|token| Some((token, tokenizer.token_to_id(token)?)));
        let Some((token, id)) = id else {
            return Err(LoadError::Field {
                path: config.path.clone(),
                key: role.to_owned(),
                value: "not in the vocabulary".to_owned(),
                expected: "a token, since LlamaTokenizer adds it to every text",
            });
        };
        template = if role == "bos_token" { format!("{token}:0 {template}") } else { format!("{template} {token}:0") };
        tokens.push((token.to_owned(), id));
    }
    let broken = |detail: String| LoadError::Tokenizer { path: config.path.clone(), detail };
    let mut builder = TemplateProcessing::builder();
    builder.try_single(template.as_str()).map_err(broken)?.special_tokens(tokens);
    let processor = builder.build().map_err(|error| broken(error.to_string()))?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}

/// `clean_up_tokenization` of `transformers`: these replacements, in this order.
fn clean_up(text: &str) -> String {
    const REPLACEMENTS: [(&str, &str); 10] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    REPLACEMENTS.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::clean_up;

    #[test]
    fn clean_up_joins_punctuation() {
        assert_eq!(clean_up("it 's , ok . I ca n't ! we 're ? a ' b"), "it's, ok. I can't! we're? a'b");
    }
}
