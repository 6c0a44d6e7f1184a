//! Golden vectors: where they lie, how a test reads them, and the record of what was run.
//!
//! A table-driven test reads its file through [`json`], [`json_lines`] or [`bytes`] and ends with [`ran`]. That call prints
//! the count and leaves a record in the report folder, from which `vector-report` (run by `make test` after the tests)
//! makes the table of cases by file and refuses files that no test has read.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Variable that names the folder for the records; unset means that no record is kept.
pub const REPORT_DIR_VARIABLE: &str = "GRAIL_VECTOR_REPORT_DIR";

/// Variable that names the vectors' folder for tests that run on another machine than they were built on.
pub const FOLDER_VARIABLE: &str = "GRAIL_GOLDEN_DIR";

/// The folder `tests/vectors`.
#[must_use]
pub fn root() -> PathBuf {
    let given = std::env::var_os(FOLDER_VARIABLE).filter(|folder| !folder.is_empty());
    given.map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../vectors"), PathBuf::from)
}

/// Path of one vector file or folder, relative to `tests/vectors`.
///
/// # Panics
/// If it does not exist: a test that reads nothing must not pass.
#[must_use]
pub fn path(relative: &str) -> PathBuf {
    let path = root().join(relative);
    assert!(path.exists(), "golden vector {} is missing", path.display());
    path
}

/// Content of one vector file, gunzipped if its name ends in `.gz`.
///
/// # Panics
/// If the file cannot be read.
#[must_use]
pub fn bytes(relative: &str) -> Vec<u8> {
    let raw = std::fs::read(path(relative)).expect("golden vector is readable");
    if !relative.ends_with(".gz") {
        return raw;
    }
    let mut plain = Vec::new();
    flate2::read::MultiGzDecoder::new(raw.as_slice()).read_to_end(&mut plain).expect("golden vector is gzip");
    plain
}

/// One JSON document.
///
/// # Panics
/// If the file is missing or has another shape than `T`, for instance a field that the test does not know.
#[must_use]
pub fn json<T: DeserializeOwned>(relative: &str) -> T {
    serde_json::from_slice(&bytes(relative)).unwrap_or_else(|error| panic!("{relative}: {error}"))
}

/// One JSON document a line.
///
/// # Panics
/// As [`json`].
#[must_use]
pub fn json_lines<T: DeserializeOwned>(relative: &str) -> Vec<T> {
    bytes(relative)
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .enumerate()
        .map(|(number, line)| {
            serde_json::from_slice(line).unwrap_or_else(|error| panic!("{relative}:{}: {error}", number + 1))
        })
        .collect()
}

/// Says that `cases` cases of `relative` were asserted, of the `in_file` that the file holds for this test's subject.
///
/// # Panics
/// If the two differ: a test that skips cases silently is a defect.
pub fn ran(relative: &str, cases: usize, in_file: usize) {
    assert_eq!(cases, in_file, "{relative}: ran {cases} cases, the file holds {in_file}");
    assert!(cases > 0, "{relative}: no case ran");
    println!("vectors {relative}: {cases} cases");
    let Some(folder) = std::env::var_os(REPORT_DIR_VARIABLE) else { return };
    let folder = PathBuf::from(folder);
    std::fs::create_dir_all(&folder).expect("report folder can be made");
    let test = std::thread::current().name().unwrap_or("main").replace("::", ".");
    let record = folder.join(format!("{}@{test}.{}", relative.replace('/', "__"), std::process::id()));
    std::fs::write(record, format!("{relative}\t{cases}\n")).expect("record can be written");
}
