//! The cache of the hub's Python tools: snapshots of links into a heap of blobs.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use grail_environments::datasets::{DatasetError, SourceSettings};
use grail_environments::{EnvironmentId, Split};
use parquet::basic::Compression;
use sha2::{Digest, Sha256};

use crate::files::{self, Form, Rows, write_parquet};
use crate::{COMMIT, assert_opens, datasets, settings, with_source};

/// One repository in the cache.
struct Repository {
    folder: PathBuf,
    form: Form,
    compression: Compression,
}

impl Repository {
    fn new(home: &Path, name: &str, form: Form, compression: Compression) -> Self {
        let folder = home.join("hub").join(format!("datasets--{}", name.replace('/', "--")));
        for part in ["blobs", "refs"] {
            std::fs::create_dir_all(folder.join(part)).expect("the folder can be made");
        }
        let repository = Self { folder, form, compression };
        repository.refer("main", COMMIT);
        repository
    }

    fn refer(&self, name: &str, commit: &str) {
        std::fs::write(self.folder.join("refs").join(name), commit).expect("the reference can be written");
    }

    /// Adds a file to the snapshot `commit`: a blob and a link to it.
    fn add(&self, commit: &str, name: &str, make: impl FnOnce(&Path)) {
        let fresh = self.folder.join("blobs/incomplete");
        make(&fresh);
        let content = std::fs::read(&fresh).expect("the blob is readable");
        let blob = hex::encode(Sha256::digest(&content));
        std::fs::rename(&fresh, self.folder.join("blobs").join(&blob)).expect("the blob can be renamed");
        let link = self.folder.join("snapshots").join(commit).join(name);
        std::fs::create_dir_all(link.parent().expect("it lies in a folder")).expect("the folder can be made");
        let up = "../".repeat(name.split('/').count() + 1);
        symlink(format!("{up}blobs/{blob}"), &link).expect("the link can be made");
    }

    fn add_rows(&self, name: &str, rows: &Rows) {
        self.add(COMMIT, name, |path| write_parquet(path, rows, self.form, self.compression));
    }

    /// Adds `rows` in two shards.
    fn add_shards(&self, stem: &str, rows: &Rows) {
        let (first, second) = rows.split_at(rows.len() / 3);
        self.add_rows(&format!("{stem}-00000-of-00002.parquet"), &first.to_vec());
        self.add_rows(&format!("{stem}-00001-of-00002.parquet"), &second.to_vec());
    }
}

fn zstd() -> Compression {
    Compression::ZSTD(parquet::basic::ZstdLevel::default())
}

