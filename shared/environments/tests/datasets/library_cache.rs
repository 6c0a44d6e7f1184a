//! The cache of the Python library `datasets`.

use std::fs::FileTimes;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use grail_environments::datasets::{DatasetError, SourceSettings};
use grail_environments::math::SUBSETS;
use grail_environments::{EnvironmentId, Split};

use crate::files::{self, Form, write_stream};
use crate::{COMMIT, assert_opens, datasets, settings, with_source};

/// Folder of a finished build, as old as `age`.
fn build(home: &Path, repository: &str, config: &str, hash: &str, age: Duration) -> PathBuf {
    let folder = home.join("datasets").join(repository.replace('/', "___")).join(config).join("0.0.0").join(hash);
    std::fs::create_dir_all(&folder).expect("the folder can be made");
    let info = std::fs::File::create(folder.join("dataset_info.json")).expect("the file can be made");
    let made = SystemTime::now() - age;
    info.set_times(FileTimes::new().set_modified(made)).expect("its time can be set");
    folder
}

#[tokio::test]
async fn streams_of_every_form_are_read() {
    for form in Form::ALL {
        let home = tempfile::tempdir().unwrap();
        let gsm8k = build(home.path(), "openai/gsm8k", "main", COMMIT, Duration::ZERO);
        write_stream(&gsm8k.join("gsm8k-train.arrow"), &files::gsm8k_train(), form);
        let test = files::gsm8k_test();
        write_stream(&gsm8k.join("gsm8k-test-00000-of-00002.arrow"), &test[..1000], form);
        write_stream(&gsm8k.join("gsm8k-test-00001-of-00002.arrow"), &test[1000..], form);
        let mbpp = build(home.path(), "google-research-datasets/mbpp", "full", COMMIT, Duration::ZERO);
        for (split, numbers) in [("train", 601..=974), ("validation", 511..=600), ("test", 11..=510)] {
            write_stream(&mbpp.join(format!("mbpp-{split}.arrow")), &files::mbpp(numbers), form);
        }
        // Older tools knew it without its owner.
        let humaneval = build(home.path(), "openai_humaneval", "openai_humaneval", COMMIT, Duration::ZERO);
        write_stream(&humaneval.join("openai_humaneval-test.arrow"), &files::humaneval(), form);
        for (environment, split) in [
            (EnvironmentId::Gsm8k, Split::Train),
            (EnvironmentId::Gsm8k, Split::Val),
            (EnvironmentId::Gsm8k, Split::Test),
            (EnvironmentId::Mbpp, Split::Train),
            (EnvironmentId::Mbpp, Split::Val),
            (EnvironmentId::HumanEval, Split::Test),
        ] {
            assert_opens(settings(home.path()), environment, split).await;
        }
    }
}

#[tokio::test]
async fn all_subsets_are_of_one_build() {
    let home = tempfile::tempdir().unwrap();
    let name = "EleutherAI/hendrycks_math";
    let hour = Duration::from_secs(3600);
    for (place, (subset, rows)) in SUBSETS.iter().zip(files::math(Split::Test)).enumerate() {
        let old = build(home.path(), name, subset.name, COMMIT, hour);
        write_stream(&old.join("hendrycks_math-test.arrow"), &rows, Form::Plain);
        // A newer build that was never finished for all subsets.
        if place < 3 {
            let new = build(home.path(), name, subset.name, "fedcba", Duration::ZERO);
            write_stream(&new.join("hendrycks_math-test.arrow"), &rows[1..], Form::Plain);
        }
    }
    assert_opens(settings(home.path()), EnvironmentId::Math, Split::Test).await;
}

#[tokio::test]
async fn the_pinned_build_or_the_newest_is_read() {
    let home = tempfile::tempdir().unwrap();
    let hour = Duration::from_secs(3600);
    let config = "openai_humaneval";
    let old = build(home.path(), "openai/openai_humaneval", config, COMMIT, hour);
    write_stream(&old.join("openai_humaneval-test.arrow"), &files::humaneval(), Form::Plain);
    let new = build(home.path(), "openai/openai_humaneval", config, "fedcba", Duration::ZERO);
    write_stream(&new.join("openai_humaneval-test.arrow"), &files::humaneval()[1..], Form::Plain);
    let pinned = |revision: Option<&str>| {
        let source = SourceSettings { revision: revision.map(str::to_owned), ..SourceSettings::default() };
        with_source(settings(home.path()), EnvironmentId::HumanEval, source)
    };
    assert_opens(pinned(Some(COMMIT)), EnvironmentId::HumanEval, Split::Test).await;
    let error = datasets(pinned(None)).open(EnvironmentId::HumanEval, Split::Test).await.unwrap_err();
    assert!(matches!(error, DatasetError::RowCount { rows: 163, expected: 164, .. }), "{error}");
    let error = datasets(pinned(Some("v9"))).open(EnvironmentId::HumanEval, Split::Test).await.unwrap_err();
    assert!(error.to_string().contains("nothing of revision v9"), "{error}");
}
