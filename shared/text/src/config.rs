//! `tokenizer_config.json` and `special_tokens_map.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::error::LoadError;

/// Name of the configuration of a tokenizer.
pub const CONFIG_FILE: &str = "tokenizer_config.json";
/// Name of the older list of special tokens.
const SPECIAL_TOKENS_FILE: &str = "special_tokens_map.json";
/// What a special token may be.
const TOKEN_FORM: &str = "a text or an object with a text `content`";

/// Content of `path`.
pub fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    std::fs::read(path).map_err(|source| LoadError::Read { path: path.to_owned(), source })
}

/// Content of `path`, or `None` if there is no such file.
pub fn read_if_present(path: &Path) -> Result<Option<Vec<u8>>, LoadError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(LoadError::Read { path: path.to_owned(), source }),
    }
}

/// Roles of special tokens in the order in which `transformers` knows them, `additional_special_tokens` apart.
const ROLES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A special token and, where a file gives them, how it is matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecialToken {
    pub content: String,
    pub flags: Option<AddedToken>,
}

/// Special tokens of a tokenizer by role; a chat template sees each under the role's name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    roles: BTreeMap<&'static str, SpecialToken>,
    additional: Vec<SpecialToken>,
}

impl SpecialTokens {
    /// Text of the token with the role `role`, such as `eos_token`; `None` if the role is empty.
    #[must_use]
    pub fn content(&self, role: &str) -> Option<&str> {
        self.roles.get(role).map(|token| token.content.as_str())
    }

    /// Roles with the text of their tokens, in the order of `transformers`.
    pub fn by_role(&self) -> impl Iterator<Item = (&'static str, &str)> {
        ROLES.into_iter().filter_map(|role| Some((role, self.content(role)?)))
    }

    /// Texts of the tokens that have no role.
    pub fn additional(&self) -> impl Iterator<Item = &str> {
        self.additional.iter().map(|token| token.content.as_str())
    }

    /// All tokens: by role, then the additional ones.
    pub(crate) fn all(&self) -> impl Iterator<Item = &SpecialToken> {
        ROLES.into_iter().filter_map(|role| self.roles.get(role)).chain(&self.additional)
    }
}

/// What class-specific code of `transformers` does to a tokenizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenizerClass {
    /// `PreTrainedTokenizerFast`: as the files say.
    Plain,
    /// `Qwen2Tokenizer`: roles that the configuration does not mention have defaults.
    Qwen2,
    /// `GPT2Tokenizer`: likewise.
    Gpt2,
    /// `LlamaTokenizer`: likewise, and the post-processor is replaced.
    Llama,
}

impl TokenizerClass {
    const SUPPORTED: &str = "PreTrainedTokenizerFast, Qwen2Tokenizer, GPT2Tokenizer and LlamaTokenizer";

    fn parse(name: &str) -> Option<Self> {
        match name {
            "PreTrainedTokenizerFast" | "PreTrainedTokenizer" => Some(Self::Plain),
            "Qwen2Tokenizer" | "Qwen2TokenizerFast" => Some(Self::Qwen2),
            "GPT2Tokenizer" | "GPT2TokenizerFast" => Some(Self::Gpt2),
            "LlamaTokenizer" | "LlamaTokenizerFast" => Some(Self::Llama),
            _ => None,
        }
    }

    /// Defaults of the class's constructor for roles that no file mentions.
    fn defaults(self) -> &'static [(&'static str, &'static str)] {
        const END: &str = "<|endoftext|>";
        match self {
            Self::Plain => &[],
            Self::Qwen2 => &[("unk_token", END), ("eos_token", END), ("pad_token", END)],
            Self::Gpt2 => &[("unk_token", END), ("bos_token", END), ("eos_token", END)],
            Self::Llama => &[("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")],
        }
    }
}

/// The parts of `tokenizer_config.json` that change ids or text.
#[derive(Clone, Debug)]
pub struct TokenizerConfig {
    pub path: PathBuf,
    pub class: TokenizerClass,
    pub special: SpecialTokens,
    /// Added tokens by id.
    pub added: BTreeMap<u32, AddedToken>,
    pub clean_up_spaces: bool,
    /// Whether special strings in a text are split like any other.
    pub split_special_tokens: bool,
    /// `None` if the file does not say.
    pub add_prefix_space: Option<bool>,
    pub add_bos_token: Option<bool>,
    pub add_eos_token: Option<bool>,
    /// As in the file: a text, a list of named texts, or absent.
    pub chat_template: Option<Value>,
}

impl TokenizerConfig {
    /// Reads the files of `folder`.
    pub fn from_dir(folder: &Path) -> Result<Self, LoadError> {
        let path = folder.join(CONFIG_FILE);
        let mut fields = Fields::parse(&path, &read(&path)?)?;
        let class = match fields.text("tokenizer_class")? {
            None => TokenizerClass::Plain,
            Some(name) => TokenizerClass::parse(&name).ok_or_else(|| LoadError::UnsupportedClass {
                path: path.clone(),
                class: name,
                supported: TokenizerClass::SUPPORTED,
            })?,
        };
        let added = fields.added_tokens()?;
        let mut special = Special::default();
        special.take(&mut fields)?;
        // A configuration that lists the added tokens is complete; the older file then says nothing.
        if added.is_none() {
            let map_path = folder.join(SPECIAL_TOKENS_FILE);
            if let Some(bytes) = read_if_present(&map_path)? {
                special.take(&mut Fields::parse(&map_path, &bytes)?)?;
            }
        }
        Ok(Self {
            class,
            special: special.finish(class, added.as_ref()),
            added: added.unwrap_or_default(),
            clean_up_spaces: fields.flag("clean_up_tokenization_spaces")?.unwrap_or(false),
            split_special_tokens: fields.flag("split_special_tokens")?.unwrap_or(false),
            add_prefix_space: fields.flag("add_prefix_space")?,
            add_bos_token: fields.flag("add_bos_token")?,
            add_eos_token: fields.flag("add_eos_token")?,
            chat_template: fields.object.remove("chat_template").filter(|template| !template.is_null()),
            path,
        })
    }
}

