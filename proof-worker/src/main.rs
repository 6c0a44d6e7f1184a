//! `grail-proof-worker`: one process, one GPU, one model. No wallet, no network.

use clap::Parser;
use clap::error::ErrorKind;
use grail_process::ExitCode;
use grail_proof_worker::cli::Arguments;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // A closed pipe is no failure of ours.
            drop(error.print());
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::Done,
                _ => ExitCode::Usage,
            };
        }
    };
    if let Err(error) = grail_telemetry::init(&arguments.logging()) {
        eprintln!("error: {error:#}", error = anyhow::Error::from(error));
        return ExitCode::Configuration;
    }
    match grail_proof_worker::run(arguments.command) {
        Ok(()) => ExitCode::Done,
        Err(error) => {
            let code = error.exit_code();
            eprintln!("error: failed to {error:#}", error = anyhow::Error::from(error));
            code
        }
    }
}
