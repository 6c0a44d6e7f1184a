//! What sandboxed evaluation costs: the 164 canonical solutions of HumanEval twice over, and the 340 pairs of answers of the
//! golden vectors, by three interpreters of each kind with all layers of this host.
//!
//! Budget on 2 cores: 400 programs a second, p50 3 ms, p99 50 ms; 800 pairs a second.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use grail_environments::pool::{Pool, PoolConfig};
use grail_environments::sandbox::Helper;
use grail_environments::sandbox::setup::Installation;
use grail_environments::{Evaluator, EvaluatorError, Program};
use grail_golden::{json, json_lines};
use serde::Deserialize;
use serde_json::Value;

/// Cores, and programs in flight.
const WIDTH: usize = 2;
/// Pairs in flight: those of a group.
const GROUP: usize = 16;
const ROUNDS: usize = 5;

#[derive(Deserialize)]
struct Row {
    prompt: String,
    canonical_solution: String,
    test: String,
    entry_point: String,
}

#[derive(Deserialize)]
struct Pair {
    predicted_norm: String,
    gold_norm: String,
    decided_by: Value,
}

impl Pair {
    /// Whether it needs sympy: it is not settled as text, nor as two numbers, and has no backslash that no parser takes.
    fn needs_sympy(&self) -> bool {
        let both = [&self.predicted_norm, &self.gold_norm];
        let has = |signs: &[char]| both.iter().any(|side| side.contains(signs));
        let is_settled = self.decided_by.is_string() || self.decided_by["numeric"] == Value::Bool(true);
        !is_settled && (!has(&['\\']) || has(&['\'', '"', '#']))
    }
}

fn main() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let pool = Arc::new(start().await);
        println!("layers: {}", pool.layers());
        println!("load before: {}", load());
        for _ in 0..ROUNDS {
            programs(&pool).await;
        }
        for _ in 0..ROUNDS {
            pairs(&pool).await;
        }
        println!("load after: {}", load());
        Arc::into_inner(pool).expect("nobody else has it").shut_down().await;
    });
}

/// What else the machine did in the last 1, 5 and 15 minutes.
fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_ascii_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

async fn start() -> Pool {
    let helper = Helper { program: env!("CARGO_BIN_EXE_grail-sandbox-helper").into(), arguments: vec![] };
    let installation = Installation::of_this_user(|name| std::env::var_os(name)).expect("a home");
    let mut config = PoolConfig::new(helper, installation);
    // One more than cores, as by default.
    (config.programs, config.formulas) = (WIDTH + 1, WIDTH + 1);
    // What else runs here would otherwise come first, and be measured with it.
    config.nice = 0;
    let pool = Pool::start(config).await.expect("an evaluator; `make evaluator` sets it up");
    for mut states in [pool.program_states(), pool.formula_states()] {
        states.wait_for(|states| states.iter().all(|state| state.is_ready)).await.expect("interpreters");
    }
    pool
}

/// Has `width` clients take jobs one after the other; gives how long each job took, and all of them together.
async fn measure<J, F>(jobs: Vec<J>, width: usize, act: impl Fn(J) -> F) -> (Vec<Duration>, Duration)
where
    J: Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let queue = Arc::new(Mutex::new(VecDeque::from_iter(jobs.into_iter().map(act))));
    let began = Instant::now();
    let clients: Vec<_> = (0..width)
        .map(|_| {
            let queue = Arc::clone(&queue);
            tokio::spawn(async move {
                let mut walls = Vec::new();
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(job) = next else { return walls };
                    let began = Instant::now();
                    job.await;
                    walls.push(began.elapsed());
                }
            })
        })
        .collect();
    let mut walls = Vec::new();
    for client in clients {
        walls.extend(client.await.expect("a client"));
    }
    let whole = began.elapsed();
    walls.sort_unstable();
    (walls, whole)
}

async fn programs(pool: &Arc<Pool>) {
    let rows: Vec<Row> = json_lines("environments/data/HumanEval.jsonl.gz");
    let program = |row: &Row| Program {
        code: format!("{}{}", row.prompt, row.canonical_solution).into(),
        tests: vec![format!("{}\ncheck({})", row.test, row.entry_point)].into(),
    };
    let jobs: Vec<Program> = rows.iter().chain(&rows).map(program).collect();
    let (walls, whole) = measure(jobs, WIDTH, |program| {
        let pool = Arc::clone(pool);
        async move {
            if let Err(error @ EvaluatorError::Sandbox { .. }) = pool.run(program).await {
                println!("{error}");
            }
        }
    })
    .await;
    report("programs", &walls, whole);
}

async fn pairs(pool: &Arc<Pool>) {
    let pairs: Vec<Pair> = json("environments/math/pairs.json");
    let (walls, whole) = measure(pairs, GROUP, |pair| {
        let pool = Arc::clone(pool);
        async move {
            if pair.needs_sympy()
                && let Err(error) = pool.are_equal(&pair.predicted_norm, &pair.gold_norm).await
            {
                println!("{error}");
            }
        }
    })
    .await;
    report("pairs", &walls, whole);
}

fn report(what: &str, walls: &[Duration], whole: Duration) {
    let at = |percent: usize| walls[(walls.len() * percent / 100).min(walls.len() - 1)].as_secs_f64() * 1e3;
    let count = u32::try_from(walls.len()).expect("few");
    let per_second = f64::from(count) / whole.as_secs_f64();
    println!("{count} {what}: {per_second:.0} a second, p50 {:.2} ms, p99 {:.1} ms", at(50), at(99));
}
