//! The template engine, set up as `transformers` sets up Jinja2.

mod filters;
mod generation_tag;
mod json;
mod methods;
mod now;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind};

/// Name of the only template of an environment.
pub const TEMPLATE_NAME: &str = "chat_template";

/// Marks the error of `raise_exception`, so that it is told apart without looking at its text.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

/// An environment that holds `source` as [`TEMPLATE_NAME`] and stops a rendering after `fuel` units of work.
///
/// # Errors
/// The syntax error of `source`.
pub fn environment(source: &str, fuel: u64) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(false).build()?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(fuel));
    environment.set_unknown_method_callback(methods::call);
    environment.add_filter("tojson", filters::tojson);
    environment.add_filter("trim", filters::trim);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", now::strftime_now);
    environment.add_template_owned(TEMPLATE_NAME, prepared(source))?;
    Ok(environment)
}

fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Refusal(message)))
}

/// `source` with the line ends that Jinja2 sees and without tags that only mark what an assistant wrote.
fn prepared(source: &str) -> String {
    let lines = source.replace("\r\n", "\n").replace('\r', "\n");
    generation_tag::as_scopes(&lines).unwrap_or(lines)
}
