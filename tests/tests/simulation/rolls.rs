//! Rolls in virtual time: the real choice, download, cache and look-out for late markers, under a trainer that does everything wrong.
//!
//! Whatever happens: a window that is uploaded was drawn and proved, group by group, with the weights of the checkpoint that the rule
//! demands of it by the last complete listing before the upload, and no group that was made with them is missing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use grail_checkpoint::retention::RetentionLimits;
use grail_checkpoint::{CheckpointCache, CheckpointStore};
use grail_protocol::ids::{CheckpointWindow, WindowStart};
use grail_supervisor::chain::Chain;
use grail_supervisor::checkpoints::Checkpoints;
use grail_supervisor::clock::Clock;
use grail_supervisor::engine::{EngineError, Outcome, StopSignals};
use grail_supervisor::fleet::{FleetError, Workers, target_of};
use grail_supervisor::journal::{self, Event};
use grail_supervisor::prefetch::Prefetcher;
use grail_supervisor::store::window_key;

use crate::checks::{self, Proved};
use crate::store::Seen;
use crate::trainer::{Plan, TrainerStore, TrainerView, WINDOWS, weights_of};
use crate::worker::{SimLink, sketches};
use crate::world::{MinedWith, World, fixtures, window};

const SCHEDULES: u64 = 120;
/// Lives after which a world is stuck.
const MOST_LIVES: usize = 14;

/// How often schedules reached what they are for.
#[derive(Debug, Default)]
struct Reached {
    uploaded: usize,
    not_uploaded: usize,
    restarted: usize,
    withdrawn: usize,
    prefetched: usize,
    /// Different checkpoints of a world that windows were uploaded with, beyond the first.
    rolls: usize,
}

fn windows() -> impl Iterator<Item = WindowStart> {
    (0..WINDOWS).map(|index| window(3_000 + 30 * index))
}

/// One host under one trainer.
struct Rolls {
    world: World,
    plan: Plan,
    trainer: Arc<TrainerStore>,
}

impl Rolls {
    fn new(seed: u64) -> Self {
        let mut world = World::new(seed);
        // The puts of windows are the other simulation's.
        world.schedule.store.clear();
        world.schedule.crashes.truncate(1);
        let trainer = TrainerStore::new(world.store.log.clone());
        Self { plan: Plan::new(seed), world, trainer }
    }

    /// One life of the supervisor after the other.
    fn live_through(&mut self) {
        let begin = self.world.now;
        for life in 0..MOST_LIVES {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
            let limit = self.world.schedule.crashes.get(life).copied().unwrap_or(Duration::MAX);
            let (ended, lasted) = runtime.block_on(async {
                let began = tokio::time::Instant::now();
                let ended = tokio::time::timeout(limit, self.live(life, begin)).await;
                (ended, began.elapsed())
            });
            drop(runtime);
            self.world.now += lasted + Duration::from_secs(2);
            match ended {
                Ok(Ok(())) => return,
                Ok(Err(EngineError::NoWorkers | EngineError::Fleet(FleetError::NoWorkers { .. }))) => {}
                Ok(Err(error)) => panic!("life {life} ended with {error:?}"),
                Err(_) => self.world.crashes += 1,
            }
        }
        panic!("the supervisor does not come to an end");
    }

