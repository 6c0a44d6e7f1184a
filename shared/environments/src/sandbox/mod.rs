//! The sandbox around interpreters that run programs of a model.
//!
//! A helper process, which is this program again, enters the namespaces, the new root, Landlock and a filter of system calls,
//! and becomes the interpreter ([`enter_and_exec`]). The interpreter never runs text of a model: it forks one child per
//! request, which adds its limits and a tighter filter before it does. [`probe`] says which layers work on a host.

mod enter;
mod error;
mod filters;
mod interpreter;
mod layers;
mod namespaces;
mod plan;
mod probe;
mod restrict;
mod root;
mod search;
pub mod setup;
mod tool;
#[cfg(test)]
mod zygote_tests;

pub use enter::enter_and_exec;
pub use error::EnterError;
pub(crate) use filters::{program as program_filter, to_hex};
pub use interpreter::{Interpreter, InterpreterError, PYTHON_VERSION, SYMPY_VERSION};
pub use layers::{Layer, LayerSet};
pub use plan::{Helper, Plan, View};
pub use probe::{LayerReport, probe};
pub(crate) use probe::{spec as helper_spec, working};
pub use tool::ToolError;
#[cfg(test)]
pub(crate) use zygote_tests::in_interpreter;
