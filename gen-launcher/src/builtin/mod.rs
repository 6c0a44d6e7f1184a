//! `grail-builtin-server`: SGLang's interface over a model on the CPU.
//!
//! From the inside out: [`sampler`] draws one token, [`scheduler`] keeps a batch going over a [`backend`], [`engine`] gives it
//! a thread, [`serving`] adds names, pauses and weight updates, [`http`] the endpoints, [`run`] the life of the process.

pub mod answers;
pub mod args;
pub mod backend;
pub mod clock;
pub mod door;
pub mod draw;
pub mod engine;
pub mod http;
pub mod limits;
pub mod params;
pub mod run;
pub mod sampler;
pub mod scheduler;
pub mod serving;
pub mod slots;
pub mod torch;

#[cfg(test)]
mod http_tests;
#[cfg(test)]
mod recorded_tests;
#[cfg(test)]
mod test_server;
