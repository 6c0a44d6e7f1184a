//! What environments ask of whoever runs programs and compares formulas: the seam before the sandboxed interpreters.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::environment::BoxFuture;

/// A program and the tests that are run on it, each in a fresh set of globals, in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Program {
    /// Text of the program, as the completion gives it.
    pub code: Arc<str>,
    /// Text that is run after the program, once per test.
    pub tests: Arc<[String]>,
}

/// What compiling a program alone came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syntax {
    Valid,
    /// A `SyntaxError`: no test runs, and all of them count as failed.
    Invalid,
    /// Another exception of the compiler, such as `RecursionError`: the program counts as absent.
    CompilerFailed,
}

/// How one test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestOutcome {
    /// Name of the exception's class; `None` for a test that passed.
    pub error_class: Option<String>,
    /// Time it took.
    pub wall: Duration,
}

impl TestOutcome {
    /// Whether the program and the test ended without an exception.
    #[must_use]
    pub fn has_passed(&self) -> bool {
        self.error_class.is_none()
    }
}

/// Verdict on a program: nothing in it hangs on the machine or the moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramVerdict {
    pub syntax: Syntax,
    /// One outcome per test, in order; empty unless the syntax is valid.
    pub tests: Vec<TestOutcome>,
}

/// A program or a comparison without a verdict that can be trusted; the group is dropped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluatorError {
    /// The program did what a validator may judge otherwise: it escaped, was killed, or ran into a limit that the
    /// reference does not have.
    #[error("no verdict on the program: {detail}")]
    Undecidable {
        /// What it did.
        detail: String,
    },
    /// The sandbox failed, also when tried again; nothing is said about the program.
    #[error("the sandbox failed {attempts} times: {detail}")]
    Sandbox {
        /// Tries that were made.
        attempts: u32,
        /// The last failure.
        detail: String,
    },
}

/// Runs programs and compares formulas, isolated from everything.
pub trait Evaluator: Send + Sync + fmt::Debug {
    /// Compiles `program` and runs its tests.
    ///
    /// # Errors
    /// [`EvaluatorError`]: the group is dropped.
    fn run(&self, program: Program) -> BoxFuture<'_, Result<ProgramVerdict, EvaluatorError>>;

    /// Whether `simplify(parse_expr(left) - parse_expr(right)) == 0` in sympy, any exception meaning no.
    ///
    /// # Errors
    /// [`EvaluatorError`]: the group is dropped.
    fn are_equal<'a>(&'a self, left: &'a str, right: &'a str) -> BoxFuture<'a, Result<bool, EvaluatorError>>;
}
