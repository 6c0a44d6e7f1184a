//! Data sets in every layout, against the copies that are shipped.

mod download;
mod files;
mod hub_cache;
mod library_cache;
mod local;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use grail_environments::datasets::{DatasetError, DatasetSettings, Datasets, HubSettings, SourceSettings, embedded};
use grail_environments::gsm8k::Gsm8k;
use grail_environments::{Environment, EnvironmentId, NoEvaluator, Split};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Every split that can be mined.
const SPLITS: [(EnvironmentId, Split); 9] = [
    (EnvironmentId::Gsm8k, Split::Train),
    (EnvironmentId::Gsm8k, Split::Val),
    (EnvironmentId::Gsm8k, Split::Test),
    (EnvironmentId::Math, Split::Train),
    (EnvironmentId::Math, Split::Val),
    (EnvironmentId::Math, Split::Test),
    (EnvironmentId::Mbpp, Split::Train),
    (EnvironmentId::Mbpp, Split::Val),
    (EnvironmentId::HumanEval, Split::Test),
];

/// Settings with both caches in `home`, and nothing to download from.
fn settings(home: &Path) -> DatasetSettings {
    let hub = HubSettings {
        cache: Some(home.join("hub")),
        library_cache: Some(home.join("datasets")),
        endpoint: "http://127.0.0.1:9".to_owned(),
        is_offline: true,
    };
    DatasetSettings { hub, sources: BTreeMap::new() }
}

fn with_source(mut settings: DatasetSettings, environment: EnvironmentId, source: SourceSettings) -> DatasetSettings {
    settings.sources.insert(environment, source);
    settings
}

fn datasets(settings: DatasetSettings) -> Datasets {
    Datasets::new(settings, Arc::new(NoEvaluator))
}

/// The environment over the copies.
fn expected(environment: EnvironmentId, split: Split) -> Arc<dyn Environment> {
    if (environment, split) == (EnvironmentId::Gsm8k, Split::Test) {
        let path = grail_golden::path("environments/data/gsm_test.jsonl.gz");
        return Arc::new(Gsm8k::from_file(&path, split).expect("the copy is the published file"));
    }
    embedded(environment, split, Arc::new(NoEvaluator)).expect("the copy is the published file")
}

/// Asserts that both have the same tasks.
fn assert_same(found: &dyn Environment, expected: &dyn Environment) {
    let facts = |environment: &dyn Environment| (environment.id(), environment.split(), environment.task_count());
    assert_eq!(facts(found), facts(expected));
    for place in 0..expected.task_count() {
        let id = format!("x_{place}");
        assert_eq!(found.task_by_id(Some(&id)).ok(), expected.task_by_id(Some(&id)).ok());
    }
}

async fn assert_opens(settings: DatasetSettings, environment: EnvironmentId, split: Split) {
    let found = datasets(settings).open(environment, split).await;
    let found = found.unwrap_or_else(|error| panic!("{environment} {split}: {error}"));
    assert_same(found.as_ref(), expected(environment, split).as_ref());
}

#[tokio::test]
async fn a_split_is_read_once() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("test.jsonl");
    files::write_lines(&path, &files::gsm8k_test());
    let source = SourceSettings { path: Some(path.clone()), ..SourceSettings::default() };
    let datasets = datasets(with_source(settings(home.path()), EnvironmentId::Gsm8k, source));
    let first = datasets.open(EnvironmentId::Gsm8k, Split::Test).await.unwrap();
    std::fs::remove_file(&path).unwrap();
    let second = datasets.open(EnvironmentId::Gsm8k, Split::Test).await.unwrap();
    assert!(Arc::ptr_eq(&first, &second));
    let error = datasets.open(EnvironmentId::Gsm8k, Split::Train).await.unwrap_err();
    assert!(matches!(&error, DatasetError::NoPath { .. }), "{error}");
    assert!(error.to_string().contains("GRAIL_DATASET_PATH_GSM8K"), "{error}");
}

#[tokio::test]
async fn splits_that_do_not_exist_are_refused() {
    let home = tempfile::tempdir().unwrap();
    for (environment, split) in [
        (EnvironmentId::Mbpp, Split::Test),
        (EnvironmentId::HumanEval, Split::Train),
        (EnvironmentId::HumanEval, Split::Val),
    ] {
        for result in [
            datasets(settings(home.path())).open(environment, split).await,
            embedded(environment, split, Arc::new(NoEvaluator)),
        ] {
            assert!(matches!(result, Err(DatasetError::NoSuchSplit { .. })), "{environment} {split}");
        }
    }
    let error = embedded(EnvironmentId::Gsm8k, Split::Test, Arc::new(NoEvaluator)).unwrap_err();
    assert!(matches!(error, DatasetError::NotEmbedded { .. }), "{error}");
}

#[tokio::test]
async fn every_place_is_named_where_nothing_is_found() {
    let home = tempfile::tempdir().unwrap();
    let empty = home.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    for (environment, split) in SPLITS {
        let source = SourceSettings { path: Some(empty.clone()), ..SourceSettings::default() };
        for configured in [settings(home.path()), with_source(settings(home.path()), environment, source)] {
            let error = datasets(configured).open(environment, split).await.unwrap_err();
            let DatasetError::NotFound { looked, .. } = &error else { panic!("{error}") };
            assert!(looked.len() >= 4, "{looked:?}");
            let text = error.to_string();
            let variable = format!("GRAIL_DATASET_PATH_{}", environment.as_str().to_uppercase());
            for part in ["hub cache", "HF_HUB_OFFLINE", "library datasets", "00000-of-00001.parquet", &variable] {
                assert!(text.contains(part), "{part} in {text}");
            }
        }
    }
    let mut homeless = settings(home.path());
    (homeless.hub.cache, homeless.hub.library_cache, homeless.hub.is_offline) = (None, None, false);
    let error = datasets(homeless).open(EnvironmentId::Mbpp, Split::Train).await.unwrap_err().to_string();
    assert_eq!(error.matches("neither HF_HOME nor HOME is set").count(), 3, "{error}");
    assert!(error.contains("mbpp.jsonl"), "{error}");
}

/// Needs the network: the hub's own files against the copies.
#[tokio::test]
#[ignore = "downloads the four data sets from the hub"]
async fn the_hub_has_what_is_shipped() {
    let home = tempfile::tempdir().unwrap();
    let variables = grail_environments::datasets::HubSettings::from_variables(|name| std::env::var_os(name));
    let mut settings = settings(home.path());
    (settings.hub.endpoint, settings.hub.is_offline) = (variables.endpoint, false);
    let datasets = datasets(settings);
    for (environment, split) in SPLITS {
        let found = datasets.open(environment, split).await.unwrap();
        let expected = expected(environment, split);
        if environment == EnvironmentId::Math {
            // There is no copy of its rows; their number is checked when they are opened.
            assert_eq!(found.task_count(), expected.task_count());
        } else {
            assert_same(found.as_ref(), expected.as_ref());
        }
    }
}
