//! Seeds, splits and task ids against the reference.

use std::collections::BTreeMap;
use std::path::PathBuf;

use grail_environments::gsm8k::{DatasetCheck, DatasetError, Fingerprint, Gsm8k, read_rows, split_rows};
use grail_environments::{Environment, Split};
use grail_golden::{json, path, ran};
use grail_protocol::ids::{BlockHash, EnvironmentSeed, GroupIndex, Hotkey};
use grail_protocol::python_random::PythonRandom;
use grail_protocol::seed::environment_seed;
use serde::Deserialize;
use serde::de::IgnoredAny;
use sha2::{Digest, Sha256};

const TEST_FILE: &str = "environments/data/gsm_test.jsonl.gz";
const SPLITS: [(&str, Split); 3] =
    [("gsm8k/train", Split::Train), ("gsm8k/val", Split::Val), ("gsm8k/test", Split::Test)];

fn gsm8k(split: Split) -> Gsm8k {
    match split {
        Split::Test => Gsm8k::from_file(&path(TEST_FILE), split),
        split => Gsm8k::embedded(split),
    }
    .expect("the data is the published one")
}

fn sha256(text: &str) -> String {
    hex::encode(Sha256::digest(text))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SeedTable {
    size: usize,
    rows: Vec<SeedRow>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SeedRow {
    seed: u64,
    id: String,
    index: usize,
    metadata: Metadata,
    question_sha256: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    split: String,
    index: usize,
    /// The rest belongs to environments that are not supported yet: their rows are not run.
    #[serde(default, rename = "level")]
    _level: Option<IgnoredAny>,
    #[serde(default, rename = "subject")]
    _subject: Option<IgnoredAny>,
    #[serde(default, rename = "task_id")]
    _task_id: Option<IgnoredAny>,
    #[serde(default, rename = "num_tests")]
    _num_tests: Option<IgnoredAny>,
    #[serde(default, rename = "original_task_id")]
    _original_task_id: Option<IgnoredAny>,
}

#[test]
fn seeds_mean_the_reference_tasks() {
    const FILE: &str = "environments/seeds/seed_to_index.json";
    let mut tables: BTreeMap<String, SeedTable> = json(FILE);
    let mut cases = 0;
    for (name, split) in SPLITS {
        let table = tables.remove(name).expect("the file has this split");
        let environment = gsm8k(split);
        assert_eq!((environment.task_count(), environment.split()), (table.size, split), "{name}");
        for row in table.rows {
            let task = environment.task(EnvironmentSeed(row.seed)).unwrap();
            let expected = (row.id, row.index, row.question_sha256);
            assert_eq!((task.id, task.row, sha256(&task.question)), expected, "{name} seed {}", row.seed);
            assert_eq!((row.metadata.split.as_str(), row.metadata.index), (split.as_str(), row.index), "{name}");
            cases += 1;
        }
    }
    assert_eq!(tables.len(), 6, "the other tables are of environments that are not supported yet");
    ran(FILE, cases, 300);
    ran(TEST_FILE, gsm8k(Split::Test).task_count(), 1319);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DerivedSeed {
    wallet: String,
    window_hash: String,
    problem_index: i64,
    seed: u64,
}

#[test]
fn seeds_derive_from_wallet_window_and_group() {
    const FILE: &str = "environments/seeds/derived_seeds.json";
    let cases: Vec<DerivedSeed> = json(FILE);
    for case in &cases {
        let (wallet, window) = (Hotkey(case.wallet.clone()), BlockHash(case.window_hash.clone()));
        assert_eq!(environment_seed(&wallet, &window, GroupIndex(case.problem_index)), EnvironmentSeed(case.seed));
    }
    ran(FILE, cases.len(), 60);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Lookup {
    source: String,
    task_id: Option<String>,
    id: String,
    index: i64,
    /// Absent where neither id nor seed was given.
    question_sha256: Option<String>,
}

#[test]
fn text_ids_mean_the_reference_tasks() {
    const FILE: &str = "environments/seeds/task_id_lookup.json";
    let cases: Vec<Lookup> = json(FILE);
    let mut count = 0;
    for (name, split) in SPLITS {
        let environment = gsm8k(split);
        for case in cases.iter().filter(|case| case.source == name) {
            let task = environment.task_by_id(case.task_id.as_deref()).unwrap();
            assert_eq!(
                (&task.id, task.id == format!("{split}_{}", case.index)),
                (&case.id, true),
                "{:?}",
                case.task_id
            );
            let rows = i64::try_from(environment.task_count()).unwrap();
            assert_eq!(i64::try_from(task.row), Ok(case.index.rem_euclid(rows)), "{:?}", case.task_id);
            if let Some(expected) = &case.question_sha256 {
                assert_eq!(sha256(&task.question), *expected, "{:?}", case.task_id);
            }
            count += 1;
        }
    }
    ran(FILE, count, 42);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shuffles {
    independent: Vec<Shuffle>,
    two_shuffles_one_generator_seed42_n50: Vec<Vec<usize>>,
    first_getrandbits32_seed42: Vec<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shuffle {
    seed: u64,
    n: usize,
    shuffled: Vec<usize>,
}

#[test]
fn shuffles_are_those_of_cpython() {
    const FILE: &str = "environments/splits/cpython_shuffle.json";
    let file: Shuffles = json(FILE);
    for case in &file.independent {
        let mut order: Vec<usize> = (0..case.n).collect();
        PythonRandom::from_u64(case.seed).shuffle(&mut order);
        assert_eq!(order, case.shuffled, "seed {} n {}", case.seed, case.n);
    }
    let mut generator = PythonRandom::from_u64(42);
    for expected in &file.two_shuffles_one_generator_seed42_n50 {
        let mut order: Vec<usize> = (0..50).collect();
        generator.shuffle(&mut order);
        assert_eq!(order, *expected);
    }
    let mut generator = PythonRandom::from_u64(42);
    for expected in &file.first_getrandbits32_seed42 {
        assert_eq!(generator.getrandbits(32), *expected);
    }
    let runs = file.two_shuffles_one_generator_seed42_n50.len();
    assert_eq!((runs, file.first_getrandbits32_seed42.is_empty()), (2, false));
    ran(FILE, file.independent.len() + runs, 52);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ValRows {
    hf_rows: usize,
    val_rows_in_order: Vec<usize>,
}

#[test]
fn the_held_out_rows_are_the_references() {
    const FILE: &str = "environments/splits/gsm8k_val_rows.json";
    let file: ValRows = json(FILE);
    let (train, val) = (gsm8k(Split::Train), gsm8k(Split::Val));
    assert_eq!(val.file_rows(), file.val_rows_in_order);
    let mut all = [train.file_rows(), val.file_rows()].concat();
    assert!(train.file_rows().is_sorted());
    all.sort_unstable();
    assert!(all.into_iter().eq(0..file.hf_rows));
    ran(FILE, file.val_rows_in_order.len(), 250);
}

/// A folder with one file `name` of the given content.
fn file(name: &str, content: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let path = folder.path().join(name);
    std::fs::write(&path, content).expect("the file can be written");
    (folder, path)
}

#[test]
fn plain_and_compressed_files_are_the_same() {
    let plain = grail_golden::bytes(TEST_FILE);
    let (_folder, plain_path) = file("test.jsonl", &plain);
    let from_plain = Gsm8k::from_file(&plain_path, Split::Test).unwrap();
    let from_gzip = gsm8k(Split::Test);
    for seed in (0..1 << 32).step_by(1 << 27) {
        let seed = EnvironmentSeed(seed);
        assert_eq!(from_plain.task(seed).unwrap(), from_gzip.task(seed).unwrap());
    }
}

#[test]
fn another_file_is_refused_unless_named() {
    let text = String::from_utf8(grail_golden::bytes(TEST_FILE)).unwrap();
    let (_a, swapped) = file("swapped.jsonl", text.replacen("Janet", "Janot", 1).as_bytes());
    let error = Gsm8k::from_file(&swapped, Split::Test).unwrap_err();
    assert!(matches!(&error, DatasetError::Fingerprint { actual, expected, .. } if actual != expected), "{error}");

    let short: String = text.lines().take(300).flat_map(|line| [line, "\n"]).collect();
    let (_b, short) = file("short.jsonl", short.as_bytes());
    let error = Gsm8k::from_file(&short, Split::Test).unwrap_err();
    assert!(matches!(error, DatasetError::RowCount { rows: 300, expected: 1319, .. }), "{error}");
    let error = Gsm8k::from_file(&path(TEST_FILE), Split::Train).unwrap_err();
    assert!(matches!(error, DatasetError::RowCount { rows: 1319, expected: 7473, .. }), "{error}");

    let fingerprint = Fingerprint::of(&read_rows(&short).unwrap());
    let named = DatasetCheck::Override { rows: 300, fingerprint: fingerprint.to_string().parse().unwrap() };
    assert_eq!(Gsm8k::from_file_with(&short, Split::Train, named).unwrap().task_count(), 50);
    let wrong = DatasetCheck::Override { rows: 300, fingerprint: Fingerprint::of(&[]) };
    assert!(matches!(Gsm8k::from_file_with(&short, Split::Val, wrong), Err(DatasetError::Fingerprint { .. })));
}

#[test]
fn broken_files_name_the_line() {
    let (_a, missing) = file("x", b"");
    std::fs::remove_file(&missing).unwrap();
    assert!(matches!(Gsm8k::from_file(&missing, Split::Test), Err(DatasetError::Read { .. })));
    let (_b, cut) = file("cut.jsonl.gz", &std::fs::read(path(TEST_FILE)).unwrap()[..1000]);
    assert!(matches!(Gsm8k::from_file(&cut, Split::Test), Err(DatasetError::Read { .. })));
    let (_c, line) =
        file("line.jsonl", b"{\"question\": \"q\", \"extra\": 1, \"answer\": null}\n\n{\"question\": 7}\n");
    let error = Gsm8k::from_file(&line, Split::Test).unwrap_err();
    assert!(matches!(error, DatasetError::Line { line: 3, .. }), "{error}");
    assert!(matches!(Gsm8k::embedded(Split::Test), Err(DatasetError::NotEmbedded { .. })));
    assert_eq!(split_rows(10, Split::Val).len(), 10);
    let (_d, few) = file("few.jsonl", b"{}\n");
    let named = DatasetCheck::Override { rows: 1, fingerprint: Fingerprint::of(&read_rows(&few).unwrap()) };
    assert!(matches!(Gsm8k::from_file_with(&few, Split::Train, named), Err(DatasetError::TooFewRows { rows: 1, .. })));
}

mod properties {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    static TRAIN: LazyLock<Gsm8k> = LazyLock::new(|| gsm8k(Split::Train));

    proptest! {
        #[test]
        fn every_seed_has_a_task(seed in any::<u64>()) {
            let task = TRAIN.task(EnvironmentSeed(seed)).unwrap();
            prop_assert!(task.row < TRAIN.task_count());
            // The reference computes with doubles; both of its steps are exact.
            let fraction = (seed % (1 << 32)) as f64 / 4_294_967_296.0;
            prop_assert_eq!(task.row as f64, (fraction * TRAIN.task_count() as f64).trunc());
            prop_assert_eq!(TRAIN.task_by_id(Some(&task.id)).unwrap(), task);
        }

        #[test]
        fn any_text_id_has_a_task(id in "[-+_0-9a ٣]{0,50}|.{0,20}") {
            prop_assert!(TRAIN.task_by_id(Some(&id)).unwrap().row < TRAIN.task_count());
        }
    }
}
