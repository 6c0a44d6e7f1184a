//! Pools for tests, and what is to be seen of their processes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use grail_environments::pool::{InterpreterState, Patience, Pool, PoolConfig};
use grail_environments::sandbox::setup::Installation;
use grail_environments::sandbox::{Helper, Layer, LayerSet};
use grail_environments::{Evaluator, EvaluatorError, Program, ProgramVerdict, Syntax};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::watch;

/// Nothing that is waited for takes this long, whatever else the machine does.
pub const LONG: Duration = Duration::from_secs(300);

/// A pool of `programs` interpreters for programs and `formulas` for formulas.
pub fn config(programs: usize, formulas: usize) -> PoolConfig {
    let helper = Helper { program: env!("CARGO_BIN_EXE_grail-sandbox-helper").into(), arguments: vec![] };
    let installation = Installation::of_this_user(|name| std::env::var_os(name)).expect("a home");
    let mut config = PoolConfig::new(helper, installation);
    config.programs = programs;
    config.formulas = formulas;
    config.nice = 0;
    config.patience = Patience { answer: Duration::from_secs(60), ..Patience::default() };
    config
}

/// Starts a pool.
pub async fn start(config: PoolConfig) -> Pool {
    Pool::start(config).await.expect("an evaluator; `make evaluator` sets it up")
}

/// A pool of one interpreter for programs without `layers`, or `None` with a printed reason if it would lack others, too.
pub async fn weakened(layers: &[Layer]) -> Option<Pool> {
    let mut config = config(1, 0);
    config.is_unsafe_accepted = true;
    config.layers = layers.iter().fold(LayerSet::all(), |set, layer| set.without(*layer));
    let wanted = config.layers.without(Layer::Cgroup);
    let pool = start(config).await;
    let missing: Vec<String> =
        wanted.iter().filter(|layer| !pool.layers().has(*layer)).map(|layer| layer.to_string()).collect();
    if missing.is_empty() {
        return Some(pool);
    }
    println!("skipped: this host lacks {}: {:?}", missing.join(", "), pool.reports());
    pool.shut_down().await;
    None
}

pub fn program(code: &str, tests: &[&str]) -> Program {
    let tests: Vec<String> = tests.iter().map(|test| (*test).to_owned()).collect();
    Program { code: Arc::from(code), tests: tests.into() }
}

/// Runs a program; nothing that it does may hold the pool up.
pub async fn run(pool: &Pool, code: &str, tests: &[&str]) -> Result<ProgramVerdict, EvaluatorError> {
    tokio::time::timeout(LONG, pool.run(program(code, tests))).await.expect("a verdict in time")
}

/// Classes of the errors, `-` for a test that passed.
pub fn classes(verdict: &ProgramVerdict) -> Vec<&str> {
    verdict.tests.iter().map(|test| test.error_class.as_deref().unwrap_or("-")).collect()
}

/// Asserts that the pool gives the right verdict on a simple program.
pub async fn assert_healthy(pool: &Pool) {
    let code = "import math\ndef f(x):\n    return x + len(str(math.pi))";
    // Of another length each time: what is equal may be shared.
    let verdict = run(pool, code, &["assert f(1) == 18", "assert f(1) == 1"]).await.expect("a verdict");
    assert_eq!((verdict.syntax, classes(&verdict)), (Syntax::Valid, vec!["-", "AssertionError"]));
}

/// Waits until `holds` of the first interpreter's state, which it gives.
pub async fn until(
    states: &mut watch::Receiver<Vec<InterpreterState>>,
    holds: impl Fn(&InterpreterState) -> bool,
) -> InterpreterState {
    let found = tokio::time::timeout(LONG, states.wait_for(|states| states.first().is_some_and(&holds))).await;
    found.expect("in time").expect("the pool lives")[0].clone()
}

/// Processes that a helper has in its session, itself included.
pub fn session_members(leader: i32) -> Vec<i32> {
    processes(|fields, _| fields.get(3) == Some(&leader.to_string().as_str()))
}

/// Living processes in the same namespace of processes as `pid`; none if that is ours.
pub fn namespace_members(pid: i32) -> Vec<i32> {
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let wanted = namespace(&pid.to_string());
    if wanted.is_none() || wanted == namespace("self") {
        return Vec::new();
    }
    processes(|_, pid| namespace(pid) == wanted)
}

/// Living processes of which `holds` the fields of `/proc/PID/stat` from the third on, and the pid.
fn processes(holds: impl Fn(&[&str], &str) -> bool) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").expect("a process table").flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().into_string().ok()?.parse::<i32>().ok());
    numbers
        .filter(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let Some((_, rest)) = stat.rsplit_once(')') else { return false };
            let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
            !matches!(fields.first(), Some(&"Z" | &"X") | None) && holds(&fields, &pid.to_string())
        })
        .collect()
}

/// Child processes of `pid`.
pub fn children(pid: i32) -> Vec<i32> {
    processes(|fields, _| fields.get(1) == Some(&pid.to_string().as_str()))
}

/// The interpreter behind a helper: the helper itself without namespaces, else its child.
pub fn interpreter(helper: i32, layers: LayerSet) -> Option<i32> {
    if layers.has(Layer::Namespaces) { children(helper).first().copied() } else { Some(helper) }
}

/// Sends `signal` once; SIGSEGV until it has its effect, because the first only removes the handler of Rust's runtime.
pub async fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("the process is ours");
    while signal == Signal::SIGSEGV && !processes(|_, other| other == pid.to_string()).is_empty() {
        tokio::task::yield_now().await;
        // It may have ended meanwhile.
        kill(Pid::from_raw(pid), signal).unwrap_or_default();
    }
}

/// Shuts the pool down and asserts that none of its processes is left.
pub async fn assert_leaves_nothing(pool: Pool) {
    let states = pool.program_states();
    let helpers: Vec<i32> = states.borrow().iter().filter_map(|state| state.pid).collect();
    tokio::time::timeout(LONG, pool.shut_down()).await.expect("an end");
    for helper in helpers {
        assert_eq!(session_members(helper), Vec::<i32>::new());
        assert!(!Path::new(&format!("/proc/{helper}")).exists());
    }
}
