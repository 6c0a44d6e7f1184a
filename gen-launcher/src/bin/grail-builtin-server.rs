//! The builtin generation server.
//!
//! Its modules belong to this binary, not to the library: whatever the library uses is linked into the launcher, too, and
//! the launcher must not load libtorch.

#[path = "../builtin/mod.rs"]
mod builtin;

use std::process::ExitCode;

use builtin::run;
use grail_telemetry::{Format, Options};

fn main() -> ExitCode {
    if let Err(error) = grail_telemetry::init(&Options::from_environment(0, Format::Human)) {
        eprintln!("grail-builtin-server: {error}");
        return run::ServerExit::Usage.into();
    }
    run::run(std::env::args_os()).into()
}
