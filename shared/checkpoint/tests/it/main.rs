//! Tests through the public API; one binary, because every further one is linked again.

mod faulty;
mod install;
mod vectors;
mod weights;
