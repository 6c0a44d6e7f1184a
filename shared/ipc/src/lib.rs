//! Messages, framing, handshake and the connection between the supervisor and its children.
//!
//! A child listens on its own socket in a private folder, the supervisor connects: [`socket`]. Bytes become frames in
//! [`framing`], frames become [`messages`] in [`codec`], and [`connection`] joins the two. After the [`handshake`] the
//! supervisor speaks through [`worker_client`] or [`launcher_client`]: any number of requests in flight, answered in any order.
//! [`jobs`] gives requests and answers their shapes, and [`record`] keeps requests in a file. [`control`] is how an operator's command speaks to a running supervisor.

pub mod bulk;
mod client;
pub mod codec;
pub mod connection;
pub mod control;
pub mod framing;
pub mod generate_api;
pub mod handshake;
pub mod jobs;
pub mod launcher_client;
pub mod messages;
pub mod record;
pub mod socket;
pub mod token;
pub mod worker_client;

pub use client::{Discarded, LostConnection, RequestError};
pub use connection::{Connection, ConnectionError};
pub use handshake::{Expected, HandshakeError};
pub use launcher_client::{LauncherClient, LauncherEvent, LauncherEvents};
pub use token::Token;
pub use worker_client::WorkerClient;
