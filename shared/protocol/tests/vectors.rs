//! Golden vectors of the protocol: every case of every file is asserted, field by field.

#![expect(clippy::unwrap_used, reason = "a vector that cannot be read must fail its test")]

#[path = "vectors/files.rs"]
mod files;
#[path = "vectors/hashes.rs"]
mod hashes;
#[path = "vectors/json.rs"]
mod json;
#[path = "vectors/keys.rs"]
mod keys;
#[path = "vectors/numbers.rs"]
mod numbers;
#[path = "vectors/random.rs"]
mod random;
#[path = "vectors/sketches.rs"]
mod sketches;
#[path = "vectors/windows.rs"]
mod windows;
