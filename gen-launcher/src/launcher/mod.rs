//! `grail-gen-launcher`: owns one generation server for the supervisor.
//!
//! [`service`] speaks with the supervisor, [`server`] starts, updates and stops the server, [`client`] speaks with the server,
//! [`marks`] reads its log. A server never outlives its launcher: its leader dies with it, and when the supervisor's socket
//! closes the launcher stops the server before it ends.

pub mod args;
pub mod client;
pub mod command;
pub mod marks;
pub mod server;
pub mod service;
pub mod standalone;
