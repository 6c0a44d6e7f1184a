//! The pool with real interpreters in real sandboxes.
//!
//! They need the interpreter that `make evaluator` sets up. No test asserts a duration; limits are generous, so that all of
//! this holds on a machine with other work.

mod attacks;
mod controls;
mod faults;
mod formulas;
mod programs;
mod setup;
mod support;
