//! Tolerance, advantages, scoring.

use std::collections::{BTreeMap, HashMap};

use grail_protocol::advantage::{advantages, are_consistent, python_sum};
use grail_protocol::ids::{BlockHash, Hotkey, WindowStart};
use grail_protocol::scoring::{MinerRecord, WindowScore, miner_sample_size, select_miners, weights};
use grail_protocol::sketch::{modular_distance, modular_distance_big, tolerance};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ToleranceFile {
    cases: Vec<ToleranceCase>,
    modular: Vec<DistanceCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ToleranceCase {
    position: usize,
    tolerance: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DistanceCase {
    a: i64,
    b: i64,
    distance: i128,
}

#[test]
fn tolerances() {
    const FILE: &str = "protocol/tolerance.json";
    let file: ToleranceFile = grail_golden::json(FILE);
    let mut ran = 0;
    for case in &file.cases {
        assert_eq!(tolerance(case.position), case.tolerance, "{}", case.position);
        ran += 1;
    }
    for case in &file.modular {
        assert_eq!(modular_distance(case.a, case.b), case.distance);
        assert_eq!(modular_distance_big(&case.b.into(), &case.a.into()), case.distance.into());
        ran += 1;
    }
    grail_golden::ran(FILE, ran, file.cases.len() + file.modular.len());
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AdvantageFile {
    note: String,
    cases: Vec<AdvantageCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AdvantageCase {
    rewards: Vec<String>,
    advantages: Vec<String>,
    sum: String,
}

fn floats(texts: &[String]) -> Vec<f64> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn bits(numbers: &[f64]) -> Vec<u64> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

#[test]
fn advantages_of_groups() {
    const FILE: &str = "protocol/advantages.json";
    let file: AdvantageFile = grail_golden::json(FILE);
    assert!(!file.note.is_empty());
    let mut ran = 0;
    for case in &file.cases {
        let (rewards, expected) = (floats(&case.rewards), floats(&case.advantages));
        let computed = advantages(&rewards);
        assert_eq!(bits(&computed), bits(&expected), "{:?}", case.rewards);
        let sum: f64 = case.sum.parse().unwrap();
        assert_eq!(python_sum(computed.iter().copied()).to_bits(), sum.to_bits());
        assert!(are_consistent(&computed, &rewards));
        ran += 1;
    }
    grail_golden::ran(FILE, ran, file.cases.len());
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ScoringFile {
    sample_size: Vec<SampleSizeCase>,
    selection: SelectionCase,
    weights: Vec<WeightsCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SampleSizeCase {
    active: usize,
    sample: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SelectionCase {
    hotkeys: Vec<Hotkey>,
    window_hash: BlockHash,
    counts: HashMap<Hotkey, u64>,
    selected: Vec<Hotkey>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WeightsCase {
    counts: HashMap<String, HashMap<String, Counts>>,
    availability: HashMap<String, u64>,
    uids: Vec<u16>,
    hotkeys: Vec<String>,
    target_window: u64,
    weights: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Counts {
    estimated_unique: u64,
    had_failure: u8,
}

fn scores(counts: &HashMap<String, Counts>) -> BTreeMap<WindowStart, WindowScore> {
    let score = |(start, counts): (&String, &Counts)| {
        let window = WindowStart::try_from(start.parse::<u64>().unwrap()).unwrap();
        (window, WindowScore { estimated_unique: counts.estimated_unique, had_failure: counts.had_failure == 1 })
    };
    counts.iter().map(score).collect()
}

#[test]
fn scoring() {
    const FILE: &str = "protocol/scoring.json";
    let file: ScoringFile = grail_golden::json(FILE);
    let mut ran = 0;
    for case in &file.sample_size {
        assert_eq!(miner_sample_size(case.active), case.sample, "{}", case.active);
        ran += 1;
    }
    let SelectionCase { hotkeys, window_hash, counts, selected } = &file.selection;
    assert_eq!(&select_miners(hotkeys, window_hash, counts), selected);
    ran += 1;
    for case in &file.weights {
        let windows: Vec<_> =
            case.hotkeys.iter().map(|hotkey| case.counts.get(hotkey).map(scores).unwrap_or_default()).collect();
        let miners: Vec<MinerRecord<'_>> = (0..case.uids.len())
            .map(|index| MinerRecord {
                uid: case.uids[index],
                windows: &windows[index],
                windows_active: case.availability.get(&case.hotkeys[index]).copied().unwrap_or(0),
            })
            .collect();
        let computed = weights(&miners, WindowStart::try_from(case.target_window).unwrap());
        assert_eq!(bits(&computed), bits(&floats(&case.weights)), "{computed:?}");
        ran += 1;
    }
    grail_golden::ran(FILE, ran, file.sample_size.len() + 1 + file.weights.len());
}
