//! What must hold whatever happened.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use grail_protocol::ids::{CheckpointWindow, TokenId, WeightsHash, WindowStart};
use grail_protocol::window_file::{List, ReadRow, read_bytes};
use grail_supervisor::journal::{self, Event};
use grail_supervisor::store::{WindowStore, window_key};

use crate::generator::{completion, request_name};
use crate::schedule::WorkerFault;
use crate::world::{World, checkpoint, fixtures};

/// Sketches of every row by its weights and tokens: the same in every world, or somebody mixed something up.
pub type Proved = BTreeMap<(WeightsHash, Vec<TokenId>), Vec<u32>>;

/// Checks all promises; says which one is broken.
pub fn promises(world: &World, proved: &mut Proved) -> Result<(), String> {
    let events = journal::read(&world.state_dir()).map_err(|error| error.to_string())?;
    for (window, target) in &world.pace.targets {
        one_window(world, &events, (*window, target.weights), proved)
            .map_err(|broken| format!("window {window}: {broken}"))?;
    }
    drops_have_reasons(world, &events)
}

fn one_window(
    world: &World,
    events: &[Event],
    (window, weights): (WindowStart, WeightsHash),
    proved: &mut Proved,
) -> Result<(), String> {
    let mut spooled = BTreeSet::new();
    let mut uploads = 0;
    for event in events {
        match event {
            Event::GroupSpooled { window: of, group, .. } if *of == window => {
                if uploads > 0 {
                    return Err(format!("group {group} was spooled after the upload"));
                }
                if !spooled.insert(group.0) {
                    return Err(format!("group {group} was spooled twice"));
                }
            }
            Event::WindowUploaded { window: of, .. } if *of == window => uploads += 1,
            Event::WindowLost { window: of, reason } if *of == window => return Err(format!("lost: {reason}")),
            _ => {}
        }
    }
    if uploads > 1 {
        return Err(format!("uploaded {uploads} times"));
    }
    if uploads == 0 {
        let lost = spooled.len();
        return if lost == 0 { Ok(()) } else { Err(format!("{lost} spooled groups were never uploaded")) };
    }
    let file = read(world, window)?;
    let missing: Vec<_> = spooled.iter().filter(|group| !file.contains_key(group)).collect();
    if !missing.is_empty() {
        return Err(format!("spooled groups {missing:?} are not in the file"));
    }
    for (group, rows) in &file {
        whole_and_unmixed((window, *group), rows, (checkpoint(window), weights), proved)
            .map_err(|broken| format!("group {group}: {broken}"))?;
    }
    let key = window_key(fixtures().signer.hotkey(), window).to_string();
    let (puts, most) = (world.store.puts_of(&key), 1 + world.schedule.store.len());
    if puts > most {
        return Err(format!("{puts} puts, at most {most} have a reason"));
    }
    Ok(())
}

/// Whether the store holds a file of `window`.
pub fn is_there(world: &World, window: WindowStart) -> bool {
    let key = window_key(fixtures().signer.hotkey(), window);
    let store = WindowStore::new(world.store.clone(), Duration::from_secs(90));
    futures::executor::block_on(store.get(&key)).is_ok()
}

/// Rows of the stored file by group.
pub fn read(world: &World, window: WindowStart) -> Result<BTreeMap<i64, Vec<ReadRow>>, String> {
    let key = window_key(fixtures().signer.hotkey(), window);
    let store = WindowStore::new(world.store.clone(), Duration::from_secs(90));
    let content = futures::executor::block_on(store.get(&key)).map_err(|error| error.to_string())?;
    let file = read_bytes(content).map_err(|error| error.to_string())?;
    let mut groups: BTreeMap<i64, Vec<ReadRow>> = BTreeMap::new();
    for row in file.rows {
        groups.entry(row.rollout_group.ok_or("a row without group")?).or_default().push(row);
    }
    Ok(groups)
}

/// A group is whole, and all of it was drawn and proved with the weights of `checkpoint`.
pub fn whole_and_unmixed(
    (window, group): (WindowStart, i64),
    rows: &[ReadRow],
    (checkpoint, weights): (CheckpointWindow, WeightsHash),
    proved: &mut Proved,
) -> Result<(), String> {
    let indexes: BTreeSet<_> = rows.iter().map(|row| row.rollout_index).collect();
    if rows.len() != 16 || indexes.len() != 16 {
        return Err(format!("{} rows with {} different indexes", rows.len(), indexes.len()));
    }
    for row in rows {
        let rollout = usize::try_from(row.rollout_index.ok_or("a row without index")?).unwrap();
        let List::Plain(tokens) = &row.commit.tokens else { return Err("a row without tokens".to_owned()) };
        let tokens: Vec<TokenId> = tokens.iter().map(|token| TokenId(u32::try_from(*token).unwrap())).collect();
        let drawn = completion(&request_name(window.block().0, group, rollout), weights);
        if !tokens.ends_with(&drawn) {
            return Err(format!("rollout {rollout} holds another completion than was drawn for it with its weights"));
        }
        let found = row.commit.commitments.sketches().ok_or("a row without sketches")?;
        if found != proved.entry((weights, tokens)).or_insert_with(|| found.to_vec()) {
            return Err(format!("rollout {rollout} was proved with other weights than the same tokens elsewhere"));
        }
        let expected = i64::try_from(checkpoint.0).unwrap();
        if row.checkpoint_window != Some(expected) {
            return Err(format!("rollout {rollout} names checkpoint {:?}", row.checkpoint_window));
        }
    }
    Ok(())
}

/// A group is dropped for what the schedule did to it, and for nothing else.
fn drops_have_reasons(world: &World, events: &[Event]) -> Result<(), String> {
    let schedule = &world.schedule;
    let deaths = events.iter().filter(|event| matches!(event, Event::WorkerLost { .. })).count();
    let given_up = events.iter().any(|event| matches!(event, Event::WorkerGivenUp { .. }));
    for event in events {
        let Event::GroupDropped { window, group, reason } = event else { continue };
        let has_cause = if reason.contains("cannot be read: simulated") {
            schedule.bad_samples > 0
        } else if reason.contains("poisonous") {
            let kept = world.state_dir().join("poisonous").join(format!("window-{window}-group-{group}.groups"));
            let recording = grail_ipc::record::read(&kept).map_err(|error| error.to_string())?;
            deaths >= 2 && recording.groups.iter().map(|job| job.group).eq([*group])
        } else if reason.contains("out_of_memory") {
            schedule.has(|fault| matches!(fault, WorkerFault::OutOfMemory { .. }))
        } else if reason.contains("non_finite") {
            schedule.has(|fault| matches!(fault, WorkerFault::NotFinite { .. }))
        } else if reason.contains("no worker is left") {
            given_up
        } else {
            false
        };
        if !has_cause {
            return Err(format!("group {group} of window {window} was dropped without a cause: {reason}"));
        }
    }
    Ok(())
}