/// Roles as the files fill them; an empty one is told apart from one that no file mentions.
#[derive(Default)]
struct Special {
    roles: BTreeMap<&'static str, Option<SpecialToken>>,
    additional: Vec<SpecialToken>,
}

impl Special {
    /// Takes over what `fields` says; a later file wins.
    fn take(&mut self, fields: &mut Fields) -> Result<(), LoadError> {
        for role in ROLES {
            if let Some(value) = fields.object.remove(role) {
                self.roles.insert(role, fields.special_token(role, &value)?);
            }
        }
        const ADDITIONAL: &str = "additional_special_tokens";
        match fields.object.remove(ADDITIONAL) {
            None | Some(Value::Null) => {}
            Some(Value::Array(tokens)) => {
                for token in &tokens {
                    let token = fields.special_token(ADDITIONAL, token)?;
                    let token = token.ok_or_else(|| fields.bad(ADDITIONAL, &Value::Null, TOKEN_FORM))?;
                    if self.additional.iter().all(|known| known.content != token.content) {
                        self.additional.push(token);
                    }
                }
            }
            Some(other) => return Err(fields.bad(ADDITIONAL, &other, "a list of special tokens")),
        }
        Ok(())
    }

    fn finish(mut self, class: TokenizerClass, added: Option<&BTreeMap<u32, AddedToken>>) -> SpecialTokens {
        for (role, content) in class.defaults() {
            let default = SpecialToken { content: (*content).to_owned(), flags: None };
            self.roles.entry(role).or_insert(Some(default));
        }
        let roles = self.roles.into_iter().filter_map(|(role, token)| {
            let mut token = token.filter(|token| !token.content.is_empty())?;
            let listed = added.into_iter().flat_map(BTreeMap::values).find(|known| known.content == token.content);
            token.flags = listed.cloned().or(token.flags);
            Some((role, token))
        });
        SpecialTokens { roles: roles.collect(), additional: self.additional }
    }
}

/// The object of one JSON file.
struct Fields {
    path: PathBuf,
    object: Map<String, Value>,
}

impl Fields {
    fn parse(path: &Path, bytes: &[u8]) -> Result<Self, LoadError> {
        let object =
            serde_json::from_slice(bytes).map_err(|source| LoadError::Json { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), object })
    }

    fn bad(&self, key: &str, value: &Value, expected: &'static str) -> LoadError {
        LoadError::Field { path: self.path.clone(), key: key.to_owned(), value: shown(value), expected }
    }

    fn text(&self, key: &str) -> Result<Option<String>, LoadError> {
        match self.object.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(self.bad(key, other, "a text")),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, LoadError> {
        match self.object.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.bad(key, other, "true or false")),
        }
    }

    fn special_token(&self, key: &str, value: &Value) -> Result<Option<SpecialToken>, LoadError> {
        match value {
            Value::Null => Ok(None),
            Value::String(content) => Ok(Some(SpecialToken { content: content.clone(), flags: None })),
            Value::Object(_) => {
                let flags = self.added_token(key, value, true)?;
                Ok(Some(SpecialToken { content: flags.content.clone(), flags: Some(flags) }))
            }
            other => Err(self.bad(key, other, TOKEN_FORM)),
        }
    }

    /// `AddedToken(**value)`: what is absent has the constructor's default.
    fn added_token(&self, key: &str, value: &Value, always_special: bool) -> Result<AddedToken, LoadError> {
        let bad = || self.bad(key, value, TOKEN_FORM);
        let flag = |name: &str| match value.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(bad()),
        };
        let content = value.get("content").and_then(Value::as_str).ok_or_else(bad)?;
        let special = always_special || flag("special")?.unwrap_or(false);
        Ok(AddedToken {
            content: content.to_owned(),
            single_word: flag("single_word")?.unwrap_or(false),
            lstrip: flag("lstrip")?.unwrap_or(false),
            rstrip: flag("rstrip")?.unwrap_or(false),
            normalized: flag("normalized")?.unwrap_or(!special),
            special,
        })
    }

    fn added_tokens(&self) -> Result<Option<BTreeMap<u32, AddedToken>>, LoadError> {
        const KEY: &str = "added_tokens_decoder";
        let Some(value) = self.object.get(KEY) else { return Ok(None) };
        let Value::Object(tokens) = value else { return Err(self.bad(KEY, value, "an object of tokens by id")) };
        let read = tokens.iter().map(|(id, token)| {
            let id = id.parse().map_err(|_| self.bad(KEY, &Value::from(id.as_str()), "token ids as keys"))?;
            Ok((id, self.added_token(KEY, token, false)?))
        });
        read.collect::<Result<_, _>>().map(Some)
    }
}

/// `value` as JSON, shortened to what fits a message.
pub fn shown(value: &Value) -> String {
    const MAX_CHARS: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
