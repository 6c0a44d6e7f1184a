//! Runs the real binaries for end-to-end tests.

pub mod binaries;
pub mod processes;
pub mod shared_memory;
pub mod small_disk;
pub mod trainer;
pub mod waiting;
pub mod world;
