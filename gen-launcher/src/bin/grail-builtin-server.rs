//! The builtin generation server; everything is in the library.

use std::process::ExitCode;

use grail_gen_launcher::builtin::run;
use grail_telemetry::{Format, Options};

fn main() -> ExitCode {
    if let Err(error) = grail_telemetry::init(&Options::from_environment(0, Format::Human)) {
        eprintln!("grail-builtin-server: {error}");
        return run::ServerExit::Usage.into();
    }
    run::run(std::env::args_os()).into()
}
