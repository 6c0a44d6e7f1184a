//! Prints how many cases of each golden-vector file the last test run asserted, and refuses files that no test has read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Text for people; it holds no cases.
const NOT_VECTORS: &[&str] = &["README.md"];

fn main() -> ExitCode {
    let Some(folder) = std::env::var_os(grail_golden::REPORT_DIR_VARIABLE).map(PathBuf::from) else {
        eprintln!("vector-report: error: {} is not set; run `make test`", grail_golden::REPORT_DIR_VARIABLE);
        return ExitCode::from(2);
    };
    let ran = match read_records(&folder) {
        Ok(ran) => ran,
        Err(error) => {
            eprintln!("vector-report: error: read {}: {error}; run `make test`", folder.display());
            return ExitCode::from(66);
        }
    };
    let mut files = Vec::new();
    if let Err(error) = list(&grail_golden::root(), &grail_golden::root(), &mut files) {
        eprintln!("vector-report: error: list the golden vectors: {error}");
        return ExitCode::from(66);
    }
    files.sort();

    let mut total = 0;
    let mut by_folder: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    let mut unread = Vec::new();
    for file in &files {
        match ran.get(file) {
            Some(cases) => {
                total += cases;
                // Ninety-odd window files with one case each are one line.
                if let Some((folder, _)) = file.rsplit_once('/').filter(|_| *cases == 1) {
                    let entry = by_folder.entry(folder).or_default();
                    *entry = (entry.0 + 1, entry.1 + cases);
                } else {
                    println!("{cases:>6}  {file}");
                }
            }
            None => unread.push(file),
        }
    }
    for (folder, (files, cases)) in by_folder {
        println!("{cases:>6}  {folder}/ ({files} files of one case)");
    }
    println!("{total:>6}  vector cases in {} files", files.len() - unread.len());
    if unread.is_empty() {
        return ExitCode::SUCCESS;
    }
    for file in &unread {
        eprintln!("vector-report: error: no test has read tests/vectors/{file}");
    }
    ExitCode::FAILURE
}

/// Most cases that one test ran, by file: several tests may read the same file.
fn read_records(folder: &Path) -> std::io::Result<BTreeMap<String, usize>> {
    let mut ran = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let text = std::fs::read_to_string(entry?.path())?;
        if let Some((file, cases)) = text.trim_end().split_once('\t') {
            let cases = cases.parse().unwrap_or(0);
            ran.entry(file.to_owned()).and_modify(|most: &mut usize| *most = cases.max(*most)).or_insert(cases);
        }
    }
    Ok(ran)
}

fn list(root: &Path, folder: &Path, files: &mut Vec<String>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            list(root, &path, files)?;
        } else if let Some(relative) = path.strip_prefix(root).ok().and_then(Path::to_str)
            && !NOT_VECTORS.contains(&relative)
        {
            files.push(relative.to_owned());
        }
    }
    Ok(())
}
