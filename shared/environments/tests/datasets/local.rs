//! A configured file or folder.

use std::path::{Path, PathBuf};

use grail_environments::datasets::{DatasetError, FileError, Fingerprint, Overrides, SourceSettings};
use grail_environments::gsm8k::{self, Gsm8k};
use grail_environments::math::SUBSETS;
use grail_environments::{EnvironmentId, Split, humaneval, mbpp};
use parquet::basic::Compression;

use crate::files::{self, Form, write_lines, write_parquet};
use crate::{assert_opens, datasets, expected, settings, with_source};

const TEST_FILE: &str = "environments/data/gsm_test.jsonl.gz";

async fn assert_opens_at(path: &Path, environment: EnvironmentId, split: Split) {
    let source = SourceSettings { path: Some(path.to_owned()), ..SourceSettings::default() };
    assert_opens(with_source(settings(Path::new("/nowhere")), environment, source), environment, split).await;
}

#[tokio::test]
async fn the_authors_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("mbpp.jsonl.gz"), mbpp::EMBEDDED).unwrap();
    std::fs::write(path("HumanEval.jsonl.gz"), humaneval::EMBEDDED).unwrap();
    for place in [folder.path().to_owned(), path("mbpp.jsonl.gz")] {
        assert_opens_at(&place, EnvironmentId::Mbpp, Split::Train).await;
        assert_opens_at(&place, EnvironmentId::Mbpp, Split::Val).await;
    }
    for place in [folder.path().to_owned(), path("HumanEval.jsonl.gz")] {
        assert_opens_at(&place, EnvironmentId::HumanEval, Split::Test).await;
    }
    assert_opens_at(&grail_golden::path(TEST_FILE), EnvironmentId::Gsm8k, Split::Test).await;
}

#[tokio::test]
async fn one_file_per_split_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    write_parquet(&path("gsm8k/train.parquet"), &files::gsm8k_train(), Form::Plain, Compression::SNAPPY);
    write_lines(&path("gsm8k/test.jsonl"), &files::gsm8k_test());
    for split in [Split::Train, Split::Val, Split::Test] {
        assert_opens_at(&path("gsm8k"), EnvironmentId::Gsm8k, split).await;
    }
    for (split, numbers) in [("train", 601..=974), ("validation", 511..=600), ("test", 11..=510)] {
        write_lines(&path(&format!("mbpp/{split}.jsonl")), &files::mbpp(numbers));
    }
    for split in [Split::Train, Split::Val] {
        assert_opens_at(&path("mbpp"), EnvironmentId::Mbpp, split).await;
    }
    let subsets = files::math(Split::Train);
    for (subset, rows) in SUBSETS.iter().zip(&subsets) {
        write_lines(&path(&format!("math/{}/train.jsonl", subset.name)), rows);
    }
    write_lines(&path("math.jsonl"), &subsets.concat());
    for place in ["math", "math.jsonl"] {
        assert_opens_at(&path(place), EnvironmentId::Math, Split::Train).await;
        assert_opens_at(&path(place), EnvironmentId::Math, Split::Val).await;
    }
}

#[tokio::test]
async fn a_folder_like_a_snapshot_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let rows = files::humaneval();
    write_parquet(&path("openai_humaneval/test-00000-of-00001.parquet"), &rows, Form::Large, Compression::SNAPPY);
    assert_opens_at(folder.path(), EnvironmentId::HumanEval, Split::Test).await;
}

/// A folder with one file `name` of the given content.
fn file(name: &str, content: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let path = folder.path().join(name);
    std::fs::write(&path, content).expect("the file can be written");
    (folder, path)
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
    let error = Gsm8k::from_file(&grail_golden::path(TEST_FILE), Split::Train).unwrap_err();
    assert!(matches!(error, DatasetError::RowCount { rows: 1319, expected: 7473, .. }), "{error}");

    let questions = files::gsm8k_test().into_iter().take(300).map(|row| row["question"].as_str().unwrap().to_owned());
    let fingerprint = Fingerprint::of(questions);
    let named = |text: String| -> Overrides { text.parse().unwrap() };
    let right = named(format!("train=300:{fingerprint}"));
    assert_eq!(Gsm8k::from_file_with(&short, Split::Train, &right).unwrap().file_rows().len(), 50);
    let other_split = Gsm8k::from_file_with(&short, Split::Test, &right);
    assert!(matches!(other_split, Err(DatasetError::RowCount { .. })), "an override is of its split only");
    let wrong = named(format!("train=300:{}", Fingerprint::of(["q"])));
    let error = Gsm8k::from_file_with(&short, Split::Val, &wrong).unwrap_err();
    assert!(matches!(error, DatasetError::Fingerprint { .. }), "{error}");
    let wrong = named(format!("train=301:{fingerprint}"));
    let error = Gsm8k::from_file_with(&short, Split::Val, &wrong).unwrap_err();
    assert!(matches!(error, DatasetError::RowCount { rows: 300, expected: 301, .. }), "{error}");
}

