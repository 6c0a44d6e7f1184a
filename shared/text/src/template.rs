//! The chat template of a checkpoint.

use std::path::{Path, PathBuf};

use minijinja::{Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::config::{SpecialTokens, TokenizerConfig, read_if_present, shown};
use crate::error::{LoadError, RenderError};
use crate::jinja;

/// File that wins over the configuration's `chat_template`.
const TEMPLATE_FILE: &str = "chat_template.jinja";
/// Folder of further named templates, `NAME.jinja` each.
const NAMED_TEMPLATES: &str = "additional_chat_templates";
/// The named template that is used when no tools are given.
const DEFAULT_NAME: &str = "default";
/// Work allowed for one rendering: one unit pays for an instruction or 64 bytes. A prompt takes a few thousand; the bound
/// keeps a broken template from blocking the miner or filling its memory (about 130 MB).
const RENDER_BUDGET: u64 = 2_000_000;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Text, taken as it is.
    pub content: String,
}

impl Message {
    /// A message with the role `system`.
    #[must_use]
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: "system".to_owned(), content: content.into() }
    }

    /// A message with the role `user`.
    #[must_use]
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".to_owned(), content: content.into() }
    }
}

/// Variables that a caller chooses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RenderOptions {
    /// `enable_thinking`; undefined in the template if `None`.
    pub enable_thinking: Option<bool>,
}

/// A parsed template with the special tokens that it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: Vec<(&'static str, Value)>,
    budget: u64,
}

impl ChatTemplate {
    /// Template of the checkpoint in `folder`: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`LoadError`] if there is none, or if it does not parse.
    pub fn from_dir(folder: &Path) -> Result<Self, LoadError> {
        let mut config = TokenizerConfig::from_dir(folder)?;
        let (path, source) = find(folder, &mut config)?;
        Self::new(&source, &config.special).map_err(|source| LoadError::TemplateSyntax { path, source })
    }

    /// Template from its text.
    ///
    /// # Errors
    /// The syntax error.
    pub fn new(source: &str, special: &SpecialTokens) -> Result<Self, Box<minijinja::Error>> {
        Self::with_budget(source, special, RENDER_BUDGET)
    }

    fn with_budget(source: &str, special: &SpecialTokens, budget: u64) -> Result<Self, Box<minijinja::Error>> {
        let mut variables: Vec<_> = special.by_role().map(|(role, token)| (role, Value::from(token))).collect();
        if special.additional().next().is_some() {
            variables.push(("additional_special_tokens", special.additional().collect()));
        }
        Ok(Self { environment: jinja::environment(source, budget)?, special: variables, budget })
    }

    /// Text of the prompt: `messages` and the start of the assistant's turn (`add_generation_prompt`), no tools.
    ///
    /// # Errors
    /// [`RenderError`] if the template refuses the messages, fails, or works without end.
    pub fn render(&self, messages: &[Message], options: RenderOptions) -> Result<String, RenderError> {
        let messages: Value = messages
            .iter()
            .map(|message| Value::from_pairs([("role", message.role.as_str()), ("content", message.content.as_str())]))
            .collect();
        let mut variables = self.special.clone();
        variables.extend([
            ("messages", messages),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(true)),
        ]);
        variables.extend(options.enable_thinking.map(|flag| ("enable_thinking", Value::from(flag))));
        let template = self.environment.get_template(jinja::TEMPLATE_NAME).map_err(|error| self.failure(error))?;
        template.render(Value::from_pairs(variables)).map_err(|error| self.failure(error))
    }

    fn failure(&self, error: minijinja::Error) -> RenderError {
        if error.kind() == ErrorKind::OutOfFuel {
            return RenderError::OutOfBudget { budget: self.budget };
        }
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
        while let Some(current) = cause {
            if let Some(jinja::Refusal(message)) = current.downcast_ref() {
                return RenderError::Refused { message: message.clone() };
            }
            cause = current.source();
        }
        RenderError::Template { source: Box::new(error) }
    }
}

/// Text of the template and the file that holds it.
fn find(folder: &Path, config: &mut TokenizerConfig) -> Result<(PathBuf, String), LoadError> {
    let path = folder.join(TEMPLATE_FILE);
    if let Some(bytes) = read_if_present(&path)? {
        return utf8(path, bytes);
    }
    let named = folder.join(NAMED_TEMPLATES);
    let names = template_names(&named)?;
    if !names.is_empty() {
        // Any file there hides the configuration's template, as in transformers.
        let default = named.join(format!("{DEFAULT_NAME}.jinja"));
        return match read_if_present(&default)? {
            Some(bytes) => utf8(default, bytes),
            None => Err(LoadError::NoDefaultTemplate { path: named, names }),
        };
    }
    let path = config.path.clone();
    match config.chat_template.take() {
        None => Err(LoadError::NoTemplate { folder: folder.to_owned() }),
        Some(Json::String(source)) => Ok((path, source)),
        Some(other) => default_of(path, other),
    }
}

/// The default of templates that are named: a list of `{name, template}`, or an object of texts.
fn default_of(path: PathBuf, templates: Json) -> Result<(PathBuf, String), LoadError> {
    let expected = "a text, or a list of objects with the texts `name` and `template`";
    let bad = |path: &Path, value: &Json| LoadError::Field {
        path: path.to_owned(),
        key: "chat_template".to_owned(),
        value: shown(value),
        expected,
    };
    let pairs: Option<Vec<(&str, &str)>> = match &templates {
        Json::Array(list) => {
            list.iter().map(|entry| Some((entry.get("name")?.as_str()?, entry.get("template")?.as_str()?))).collect()
        }
        Json::Object(map) => map.iter().map(|(name, source)| Some((name.as_str(), source.as_str()?))).collect(),
        _ => None,
    };
    let pairs = pairs.ok_or_else(|| bad(&path, &templates))?;
    // The last of equal names wins, as in a Python dict.
    match pairs.iter().rev().find(|(name, _)| *name == DEFAULT_NAME) {
        Some((_, source)) => Ok((path, (*source).to_owned())),
        None => {
            let names = pairs.iter().map(|(name, _)| (*name).to_owned()).collect();
            Err(LoadError::NoDefaultTemplate { path, names })
        }
    }
}

fn template_names(folder: &Path) -> Result<Vec<String>, LoadError> {
    let unreadable = |source| LoadError::Read { path: folder.to_owned(), source };
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|extension| extension == "jinja")
            && let Some(name) = path.file_stem()
        {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn utf8(path: PathBuf, bytes: Vec<u8>) -> Result<(PathBuf, String), LoadError> {
    match String::from_utf8(bytes) {
        Ok(source) => Ok((path, source)),
        Err(error) => {
            let source = std::io::Error::new(std::io::ErrorKind::InvalidData, error);
            Err(LoadError::Read { path, source })
        }
    }
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
