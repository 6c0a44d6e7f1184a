//! A proof worker as a library: one thread that owns the model, one task that speaks with the supervisor.
//!
//! [`serve`] takes requests over a socket, [`prove_file`] from a file; both know the model only through [`prover`], behind which
//! [`torch`] stands. [`profile`] measures. There is no wallet and no network here.

mod batches;
pub mod cli;
pub mod compute;
mod error;
mod fault;
mod prepare;
pub mod profile;
pub mod prove_file;
pub mod prover;
pub mod serve;
mod session;
pub mod torch;
mod torch_reload;

pub use error::WorkerError;

use cli::Command;

/// Runs a subcommand to its end.
///
/// # Errors
/// [`WorkerError`], which knows its exit code.
pub fn run(command: Command) -> Result<(), WorkerError> {
    match command {
        Command::Serve(arguments) => serve::run(arguments),
        Command::Prove(arguments) => prove_file::run(&arguments),
        Command::Profile(arguments) => profile::run(&arguments),
        Command::ProfileReload(arguments) => profile::reload::run(&arguments),
    }
}
