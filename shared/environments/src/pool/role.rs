//! How an interpreter is started and when it is ready.

use std::sync::Arc;
use std::time::Duration;

use grail_process::cgroup::{Delegation, Leaf};
use grail_process::{
    Child, DeathCause, Incarnation, LogPolicy, NotReady, Output, Role, StartError, Stdin, StopPlan, with_causes,
};

use super::link::{Link, LinkError};
use super::protocol::{Kind, Request, Start, Status};
use crate::sandbox::{EnterError, Helper, Interpreter, Layer, LayerSet, Plan, helper_spec, program_filter, to_hex};

const MIB: u64 = 1 << 20;
/// Address space of a program, and of a comparison of formulas.
const PROGRAM_BYTES: u64 = 1_024 * MIB;
const FORMULA_BYTES: u64 = 2_048 * MIB;
/// Memory and processes of an interpreter with its child, in its control group.
const GROUP_EXTRA_BYTES: u64 = 256 * MIB;
const GROUP_PROCESSES: u64 = 16;
/// How long the probes after a start may take, each.
const PROBE_LIMIT_S: u64 = 30;

/// What interpreters are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Programs,
    Formulas,
}

impl Purpose {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Programs => "evaluator",
            Self::Formulas => "formula-evaluator",
        }
    }

    /// What it evaluates, in messages.
    pub(super) const fn work(self) -> &'static str {
        match self {
            Self::Programs => "programs",
            Self::Formulas => "formulas",
        }
    }

    const fn memory_bytes(self) -> u64 {
        match self {
            Self::Programs => PROGRAM_BYTES,
            Self::Formulas => FORMULA_BYTES,
        }
    }
}

/// What all interpreters of a pool have in common.
#[derive(Debug)]
pub(super) struct Ground {
    pub(super) helper: Helper,
    pub(super) interpreter: Interpreter,
    pub(super) layers: LayerSet,
    pub(super) delegation: Option<Arc<Delegation>>,
    pub(super) nice: u8,
}

impl Ground {
    /// The first frame to an interpreter for `purpose`.
    pub(super) fn start(&self, purpose: Purpose) -> Result<Start, EnterError> {
        let filters = if self.layers.has(Layer::Seccomp) { vec![to_hex(&program_filter()?)] } else { vec![] };
        let (limits, child_limits) = if self.layers.has(Layer::Limits) {
            let limits = vec![
                ("RLIMIT_AS", purpose.memory_bytes()),
                ("RLIMIT_FSIZE", MIB),
                ("RLIMIT_NOFILE", 32),
                ("RLIMIT_CORE", 0),
                ("RLIMIT_STACK", 8 * MIB),
                ("RLIMIT_MEMLOCK", 0),
                ("RLIMIT_NICE", 0),
            ];
            (limits, vec![("RLIMIT_NPROC", 0)])
        } else {
            (vec![], vec![])
        };
        let site = (purpose == Purpose::Formulas).then(|| self.interpreter.site.display().to_string());
        let process = self.layers.has(Layer::Process);
        Ok(Start { filters, process, limits, child_limits, nice: self.nice, site })
    }

    fn plan(&self, purpose: Purpose) -> Plan {
        let view = match purpose {
            Purpose::Programs => self.interpreter.view(),
            Purpose::Formulas => self.interpreter.view_with_sympy(),
        };
        Plan { view, layers: self.layers, only_try: false, nice: self.nice }
    }

    /// A control group for one interpreter and its child, with limits where the kernel has them.
    fn leaf(&self, name: &str, purpose: Purpose) -> Option<Leaf> {
        let delegation = self.delegation.as_ref().filter(|_| self.layers.has(Layer::Cgroup))?;
        let leaf = delegation
            .leaf(name)
            .inspect_err(|error| tracing::warn!(name, %error, "An evaluator gets no control group of its own."))
            .ok()?;
        let most = [("memory.max", purpose.memory_bytes() + GROUP_EXTRA_BYTES), ("pids.max", GROUP_PROCESSES)];
        for (file, value) in most {
            let path = leaf.folder().join(file);
            if path.exists()
                && let Err(error) = std::fs::write(&path, value.to_string())
            {
                tracing::warn!(path = %path.display(), %error, "A limit of an evaluator's control group is not set.");
            }
        }
        Some(leaf)
    }
}

/// One interpreter.
#[derive(Debug)]
pub(super) struct Zygote {
    pub(super) ground: Arc<Ground>,
    pub(super) purpose: Purpose,
    pub(super) name: String,
}

impl Role for Zygote {
    type Process = Child;
    type Link = Link;

    async fn start(&mut self, _: Incarnation) -> Result<Child, StartError> {
        let mut spec = helper_spec(&self.name, &self.ground.helper, &self.ground.plan(self.purpose));
        spec.stdin = Stdin::Piped;
        spec.stdout = Output::Piped;
        spec.log = LogPolicy::default();
        spec.cgroup = self.ground.leaf(&self.name, self.purpose);
        Ok(grail_process::spawn(spec).await?)
    }

