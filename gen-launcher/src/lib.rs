//! The owner of one generation server.
//!
//! [`launcher`] starts, updates and stops a server for the supervisor, [`folder`] judges checkpoints before a server touches
//! them. The builtin server is a binary of its own beside the launcher; nothing here may depend on libtorch.

pub mod folder;
pub mod launcher;
