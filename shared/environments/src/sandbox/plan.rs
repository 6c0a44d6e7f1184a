//! What the helper is told: the interpreter, what of this host it needs to see, and which layers go around it.

use std::ffi::OsString;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::layers::LayerSet;

/// The text that the interpreter runs.
pub(crate) const ZYGOTE: &str = concat!(
    include_str!("zygote/frames.py"),
    "\n\n",
    include_str!("zygote/records.py"),
    "\n\n",
    include_str!("zygote/programs.py"),
    "\n\n",
    include_str!("zygote/formulas.py"),
    "\n\n",
    include_str!("zygote/kernel.py"),
    "\n\n",
    include_str!("zygote/serve.py"),
    "\n\n",
    include_str!("zygote/immortal.py"),
    "\n\n",
    include_str!("zygote/inspect.py"),
    "\n\n",
    include_str!("zygote/main.py"),
);

/// What of this host an interpreter needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct View {
    /// The interpreter, without symbolic links.
    pub python: PathBuf,
    /// Folders that it reads: its library, and sympy's where it needs that.
    pub folders: Vec<PathBuf>,
    /// Files that it reads: itself, its loader, the libraries that it maps; names that are links are kept as such.
    pub files: Vec<PathBuf>,
}

/// A sandbox to enter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// What is visible inside.
    pub view: View,
    /// What goes around it. Every one of them must work.
    pub layers: LayerSet,
    /// Enter and end, without starting the interpreter.
    pub only_try: bool,
    /// Steps by which the whole session is nicer than others, where the kernel shares the CPU among sessions.
    #[serde(default)]
    pub nice: u8,
}

/// How the helper is called: a program that hands its last two arguments to [`super::enter_and_exec`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Helper {
    /// The program, most often this one again.
    pub program: PathBuf,
    /// What stands before the two arguments, for instance a hidden command.
    pub arguments: Vec<OsString>,
}

impl Helper {
    /// This program again, with `command` first.
    ///
    /// # Errors
    /// If the path of this program cannot be had.
    pub fn this_program(command: &str) -> std::io::Result<Self> {
        Ok(Self { program: std::env::current_exe()?, arguments: vec![command.into()] })
    }
}
