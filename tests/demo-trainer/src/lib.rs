//! Trains the two small checkpoints that the embedded default mines with; see `docs/demo-checkpoints.md`.

pub mod batch;
pub mod cli;
pub mod evaluation;
pub mod folder;
pub mod network;
pub mod phrases;
pub mod program;
pub mod rng;
pub mod sampling;
pub mod synthesis;
pub mod tasks;
pub mod training;
pub mod vocabulary;