#[test]
fn broken_files_name_the_line() {
    let open = |path: &Path| Gsm8k::from_file(path, Split::Test).unwrap_err();
    let (_a, missing) = file("x", b"");
    std::fs::remove_file(&missing).unwrap();
    assert!(matches!(open(&missing), DatasetError::File(FileError::Read { .. })));
    let (_b, cut) = file("cut.jsonl.gz", &std::fs::read(grail_golden::path(TEST_FILE)).unwrap()[..1000]);
    assert!(matches!(open(&cut), DatasetError::File(FileError::Read { .. })));
    let lines = b"{\"question\": \"q\", \"extra\": 1, \"answer\": null}\n\n{\"question\": 7}\n";
    let (_c, typed) = file("typed.jsonl", lines);
    let error = open(&typed);
    assert!(matches!(error, DatasetError::File(FileError::Row { row: 2, .. })), "{error}");
    assert!(error.to_string().contains("`question`"), "{error}");
    let (_d, broken) = file("broken.jsonl", b"{}\n\n[]\n");
    assert!(matches!(open(&broken), DatasetError::File(FileError::Line { line: 3, .. })));
    let (_e, parquet) = file("cut.parquet", b"PAR1 and nothing more");
    assert!(matches!(open(&parquet), DatasetError::File(FileError::Parquet { .. })));
    let (_f, arrow) = file("cut.arrow", &[0xff; 40]);
    assert!(matches!(open(&arrow), DatasetError::File(FileError::Arrow { .. })));
    let (_g, few) = file("few.jsonl", b"{}\n");
    let named: Overrides = format!("train=1:{}", Fingerprint::of([""])).parse().unwrap();
    let error = Gsm8k::from_file_with(&few, Split::Train, &named).unwrap_err();
    assert!(matches!(error, DatasetError::TooFewRows { rows: 1, .. }), "{error}");
    assert_eq!(gsm8k::split_rows(10, Split::Val).len(), 10);
}

#[test]
fn columns_of_the_wrong_type_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut rows = files::gsm8k_test();
    for (number, row) in rows.iter_mut().enumerate() {
        row.insert("answer".to_owned(), number.into());
    }
    let path = folder.path().join("test.parquet");
    write_parquet(&path, &rows, Form::Plain, Compression::SNAPPY);
    let error = Gsm8k::from_file(&path, Split::Test).unwrap_err();
    assert!(matches!(error, DatasetError::File(FileError::Row { row: 1, .. })), "{error}");
    assert!(error.to_string().contains("`answer` holds values of type Int32"), "{error}");
}

#[test]
fn what_is_missing_or_null_is_empty() {
    let folder = tempfile::tempdir().unwrap();
    let mut rows = files::mbpp(601..=605);
    rows[1].insert("text".to_owned(), serde_json::Value::Null);
    rows[2].insert("test_setup_code".to_owned(), serde_json::Value::Null);
    let (lines, parquet) = (folder.path().join("rows.jsonl"), folder.path().join("rows.parquet"));
    write_lines(&lines, &rows);
    write_parquet(&parquet, &rows, Form::Plain, Compression::SNAPPY);
    let read = |path: &Path| grail_environments::datasets::read_rows::<mbpp::MbppRow>(path).unwrap();
    assert_eq!(read(&lines), read(&parquet));
    let found = read(&parquet);
    assert_eq!((&*found[1].text, &*found[2].test_setup_code), ("", ""));
    assert!(found.iter().all(|row| row.test_imports.is_empty() && !row.test_list.is_empty()));
}

#[tokio::test]
async fn a_configured_folder_without_the_split_is_passed_over() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("own");
    write_lines(&folder.join("test.jsonl"), &files::gsm8k_test());
    let source = SourceSettings { path: Some(folder), ..SourceSettings::default() };
    let datasets = datasets(with_source(settings(home.path()), EnvironmentId::Gsm8k, source));
    let found = datasets.open(EnvironmentId::Gsm8k, Split::Test).await.unwrap();
    assert_eq!(found.task_count(), expected(EnvironmentId::Gsm8k, Split::Test).task_count());
    let error = datasets.open(EnvironmentId::Gsm8k, Split::Train).await.unwrap_err();
    assert!(matches!(error, DatasetError::NotFound { .. }), "{error}");
}
