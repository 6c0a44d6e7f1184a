//! Seeds, splits and task ids against the reference.

use std::collections::BTreeMap;
use std::sync::Arc;

use grail_environments::datasets::{DatasetError, embedded};
use grail_environments::gsm8k::Gsm8k;
use grail_environments::math::{Math, SUBSETS};
use grail_environments::mbpp::{self, Mbpp};
use grail_environments::{Environment, EnvironmentId, NoEvaluator, Payload, Split, humaneval};
use grail_golden::{json, json_lines, path, ran};
use grail_protocol::ids::{BlockHash, EnvironmentSeed, GroupIndex, Hotkey};
use grail_protocol::python_random::PythonRandom;
use grail_protocol::seed::environment_seed;
use serde::Deserialize;
use serde::de::IgnoredAny;
use sha2::{Digest, Sha256};

const TEST_FILE: &str = "environments/data/gsm_test.jsonl.gz";
/// Names of the tables, and what they are of.
const SPLITS: [(&str, EnvironmentId, Split); 9] = [
    ("gsm8k/train", EnvironmentId::Gsm8k, Split::Train),
    ("gsm8k/val", EnvironmentId::Gsm8k, Split::Val),
    ("gsm8k/test", EnvironmentId::Gsm8k, Split::Test),
    ("math/train", EnvironmentId::Math, Split::Train),
    ("math/val", EnvironmentId::Math, Split::Val),
    ("math/test", EnvironmentId::Math, Split::Test),
    ("mbpp/train", EnvironmentId::Mbpp, Split::Train),
    ("mbpp/validation", EnvironmentId::Mbpp, Split::Val),
    ("humaneval/test", EnvironmentId::HumanEval, Split::Test),
];

fn gsm8k(split: Split) -> Gsm8k {
    match split {
        Split::Test => Gsm8k::from_file(&path(TEST_FILE), split),
        split => Gsm8k::embedded(split),
    }
    .expect("the data is the published one")
}

fn environment(id: EnvironmentId, split: Split) -> Arc<dyn Environment> {
    match id {
        EnvironmentId::Gsm8k => Arc::new(gsm8k(split)),
        id => embedded(id, split, Arc::new(NoEvaluator)).expect("the data is the published one"),
    }
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

/// Of level on, each environment has its own.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    split: String,
    index: usize,
    level: Option<u64>,
    subject: Option<String>,
    task_id: Option<i64>,
    num_tests: Option<usize>,
    original_task_id: Option<String>,
}

impl Metadata {
    /// Whether this is of the row with `payload`.
    fn assert_of(&self, payload: &Payload, case: &str) {
        let none = (None, None, None, None, None);
        let (level, subject) = (self.level, self.subject.as_deref());
        let (task_id, tests, original) = (self.task_id, self.num_tests, self.original_task_id.as_deref());
        let expected = (level, subject, task_id, tests, original);
        let actual = match payload {
            Payload::Gsm8k { .. } => none,
            Payload::Math { level, subject, .. } => (Some(*level), Some(subject.as_ref()), None, None, None),
            Payload::Python { dataset_id, tests, .. } => match dataset_id.parse() {
                Ok(number) => (None, None, Some(number), Some(tests.len()), None),
                Err(_) => (None, None, None, None, Some(dataset_id.as_ref())),
            },
        };
        assert_eq!(actual, expected, "{case}");
    }
}

#[test]
fn seeds_mean_the_reference_tasks() {
    const FILE: &str = "environments/seeds/seed_to_index.json";
    let mut tables: BTreeMap<String, SeedTable> = json(FILE);
    let mut cases = 0;
    for (name, id, split) in SPLITS {
        let table = tables.remove(name).expect("the file has this split");
        let environment = environment(id, split);
        let facts = (environment.id(), environment.split(), environment.task_count());
        assert_eq!(facts, (id, split, table.size), "{name}");
        for row in table.rows {
            let case = format!("{name} seed {}", row.seed);
            let task = environment.task(EnvironmentSeed(row.seed)).unwrap();
            row.metadata.assert_of(&task.payload, &case);
            assert_eq!(name.split_once('/').unwrap(), (id.as_str(), row.metadata.split.as_str()), "{case}");
            assert_eq!(row.metadata.index, row.index, "{case}");
            let expected = (row.id, row.index, row.question_sha256);
            assert_eq!((task.id, task.row, sha256(&task.question)), expected, "{case}");
            cases += 1;
        }
    }
    assert!(tables.is_empty(), "{:?}", tables.keys());
    ran(FILE, cases, 900);
    ran(TEST_FILE, gsm8k(Split::Test).task_count(), 1319);
}