    fn ready(
        &mut self,
        process: Arc<Child>,
        _: Incarnation,
    ) -> impl Future<Output = Result<Link, NotReady>> + Send + 'static {
        let (ground, purpose) = (Arc::clone(&self.ground), self.purpose);
        async move {
            let start = ground.start(purpose).map_err(|error| broken(with_causes(&error)))?;
            let link = greet(&process, &start, &ground.interpreter).await;
            let mut link =
                link.map_err(|error| NotReady(DeathCause::HandshakeFailed { detail: with_causes(&error) }))??;
            probe(&mut link, purpose).await?;
            Ok(link)
        }
    }

    fn watch(&mut self, _: &Link) -> impl Future<Output = DeathCause> + Send + 'static {
        // Whoever uses the link asks for signs of life.
        std::future::pending()
    }
}

/// How an interpreter is ended: it has nothing to lose, and its children die with it.
pub(super) fn stop_plan() -> StopPlan {
    StopPlan::kill()
}

fn broken(detail: String) -> NotReady {
    NotReady(DeathCause::Broken { detail })
}

async fn greet(process: &Child, start: &Start, expected: &Interpreter) -> Result<Result<Link, NotReady>, LinkError> {
    let (Some(input), Some(output)) = (process.take_stdin()?, process.take_stdout()?) else {
        return Err(LinkError::NoPipes);
    };
    let (link, hello) = Link::open(input, output, start).await?;
    let sympy = start.site.is_some().then(|| expected.sympy_version.clone());
    if hello.python != expected.python_version || hello.sympy != sympy {
        let detail = format!(
            "the interpreter says it is CPython {} with sympy {:?}, inspected were {} and {sympy:?}",
            hello.python, hello.sympy, expected.python_version
        );
        return Ok(Err(broken(detail)));
    }
    Ok(Ok(link))
}

/// A program whose outcome is known.
struct KnownProgram {
    code: &'static str,
    tests: &'static [&'static str],
    /// Classes of the errors.
    errors: &'static [Option<&'static str>],
}

/// Annotations that are never evaluated and the allow-lists; the limit of recursion; the grammar of 3.12.
const KNOWN_PROGRAMS: [KnownProgram; 3] = [
    KnownProgram {
        code: "def f(x: Unknown) -> int:\n    return x + 1",
        tests: &["assert f(1) == 2", "assert f(1) == 3", "import os", "class A: pass"],
        errors: &[None, Some("AssertionError"), Some("ImportError"), Some("NameError")],
    },
    KnownProgram {
        code: "def g(n):\n    return 0 if n == 0 else g(n - 1)",
        tests: &["g(991)", "g(992)"],
        errors: &[None, Some("RecursionError")],
    },
    KnownProgram { code: "x = f'{'a'}'\ntype T = int", tests: &["assert x == 'a'"], errors: &[None] },
];

/// Pairs of formulas whose comparison is known, with the class of the error.
const KNOWN_PAIRS: [(&str, &str, Option<&str>); 3] =
    [("0.3[3]", "1/3", None), ("x", "y", Some("Unequal")), ("2x", "x", Some("SyntaxError"))];

/// Asks what the answers to are known: verdicts of another interpreter than the reference's would show here.
async fn probe(link: &mut Link, purpose: Purpose) -> Result<(), NotReady> {
    match purpose {
        Purpose::Programs => {
            for known in KNOWN_PROGRAMS {
                let tests: Vec<String> = known.tests.iter().map(|test| (*test).to_owned()).collect();
                let request = Request { code: Some(known.code), tests: Some(&tests), ..question(Kind::Run) };
                expect(link, request, known.errors, known.code).await?;
            }
        }
        Purpose::Formulas => {
            for (left, right, error) in KNOWN_PAIRS {
                let pairs = [(left.to_owned(), right.to_owned())];
                let request = Request { pairs: Some(&pairs), ..question(Kind::Sympy) };
                expect(link, request, &[error], left).await?;
            }
        }
    }
    Ok(())
}

fn question<'r>(question: Kind) -> Request<'r> {
    let (time_s, wall_s) = (PROBE_LIMIT_S, PROBE_LIMIT_S);
    Request { id: 0, question, code: None, tests: None, pairs: None, time_s, wall_s, cpu_s: None }
}

async fn expect(link: &mut Link, request: Request<'_>, expected: &[Option<&str>], what: &str) -> Result<(), NotReady> {
    let limit = Duration::from_secs(request.wall_s + PROBE_LIMIT_S);
    let reply = match tokio::time::timeout(limit, link.exchange(request)).await {
        Ok(Ok(reply)) => reply,
        Ok(Err(error)) => return Err(NotReady(DeathCause::HandshakeFailed { detail: with_causes(&error) })),
        Err(_) => return Err(NotReady(DeathCause::StartHung)),
    };
    let found: Vec<Option<&str>> = reply.tests.iter().map(|test| test.error_class.as_deref()).collect();
    if reply.status == Status::Done && found == expected {
        return Ok(());
    }
    Err(broken(format!(
        "the probe {what:?} gave {:?} {found:?} {} instead of {expected:?}",
        reply.status, reply.detail
    )))
}
