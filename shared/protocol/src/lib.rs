//! GRAIL v5 as pure code: constants, hashes, sketches, seeds, signatures and the window file. No I/O, no async, no libtorch.

pub mod advantage;
pub mod binding;
pub mod challenge;
pub mod constants;
pub mod distribution;
pub mod gate;
pub mod hash;
pub mod hex_text;
pub mod ids;
pub mod json;
#[cfg(feature = "keys")]
pub mod keys;
pub mod nonce;
pub mod prf;
pub mod python_math;
pub mod python_random;
pub mod randomness;
pub mod sampling;
pub mod scoring;
pub mod seed;
pub mod sketch;
pub mod termination;
#[cfg(feature = "keys")]
pub mod validation;
pub mod window;
pub mod window_file;
