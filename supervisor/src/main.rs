//! `grail-supervisor`: runs a GRAIL miner on this host.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Interpreters are this program again; they must not inherit anything that it does otherwise.
    grail_supervisor::evaluators::sandbox_stage().unwrap_or_else(|| grail_supervisor::app::run().into())
}