    /// As the miner's own loop, without its processes: the generation server has the weights of each window from its begin.
    async fn live(&self, life: usize, begin: std::time::SystemTime) -> Result<(), EngineError> {
        let world = &self.world;
        let clock = Clock::starting_at(world.now);
        let chain = world.chain(&clock);
        let observers = world.observers(&clock);
        let mut engine = world.engine(&chain, &clock);
        let store = CheckpointStore::new(Arc::new(TrainerView(self.trainer.clone())));
        let cache = CheckpointCache::open(world.state_dir().join("checkpoints")).unwrap();
        let retention = RetentionLimits { checkpoints: 2, bytes: u64::MAX, max_age: None };
        let checkpoints = Checkpoints::new(store, cache, retention);
        let acts = self.trainer.follow(&self.plan, &clock, begin);
        let mine = async {
            let mut workers: Option<Workers<SimLink>> = None;
            let mut fetching = None;
            for window in windows().filter(|window| !world.is_uploaded(*window)) {
                tokio::time::sleep_until(clock.instant_of(chain.expected_time(window.block()).await.unwrap())).await;
                let over = clock.instant_of(chain.expected_time(window.end()).await.unwrap());
                while tokio::time::Instant::now() < over {
                    let ready = match tokio::time::timeout_at(over, checkpoints.for_window(window)).await {
                        Ok(Ok(ready)) => ready,
                        Ok(Err(_)) => {
                            tokio::time::sleep(chain.nominal_block_time()).await;
                            continue;
                        }
                        Err(_) => break,
                    };
                    let target = target_of(&ready);
                    let is_new = workers.is_none();
                    let workers = workers.get_or_insert_with(|| {
                        let workers = world.simulated_workers(life, target.clone(), &observers);
                        world.obey_operator(life, &workers, &observers);
                        workers
                    });
                    fetching.get_or_insert_with(|| {
                        let prefetcher = Prefetcher {
                            checkpoints: checkpoints.clone(),
                            chain: chain.clone(),
                            fleet: workers.handle(&observers.queue),
                            environments: fixtures().environments.clone(),
                            journal: observers.journal.clone(),
                        };
                        tokio::spawn(prefetcher.run())
                    });
                    let (checkpoint, weights) = (ready.installed.window, ready.installed.weights_hash);
                    checkpoints.activate(checkpoint).await;
                    let fleet = async { if is_new { workers.wait_ready().await } else { workers.roll(target).await } };
                    let mined = MinedWith { checkpoint, weights, rule: checkpoints.rule(window, checkpoint) };
                    let parts = world.parts(window, mined, &chain, (&observers, &clock)).await;
                    let parts = Arc::new(parts);
                    let outcome = engine.run_window(parts.clone(), &StopSignals::default(), fleet).await?;
                    checkpoints.let_go();
                    let is_uploaded = matches!(outcome, Outcome::Uploaded { .. });
                    let begins_anew = match outcome {
                        Outcome::Superseded { .. } => true,
                        Outcome::Uploaded { .. } => {
                            let is_late = tokio::time::timeout_at(over, parts.rule.other()).await.is_ok();
                            is_late && engine.withdraw(window, parts.plan.deadline).await?
                        }
                        _ => false,
                    };
                    if !begins_anew {
                        if is_uploaded && tokio::time::Instant::now() >= over {
                            world.store.log.add(Seen::Over(window.block().0));
                        }
                        break;
                    }
                }
            }
            if let Some(fetching) = fetching {
                fetching.abort();
            }
            if let Some(workers) = workers {
                workers.shut_down().await;
            }
            Ok(())
        };
        let mut mine = std::pin::pin!(mine);
        tokio::select! {
            ended = &mut mine => ended,
            () = acts => mine.await,
        }
    }

    /// What the rule demands of `window` by these keys, written once more.
    fn demanded(window: WindowStart, keys: &[String]) -> Option<CheckpointWindow> {
        let marker = |key: &String| {
            let (checkpoint, ready) = key.strip_prefix("grail/checkpoints/checkpoint-")?.split_once("/READY-")?;
            let (checkpoint, ready): (u64, u64) = (checkpoint.parse().ok()?, ready.parse().ok()?);
            (ready < window.block().0).then_some((ready, checkpoint))
        };
        keys.iter().filter_map(marker).max().map(|(_, checkpoint)| CheckpointWindow(checkpoint))
    }