#[test]
fn embedded_files_are_the_authors() {
    for (file, bytes, rows) in [
        ("environments/data/mbpp.jsonl.gz", mbpp::EMBEDDED, 974),
        ("environments/data/HumanEval.jsonl.gz", humaneval::EMBEDDED, 164),
    ] {
        assert_eq!(std::fs::read(path(file)).unwrap(), bytes, "{file}");
        ran(file, json_lines::<IgnoredAny>(file).len(), rows);
    }
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
    for (name, id, split) in SPLITS {
        let environment = environment(id, split);
        for case in cases.iter().filter(|case| case.source == name) {
            let task = environment.task_by_id(case.task_id.as_deref()).unwrap();
            assert_eq!(task.id, case.id, "{name} {:?}", case.task_id);
            assert!(task.id.ends_with(&format!("_{}", case.index)), "{name} {:?}", case.task_id);
            let rows = i64::try_from(environment.task_count()).unwrap();
            assert_eq!(i64::try_from(task.row), Ok(case.index.rem_euclid(rows)), "{:?}", case.task_id);
            if let Some(expected) = &case.question_sha256 {
                assert_eq!(sha256(&task.question), *expected, "{:?}", case.task_id);
            }
            count += 1;
        }
    }
    ran(FILE, count, cases.len());
    assert_eq!(count, 126);
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MathValRows {
    subset_train_sizes: BTreeMap<String, usize>,
    val_counts: BTreeMap<String, usize>,
    val_rows_by_subset_in_order: BTreeMap<String, Vec<usize>>,
}

#[test]
fn the_held_out_rows_of_math_are_the_references() {
    const FILE: &str = "environments/splits/math_val_rows.json";
    let file: MathValRows = json(FILE);
    let (mut start, mut expected) = (0, Vec::new());
    for subset in SUBSETS {
        let rows = &file.val_rows_by_subset_in_order[subset.name];
        let sizes = (subset.train, rows.len());
        assert_eq!(sizes, (file.subset_train_sizes[subset.name], file.val_counts[subset.name]), "{}", subset.name);
        expected.extend(rows.iter().map(|row| start + row));
        start += subset.train;
    }
    let lists = [file.subset_train_sizes.len(), file.val_counts.len(), file.val_rows_by_subset_in_order.len()];
    assert_eq!(lists, [SUBSETS.len(); 3]);
    let rows = |split| Math::stand_in(split, Arc::new(NoEvaluator)).unwrap().file_rows().to_vec();
    assert_eq!(rows(Split::Val), expected);
    let mut all = [rows(Split::Train), rows(Split::Val)].concat();
    assert!(rows(Split::Train).is_sorted());
    all.sort_unstable();
    assert!(all.into_iter().eq(0..7500));
    ran(FILE, expected.len(), 500);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MbppIds {
    train: Vec<i64>,
    validation: Vec<i64>,
}

#[test]
fn the_rows_of_mbpp_come_in_the_references_order() {
    const FILE: &str = "environments/splits/mbpp_task_ids.json";
    let file: MbppIds = json(FILE);
    let ids = |split| -> Vec<i64> {
        let environment = Mbpp::embedded(split, Arc::new(NoEvaluator)).unwrap();
        environment.rows().map(|row| row.task_id).collect()
    };
    assert_eq!(ids(Split::Train), file.train);
    assert_eq!(ids(Split::Val), file.validation);
    ran(FILE, file.train.len() + file.validation.len(), 964);
    let error = Mbpp::embedded(Split::Test, Arc::new(NoEvaluator)).unwrap_err();
    assert!(matches!(error, DatasetError::NoSuchSplit { .. }), "{error}");
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TestCases {
    payload: TestFields,
    test_cases: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TestFields {
    #[serde(default)]
    test_list: Vec<String>,
    #[serde(default)]
    test_setup_code: String,
    #[serde(default)]
    test_imports: Vec<String>,
    #[serde(default)]
    test: String,
    #[serde(default)]
    entry_point: String,
}

#[test]
fn tests_are_put_together_as_by_the_reference() {
    const FILE: &str = "environments/programs/prepare_test_cases.json";
    let cases: Vec<TestCases> = json(FILE);
    for TestCases { payload, test_cases } in &cases {
        let of_mbpp = mbpp::test_cases(&payload.test_list, &payload.test_setup_code, &payload.test_imports);
        let of_humaneval = humaneval::test_cases(&payload.test, &payload.entry_point);
        assert_eq!([of_mbpp, of_humaneval].concat(), *test_cases);
    }
    ran(FILE, cases.len(), 9);
}

mod properties {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    static ALL: LazyLock<Vec<Arc<dyn Environment>>> =
        LazyLock::new(|| SPLITS.into_iter().map(|(_, id, split)| environment(id, split)).collect());

    proptest! {
        #[test]
        fn every_seed_has_a_task(seed in any::<u64>()) {
            for environment in ALL.iter() {
                let task = environment.task(EnvironmentSeed(seed)).unwrap();
                let count = environment.task_count();
                let expected = match environment.id() {
                    EnvironmentId::Mbpp | EnvironmentId::HumanEval => (seed % count as u64) as f64,
                    // The reference computes with doubles; both of its steps are exact.
                    _ => ((seed % (1 << 32)) as f64 / 4_294_967_296.0 * count as f64).trunc(),
                };
                prop_assert!(task.row < count);
                prop_assert_eq!(task.row as f64, expected);
                prop_assert_eq!(environment.task_by_id(Some(&task.id)).unwrap(), task);
            }
        }

        #[test]
        fn any_text_id_has_a_task(id in "[-+_0-9a ٣]{0,50}|.{0,20}") {
            for environment in ALL.iter() {
                prop_assert!(environment.task_by_id(Some(&id)).unwrap().row < environment.task_count());
            }
        }
    }
}
