//! The supervisor: wallet, chain, store, schedule and spool of a GRAIL miner. It never links libtorch and never holds a CUDA
//! context; proofs and generation happen in child processes.

pub mod app;
pub mod beacon;
pub mod chain;
pub mod checkpoints;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod config;
pub mod control;
pub mod demo;
pub mod durable;
pub mod engine;
pub mod environments;
pub mod evaluators;
pub mod fleet;
pub mod generation;
pub mod gpus;
pub mod group;
pub mod journal;
pub mod leftovers;
pub mod miner;
pub mod offload;
pub mod plan;
pub mod prefetch;
pub mod progress;
pub mod proofs;
pub mod record;
pub mod seal;
pub mod shutdown;
pub mod spool;
pub mod state;
pub mod store;
pub mod terminal;
pub mod trainer;
pub mod verify;
