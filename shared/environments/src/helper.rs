//! Enters the sandbox for this crate's own tests and benchmarks; the supervisor has a hidden command that does the same.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    grail_environments::sandbox::enter_and_exec(&arguments)
}
