//! Log lines on stderr.

use std::io::IsTerminal;
use std::str::FromStr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Variable with filter directives as those of `RUST_LOG`; it wins over the verbosity.
pub const LOG_VARIABLE: &str = "GRAIL_LOG";

/// Shape of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// One line for people; colours only on a terminal and without `NO_COLOR`.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// A text that names no [`Format`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no log format: human and json are")]
pub struct UnknownFormat(pub String);

impl FromStr for Format {
    type Err = UnknownFormat;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            other => Err(UnknownFormat(other.to_owned())),
        }
    }
}

/// How much is logged, and how.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// How many times `-v` was given.
    pub verbosity: u8,
    pub format: Format,
    /// Value of [`LOG_VARIABLE`], if it is set.
    pub directives: Option<String>,
}

impl Options {
    /// The verbosity of the command line, directives from the environment.
    #[must_use]
    pub fn from_environment(verbosity: u8, format: Format) -> Self {
        let directives = std::env::var(LOG_VARIABLE).ok().filter(|text| !text.trim().is_empty());
        Self { verbosity, format, directives }
    }
}

/// Logging that could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoggingError {
    #[error("read {LOG_VARIABLE}={directives:?}")]
    Directives {
        directives: String,
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    #[error("set up logging: it is set up already")]
    AlreadySetUp,
}

/// Filter directives for a number of `-v`: our own crates one step louder than those of others.
#[must_use]
pub fn default_directives(verbosity: u8) -> &'static str {
    match verbosity {
        0 => "warn,grail=info",
        1 => "info,grail=debug",
        _ => "debug,grail=trace",
    }
}

/// Logs to stderr from now on.
///
/// # Errors
/// [`LoggingError`]; not for directives that are wrong: those of the verbosity are in force then, and the log says so.
pub fn init(options: &Options) -> Result<(), LoggingError> {
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    init_with_writer(options, std::io::stderr, colours)
}

/// Logs to `writer` from now on, for instance above a progress display.
///
/// # Errors
/// As [`init`].
pub fn init_with_writer<W>(options: &Options, writer: W, colours: bool) -> Result<(), LoggingError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    // A line that cannot be written is lost: telling standard error about it would panic once that is what has gone.
    let (filter, problem) = some_filter(options);
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).log_internal_errors(false);
    let installed = match options.format {
        Format::Human => builder.with_ansi(colours).try_init(),
        Format::Json => builder.with_ansi(false).json().flatten_event(true).try_init(),
    };
    installed.map_err(|_| LoggingError::AlreadySetUp)?;
    if let Some(problem) = problem {
        let directives = default_directives(options.verbosity);
        let detail = std::error::Error::source(&problem).map(ToString::to_string);
        tracing::warn!(%problem, detail, "These directives cannot be used; {directives} is in force.");
    }
    Ok(())
}

/// The filter that is wanted; else the verbosity's, and what is wrong: a slip in a setting must not leave a program without a log.
fn some_filter(options: &Options) -> (EnvFilter, Option<LoggingError>) {
    match filter(options) {
        Ok(filter) => (filter, None),
        Err(problem) => (EnvFilter::builder().parse_lossy(default_directives(options.verbosity)), Some(problem)),
    }
}

fn filter(options: &Options) -> Result<EnvFilter, LoggingError> {
    let directives = options.directives.as_deref().unwrap_or_else(|| default_directives(options.verbosity));
    EnvFilter::builder()
        .parse(directives)
        .map_err(|source| LoggingError::Directives { directives: directives.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verbosity_is_a_filter_and_each_is_louder() {
        use tracing_subscriber::filter::LevelFilter;
        let loudest = |verbosity| {
            let options = Options { verbosity, ..Options::default() };
            filter(&options).unwrap().max_level_hint().unwrap()
        };
        assert_eq!(
            [0, 1, 2, 9].map(loudest),
            [LevelFilter::INFO, LevelFilter::DEBUG, LevelFilter::TRACE, LevelFilter::TRACE]
        );
    }

    #[test]
    fn directives_win_and_bad_ones_are_named() {
        let with = |directives: &str| {
            filter(&Options { verbosity: 2, directives: Some(directives.into()), ..Options::default() })
        };
        let hint = with("error").unwrap().max_level_hint();
        assert_eq!(hint, Some(tracing_subscriber::filter::LevelFilter::ERROR));
        let error = with("grail=louder").unwrap_err();
        assert_eq!(error.to_string(), "read GRAIL_LOG=\"grail=louder\"");
        let directives = Some("grail=louder".to_owned());
        let (instead, problem) = some_filter(&Options { verbosity: 1, directives, ..Options::default() });
        assert_eq!(instead.max_level_hint(), Some(tracing_subscriber::filter::LevelFilter::DEBUG));
        assert!(problem.is_some());
    }

    #[test]
    fn formats_have_names() {
        assert_eq!("human".parse(), Ok(Format::Human));
        assert_eq!("json".parse(), Ok(Format::Json));
        assert_eq!("xml".parse::<Format>().unwrap_err().to_string(), "\"xml\" is no log format: human and json are");
    }
}
