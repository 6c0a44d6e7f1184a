//! Tokenizer and chat template of a checkpoint, as `transformers` 4.57 reads them.
//!
//! A prompt is made in two steps that must stay apart: [`ChatTemplate::render`] turns messages into text, then
//! [`Tokenizer::encode`] turns that text into ids with the tokenizer's own special tokens added on top
//! ([`render_prompt_ids`]). Special strings inside a message become special tokens: validators do the same.

mod config;
mod error;
mod jinja;
pub mod python;
mod template;
mod tokenizer;

pub use config::SpecialTokens;
pub use error::{LoadError, PromptError, RenderError, TokenizeError};
pub use template::{ChatTemplate, Message, RenderOptions};
pub use tokenizer::Tokenizer;

use grail_protocol::ids::TokenId;

/// Ids of the prompt that `messages` make: the rendered text, encoded with special tokens added.
///
/// # Errors
/// [`PromptError`] if the template refuses the messages or the tokenizer has no id for a part of the text.
pub fn render_prompt_ids(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    options: RenderOptions,
) -> Result<Vec<TokenId>, PromptError> {
    let text = template.render(messages, options)?;
    Ok(tokenizer.encode(&text)?)
}
