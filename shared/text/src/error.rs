//! What can go wrong with the text side of a checkpoint.

use std::path::PathBuf;

/// Why the tokenizer or the chat template of a checkpoint folder cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file is missing or unreadable.
    #[error("reading {}: {source}; the folder must hold the tokenizer files that the trainer published with the checkpoint", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file is not the JSON it should be.
    #[error("{} is no valid JSON: {source}; fetch the checkpoint again", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where the text breaks.
        #[source]
        source: serde_json::Error,
    },
    /// A field of a configuration file has a value that means nothing.
    #[error("{}: `{key}` is {value}, expected {expected}; fetch the checkpoint again or correct the file", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// Name of the field.
        key: String,
        /// The value, as JSON.
        value: String,
        /// What would be accepted.
        expected: &'static str,
    },
    /// `tokenizer.json` does not describe a tokenizer.
    #[error("{} describes no tokenizer: {detail}; fetch the checkpoint again", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What the tokenizer library said.
        detail: String,
    },
    /// The tokenizer class adds behaviour that is not implemented, so its prompts could differ from a validator's.
    #[error("{}: `tokenizer_class` is {class:?}, supported are {supported}; use a checkpoint with one of these", path.display())]
    UnsupportedClass {
        /// The file.
        path: PathBuf,
        /// The class named there.
        class: String,
        /// Classes that are implemented.
        supported: &'static str,
    },
    /// No template in either place.
    #[error(
        "{} holds no chat template: neither chat_template.jinja nor `chat_template` in tokenizer_config.json; \
         the trainer publishes one, fetch the checkpoint again", folder.display()
    )]
    NoTemplate {
        /// The checkpoint folder.
        folder: PathBuf,
    },
    /// Named templates without the one that is used.
    #[error("{} names the chat templates {names:?}, but none is called \"default\"; only that one is used", path.display())]
    NoDefaultTemplate {
        /// The file or folder.
        path: PathBuf,
        /// Names that are there.
        names: Vec<String>,
    },
    /// The template does not parse.
    #[error("chat template of {} does not parse: {source}; fetch the checkpoint again", path.display())]
    TemplateSyntax {
        /// File that holds the template.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<minijinja::Error>,
    },
}

/// Why a chat template gave no text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RenderError {
    /// The template itself refused the messages through `raise_exception`.
    #[error("the chat template refuses these messages: {message}")]
    Refused {
        /// Text given by the template.
        message: String,
    },
    /// The template did more work than any prompt needs.
    #[error("the chat template was stopped after {budget} units of work; it loops or builds huge values")]
    OutOfBudget {
        /// Units allowed; one pays for an instruction or 64 bytes.
        budget: u64,
    },
    /// Any other failure while rendering.
    #[error("rendering the chat template: {source}")]
    Template {
        /// Where and why.
        #[source]
        source: Box<minijinja::Error>,
    },
}

/// Why the tokenizer could not convert.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizeError {
    /// Text to ids.
    #[error("encoding a text of {bytes} bytes: {detail}")]
    Encode {
        /// Length of the text.
        bytes: usize,
        /// What the tokenizer library said.
        detail: String,
    },
    /// Ids to text.
    #[error("decoding {tokens} tokens: {detail}")]
    Decode {
        /// Number of ids.
        tokens: usize,
        /// What the tokenizer library said.
        detail: String,
    },
}

/// Why messages gave no prompt ids.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PromptError {
    /// The template failed.
    #[error(transparent)]
    Render(#[from] RenderError),
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
}
