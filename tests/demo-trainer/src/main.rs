//! `grail-demo-trainer`: trains the demo checkpoints and says what they are worth.

use std::process::ExitCode;

use clap::Parser as _;
use grail_demo_trainer::cli::Cli;
use grail_demo_trainer::program::{self, Outcome};
use grail_telemetry::{Format, Options};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = grail_telemetry::init(&Options::from_environment(0, Format::Human)) {
        eprintln!("error: {error}");
        return ExitCode::from(78);
    }
    match program::run(&cli) {
        Ok(Outcome::Fit) => ExitCode::SUCCESS,
        Ok(Outcome::Unfit(missed)) => {
            for miss in missed {
                eprintln!("missed: {miss}");
            }
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(70)
        }
    }
}