#[tokio::test]
async fn rows_of_every_form_are_read() {
    let compressions = [Compression::SNAPPY, zstd(), Compression::UNCOMPRESSED];
    for (form, compression) in Form::ALL.into_iter().zip(compressions) {
        let home = tempfile::tempdir().unwrap();
        let gsm8k = Repository::new(home.path(), "openai/gsm8k", form, compression);
        gsm8k.add_rows("main/train-00000-of-00001.parquet", &files::gsm8k_train());
        gsm8k.add_shards("main/test", &files::gsm8k_test());
        gsm8k.add_rows("socratic/train-00000-of-00001.parquet", &files::gsm8k_test());
        let mbpp = Repository::new(home.path(), "google-research-datasets/mbpp", form, compression);
        for (split, numbers) in
            [("train", 601..=974), ("validation", 511..=600), ("test", 11..=510), ("prompt", 1..=10)]
        {
            mbpp.add_rows(&format!("full/{split}-00000-of-00001.parquet"), &files::mbpp(numbers));
        }
        let humaneval = Repository::new(home.path(), "openai/openai_humaneval", form, compression);
        humaneval.add_shards("openai_humaneval/test", &files::humaneval());
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
async fn the_subsets_of_math_are_read_in_order() {
    let home = tempfile::tempdir().unwrap();
    let math = Repository::new(home.path(), "EleutherAI/hendrycks_math", Form::Plain, Compression::SNAPPY);
    for (split, name) in [(Split::Train, "train"), (Split::Test, "test")] {
        for (subset, rows) in grail_environments::math::SUBSETS.iter().zip(files::math(split)) {
            math.add_rows(&format!("{}/{name}-00000-of-00001.parquet", subset.name), &rows);
        }
    }
    for split in [Split::Train, Split::Val, Split::Test] {
        assert_opens(settings(home.path()), EnvironmentId::Math, split).await;
    }
}

#[tokio::test]
async fn rows_of_math_without_their_columns_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let math = Repository::new(home.path(), "EleutherAI/hendrycks_math", Form::Plain, Compression::SNAPPY);
    for (subset, mut rows) in grail_environments::math::SUBSETS.iter().zip(files::math(Split::Test)) {
        for row in rows.iter_mut().filter(|_| subset.name == "geometry") {
            let problem = row.remove("problem").unwrap();
            row.insert("question".to_owned(), problem);
        }
        math.add_rows(&format!("{}/test-00000-of-00001.parquet", subset.name), &rows);
    }
    let error = datasets(settings(home.path())).open(EnvironmentId::Math, Split::Test).await.unwrap_err();
    assert!(matches!(&error, DatasetError::NoQuestions { part, .. } if part == "geometry/test"), "{error}");
}

#[tokio::test]
async fn older_names_and_layouts_are_read() {
    let home = tempfile::tempdir().unwrap();
    let humaneval = Repository::new(home.path(), "openai_humaneval", Form::Plain, Compression::SNAPPY);
    humaneval.add_rows("data/test-00000-of-00001-abcdef.parquet", &files::humaneval());
    let readme = "---\nconfigs:\n- config_name: openai_humaneval\n  data_files:\n  - split: test\n    path: data/test-*\n\
         ---\n";
    humaneval.add(COMMIT, "README.md", |path| std::fs::write(path, readme).unwrap());
    assert_opens(settings(home.path()), EnvironmentId::HumanEval, Split::Test).await;
}

#[tokio::test]
async fn a_pinned_revision_is_the_one_that_is_read() {
    const OTHER: &str = "89abcdef0123456789abcdef0123456789abcdef";
    let home = tempfile::tempdir().unwrap();
    let humaneval = Repository::new(home.path(), "openai/openai_humaneval", Form::Plain, Compression::SNAPPY);
    let name = "openai_humaneval/test-00000-of-00001.parquet";
    humaneval.add_rows(name, &files::humaneval());
    let mut changed = files::humaneval();
    changed[7]["prompt"] = "def other():\n".into();
    humaneval.add(OTHER, name, |path| write_parquet(path, &changed, Form::Plain, Compression::SNAPPY));
    humaneval.refer("v2", OTHER);
    let pinned = |revision: &str| {
        let source = SourceSettings { revision: Some(revision.to_owned()), ..SourceSettings::default() };
        with_source(settings(home.path()), EnvironmentId::HumanEval, source)
    };
    assert_opens(pinned(COMMIT), EnvironmentId::HumanEval, Split::Test).await;
    for revision in ["v2", OTHER] {
        let error = datasets(pinned(revision)).open(EnvironmentId::HumanEval, Split::Test).await.unwrap_err();
        let DatasetError::Fingerprint { place, actual, rows: 164, .. } = &error else { panic!("{error}") };
        assert!(place.contains(OTHER), "{place}");
        // The message says how to name these rows; with that, they are taken.
        let overrides = format!("test=164:{actual}");
        assert!(error.to_string().contains(&format!("GRAIL_DATASET_OVERRIDE_HUMANEVAL={overrides}")), "{error}");
        let mut named = pinned(revision);
        named.sources.get_mut(&EnvironmentId::HumanEval).unwrap().overrides = overrides.parse().unwrap();
        let opened = datasets(named).open(EnvironmentId::HumanEval, Split::Test).await.unwrap();
        assert_eq!(opened.task_by_id(Some("x_7")).unwrap().question, "def other():\n");
    }
    let error = datasets(pinned("v3")).open(EnvironmentId::HumanEval, Split::Test).await.unwrap_err();
    assert!(error.to_string().contains("refs/v3"), "{error}");
}

#[tokio::test]
async fn incomplete_snapshots_are_passed_over() {
    let home = tempfile::tempdir().unwrap();
    let mbpp = Repository::new(home.path(), "google-research-datasets/mbpp", Form::Plain, Compression::SNAPPY);
    mbpp.add_rows("full/train-00000-of-00001.parquet", &files::mbpp(601..=974));
    mbpp.add_shards("full/test", &files::mbpp(11..=510));
    let snapshot = mbpp.folder.join("snapshots").join(COMMIT);
    let shard = snapshot.join("full/test-00001-of-00002.parquet");
    // A blob that was cleaned away: its link leads nowhere.
    std::fs::remove_file(std::fs::canonicalize(&shard).unwrap()).unwrap();
    let error = datasets(settings(home.path())).open(EnvironmentId::Mbpp, Split::Train).await.unwrap_err();
    let DatasetError::NotFound { looked, .. } = &error else { panic!("{error}") };
    assert!(looked.iter().any(|place| place.reason.contains("of the 2 shards")), "{error}");
}