    fn promises(&self, reached: &mut Reached) -> Result<(), String> {
        let events = journal::read(&self.world.state_dir()).map_err(|error| error.to_string())?;
        let (mut proved, mut checkpoints) = (Proved::new(), BTreeSet::new());
        for window in windows() {
            let checkpoint = self.one_window(window, &events, &mut proved);
            let checkpoint = checkpoint.map_err(|broken| format!("window {window}: {broken}"))?;
            match checkpoint {
                Some(checkpoint) => {
                    reached.uploaded += 1;
                    checkpoints.insert(checkpoint);
                }
                None => reached.not_uploaded += 1,
            }
        }
        reached.rolls += checkpoints.len().saturating_sub(1);
        let count = |kind: fn(&Event) -> bool| events.iter().filter(|event| kind(event)).count();
        reached.restarted += count(|event| matches!(event, Event::WindowRestarted { .. }));
        reached.withdrawn += count(|event| matches!(event, Event::WindowWithdrawn { .. }));
        reached.prefetched += count(|event| matches!(event, Event::CheckpointInstalled { .. }));
        let is_right = |((weights, tokens), found): (&(_, Vec<_>), &Vec<u32>)| *found == sketches(tokens, 0, *weights);
        if proved.iter().all(is_right) { Ok(()) } else { Err("a row was proved with other weights".to_owned()) }
    }

    /// The checkpoint that a window was uploaded with.
    fn one_window(
        &self,
        window: WindowStart,
        events: &[Event],
        proved: &mut Proved,
    ) -> Result<Option<CheckpointWindow>, String> {
        let key = window_key(fixtures().signer.hotkey(), window).to_string();
        let is_there = checks::is_there(&self.world, window);
        if is_there != self.world.is_uploaded(window) {
            return Err(format!("a file in the store: {is_there}, which the journal has otherwise"));
        }
        let log = self.world.store.log.all();
        if !is_there {
            return Ok(None);
        }
        let put = log.iter().rposition(|seen| *seen == Seen::Put(key.clone())).ok_or("a file that nobody put")?;
        // Until the window was over, where the same life saw that; else a crash came, and nobody looked any more.
        let looked = log.iter().rposition(|seen| *seen == Seen::Over(window.block().0)).unwrap_or(put);
        let listed = log[..looked].iter().rev().find_map(|seen| match seen {
            Seen::Listed(keys) => Some(keys),
            Seen::Put(_) | Seen::Over(_) => None,
        });
        let demanded = Self::demanded(window, listed.ok_or("uploaded without a listing")?);
        let demanded = demanded.ok_or("uploaded although no checkpoint was ready")?;
        let weights = weights_of(demanded).ok_or_else(|| format!("there is no checkpoint {demanded}"))?;
        let file = checks::read(&self.world, window)?;
        for (group, rows) in &file {
            checks::whole_and_unmixed((window, *group), rows, (demanded, weights), proved)
                .map_err(|broken| format!("group {group}: {broken}"))?;
        }
        let begun = events.iter().rposition(|event| {
            matches!(event, Event::WindowRestarted { window: of, .. } | Event::WindowWithdrawn { window: of, .. } if *of == window)
        });
        let since = &events[begun.unwrap_or(0)..];
        let is_missing = |event: &&Event| matches!(event, Event::GroupSpooled { window: of, group, .. } if *of == window && !file.contains_key(&group.0));
        match since.iter().find(is_missing) {
            Some(missing) => Err(format!("{missing:?}, which is not in the file")),
            None => Ok(Some(demanded)),
        }
    }
}

/// Every second schedule; two tests, so that two cores can share them.
fn half(number: u64) {
    let alone = std::env::var("GRAIL_SIMULATION_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = alone.map_or_else(|| (number..SCHEDULES).step_by(2).collect(), |seed| vec![seed]);
    let mut reached = Reached::default();
    for seed in seeds {
        let mut rolls = Rolls::new(seed);
        rolls.live_through();
        if let Err(broken) = rolls.promises(&mut reached) {
            panic!(
                "seed {seed}: {broken}\nplan: {:#?}\nschedule: {:#?}\njournal:\n{}\nreplay with GRAIL_SIMULATION_SEED={seed}",
                rolls.plan,
                rolls.world.schedule,
                rolls.world.journal_text()
            );
        }
    }
    println!("{reached:?}");
    if alone.is_none() {
        let Reached { uploaded, not_uploaded, restarted, withdrawn, prefetched, rolls } = reached;
        let least = [uploaded, not_uploaded, restarted, withdrawn, prefetched, rolls].into_iter().min();
        assert!(least > Some(4), "the schedules miss what they are for");
    }
}

#[test]
fn rolls_first_half() {
    half(0);
}

#[test]
fn rolls_second_half() {
    half(1);
}
