//! The owner of one generation server, and the builtin server.
//!
//! [`launcher`] starts, updates and stops a server for the supervisor; [`builtin`] is the server that needs neither GPU nor
//! Python. The two share [`folder`] and nothing else: the launcher's binary must not load libtorch.

pub mod builtin;
pub mod folder;
pub mod launcher;
