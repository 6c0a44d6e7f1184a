//! `grail-supervisor`: runs a GRAIL miner on this host.

use grail_process::ExitCode;

fn main() -> ExitCode {
    grail_supervisor::app::run()
}
