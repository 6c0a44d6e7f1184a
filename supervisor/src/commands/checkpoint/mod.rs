//! `checkpoint`: operations on the trainer's store and on the cache of this host, for operators.

mod cached;
mod catalogue;
mod error;
mod fetch;
mod list;
mod prune;
mod routes;
mod show;
mod site;
mod table;
mod trees;
mod verify;

pub use error::CheckpointCommandError;
pub(super) use error::of_failure;
pub use fetch::fetch;
pub use list::{Extent, list};
pub use prune::{PruneMode, prune};
pub use show::show;
pub use site::Site;
pub use verify::{Checked, verify};

use serde::Serialize;

use super::CommandError;
use super::control::Form;

/// Version of the JSON form of what these commands print.
const SCHEMA: u32 = 1;

/// What a command found out: lines for people, one document for programs.
trait Report: Serialize {
    fn render(&self) -> String;

    /// The text that is printed.
    fn print(&self, form: Form) -> Result<String, CommandError> {
        let text = match form {
            Form::Text => return Ok(self.render()),
            Form::Json => serde_json::to_string_pretty(self),
        };
        Ok(text.map_err(|error| CommandError::Output(error.into()))? + "\n")
    }
}
