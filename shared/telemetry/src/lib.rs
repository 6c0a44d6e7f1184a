//! Logging set-up of the binaries, and what keeps secrets out of logs.

mod logging;
mod redaction;
mod secret;

pub use logging::{
    Format, LOG_VARIABLE, LoggingError, Options, UnknownFormat, default_directives, init, init_with_writer,
};
pub use redaction::{REDACTED, Redactor, is_secret_name};
pub use secret::SecretString;
