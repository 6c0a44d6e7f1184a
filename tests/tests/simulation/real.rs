//! The same schedules with real worker processes, in real time: fifty of them, several at once.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use grail_checkpoint::WeightsFiles;
use grail_ipc::jobs::{RowJob, VerifyJob};
use grail_ipc::socket::RuntimeFolder;
use grail_process::restart::RestartPolicy;
use grail_protocol::ids::{TokenId, WeightsHash};
use grail_protocol::randomness;
use grail_protocol::sketch::modular_distance;
use grail_supervisor::chain::LocalChain;
use grail_supervisor::fleet::{
    Heartbeat, Observers, SlotLimits, SlotPin, Target, WorkerSettings, Workers, single_worker,
};
use grail_supervisor::journal::{self, Event};
use grail_tests::binaries::binary;

use crate::checks::{self, Proved};
use crate::schedule::Schedule;
use crate::world::{Pace, World, checkpoint, fixtures, window};

const SCHEDULES: u64 = 50;
/// Worlds at once: most of their time is waiting.
const AT_ONCE: usize = 6;

fn settings(faults: String, slots: u32, limits: SlotLimits) -> WorkerSettings {
    WorkerSettings {
        program: binary("grail-proof-worker"),
        variables: vec![(grail_process::fault::VARIABLE, faults)],
        pins: vec![SlotPin::cpu(Vec::new()); slots as usize],
        delegation: None,
        dtype: "float32",
        threads: 1,
        limits,
    }
}

fn target(number: u64, folder: &Path) -> Target {
    let weights = WeightsFiles::open(folder).unwrap().hash().unwrap();
    Target::from_folder(checkpoint(window(number)), folder.to_owned(), weights)
}

fn pace(seed: u64) -> Pace {
    let demo = &fixtures().demo;
    let first = (window(3_000), target(3_000, &demo.first));
    let second = (window(3_030), target(3_030, &demo.second));
    Pace {
        block: Duration::from_millis(600),
        slack: Duration::from_millis(500),
        haste: 60,
        limits: SlotLimits {
            start: Duration::from_secs(60),
            reload: Duration::from_secs(3),
            prove: Duration::from_secs(4),
            drain: Duration::from_secs(5),
            heartbeat: Heartbeat { every: Duration::from_millis(250), limit: Duration::from_secs(3) },
            restart: RestartPolicy::default(),
            jitter_seed: Some(seed),
        },
        // Every fourth world has a second window, with a roll before it.
        targets: if seed.is_multiple_of(4) { vec![first, second] } else { vec![first] },
        is_virtual: false,
    }
}

/// Lives through a schedule; gives the deaths of workers.
fn run(seed: u64, proved: &Mutex<Proved>) -> usize {
    let mut schedule = Schedule::new(seed);
    schedule.slots = schedule.slots.min(2);
    schedule.max_groups = schedule.max_groups.min(6);
    schedule.workers.retain(|(_, slot, _), _| *slot < 2);
    for fault in schedule.workers.values_mut() {
        *fault = fault.sooner();
    }
    // Pauses between tries are as long as ever, and these windows are short.
    schedule.store.truncate(2);
    schedule.unread = schedule.unread.min(1);
    let mut world = World::at(schedule, pace(seed), SystemTime::now());
    // Socket paths are short.
    let sockets = tempfile::tempdir().unwrap();
    world.live_through_with(|world, life, target, observers: &Observers| {
        let runtime = RuntimeFolder::create(&sockets.path().join(life.to_string())).unwrap();
        let schedule = &world.schedule;
        let settings = settings(schedule.fault_text(life), schedule.slots, world.pace.limits.clone());
        Workers::start(&settings, &runtime, target, observers)
    });
    let kept = checks::promises(&world, &mut proved.lock().unwrap());
    if let Err(broken) = kept {
        panic!("seed {seed}: {broken}\nschedule: {:#?}\njournal:\n{}", world.schedule, world.journal_text());
    }
    let events = journal::read(&world.state_dir()).unwrap();
    events.iter().filter(|event| matches!(event, Event::WorkerLost { .. })).count()
}

#[test]
fn fifty_schedules_with_real_processes() {
    let (proved, next, deaths) = (Mutex::new(Proved::new()), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let seed @ ..SCHEDULES = next.fetch_add(1, Ordering::Relaxed) {
                    deaths.fetch_add(run(seed, &proved) as u64, Ordering::Relaxed);
                }
            });
        }
    });
    let (proved, deaths) = (proved.into_inner().unwrap(), deaths.into_inner());
    println!("{SCHEDULES} schedules: {deaths} deaths of workers, {} different rows", proved.len());
    assert!(deaths >= SCHEDULES / 2, "the schedules miss what they are for");
    agrees_with_a_calm_worker(&proved);
}

/// Every row, proved again by workers that nobody disturbs.
fn agrees_with_a_calm_worker(proved: &Proved) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let demo = &fixtures().demo;
    for (number, folder) in [(3_000, &demo.first), (3_030, &demo.second)] {
        let rows: Vec<_> = proved.iter().filter(|((weights, _), _)| *weights == hash_of(folder)).collect();
        assert!(!rows.is_empty(), "no window was mined with {}", folder.display());
        let found = runtime.block_on(verify(number, folder, &rows));
        for (((_, tokens), sketches), facts) in rows.iter().zip(found) {
            let farthest = sketches
                .iter()
                .zip(&facts)
                .map(|(ours, calm)| modular_distance(i64::from(*ours), i64::from(*calm)))
                .max();
            // The protocol tolerates 6,000 and more; other weights are off by millions.
            assert!(farthest < Some(100), "a row of {} tokens is {farthest:?} off", tokens.len());
        }
    }
}

fn hash_of(folder: &Path) -> WeightsHash {
    WeightsFiles::open(folder).unwrap().hash().unwrap()
}

/// A row's weights and tokens, and its sketches.
type Row<'a> = (&'a (WeightsHash, Vec<TokenId>), &'a Vec<u32>);

/// Sketches of `rows` by a worker of its own.
async fn verify(number: u64, folder: &Path, rows: &[Row<'_>]) -> Vec<Vec<u32>> {
    let sockets = tempfile::tempdir().unwrap();
    let target = target(number, folder);
    let weights = target.weights;
    let settings = settings(String::new(), 1, SlotLimits::default());
    let (workers, client) = single_worker(&settings, &sockets.path().join("calm"), target).await.unwrap();
    let hash = LocalChain::hash_of("simulation", window(number).block());
    let randomness = randomness::mix_miner(&hash, None).to_bytes().to_vec();
    let row = |tokens: &Vec<TokenId>| RowJob {
        tokens: tokens.clone(),
        prompt_length: u32::try_from(tokens.len() - 1).unwrap(),
        randomness: randomness.clone(),
        temperature: 1.0,
        repetition_penalty: 1.0,
        eos_token: fixtures().files.eos_token,
    };
    let job = VerifyJob { weights, rows: rows.iter().map(|((_, tokens), _)| row(tokens)).collect() };
    let facts = client.verify(&job).await.unwrap();
    workers.shut_down().await;
    facts.into_iter().map(|facts| facts.sketches).collect()
}
