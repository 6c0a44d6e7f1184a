//! The setup script on hosts that are made up: what it needs is there, broken or not there. Nothing is downloaded.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use grail_environments::sandbox::setup::{Installation, SetupError};
use tempfile::TempDir;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/setup-evaluator.sh");
/// What the script itself uses, none of which is an interpreter.
const TOOLS: [&str; 12] =
    ["bash", "cat", "chmod", "dirname", "env", "find", "flock", "mkdir", "mktemp", "mv", "rm", "sort"];

fn installed() -> PathBuf {
    let installation = Installation::of_this_user(|name| std::env::var_os(name)).expect("a home");
    installation.folder().to_owned()
}

/// A user whose programs are [`TOOLS`] and `others`, which are texts of scripts.
struct Host {
    home: TempDir,
}

impl Host {
    fn new(others: &[(&str, &str)]) -> Self {
        let home = tempfile::tempdir().expect("a folder");
        let bin = home.path().join("bin");
        fs::create_dir(&bin).expect("a folder");
        for tool in TOOLS {
            let found =
                ["/usr/bin", "/bin"].map(|folder| Path::new(folder).join(tool)).into_iter().find(|path| path.exists());
            symlink(found.unwrap_or_else(|| panic!("{tool} is everywhere")), bin.join(tool)).expect("a link");
        }
        let host = Self { home };
        for (name, text) in others {
            host.add_program(&format!("bin/{name}"), text);
        }
        host
    }

    fn add_program(&self, name: &str, text: &str) -> PathBuf {
        let path = self.home.path().join(name);
        fs::write(&path, format!("#!/bin/bash\n{text}\n")).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("rights");
        path
    }

    fn root(&self) -> PathBuf {
        self.home.path().join("evaluator")
    }

    /// An installation whose interpreter is `python`, with the packages of the real one.
    fn install(&self, python: &Path) {
        fs::create_dir(self.root()).expect("a folder");
        symlink(installed().join("site"), self.root().join("site")).expect("a link");
        fs::write(self.root().join("python"), format!("{}\n", python.display())).expect("a file");
    }

    /// Runs the script as the program does: its text comes from stdin.
    fn set_up(&self) -> Output {
        let mut child = Command::new("bash")
            .args(["-s", "--"])
            .arg(self.root())
            .env_clear()
            .env("PATH", self.home.path().join("bin"))
            .env("HOME", self.home.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("bash is everywhere");
        let script = fs::read(SCRIPT).expect("the script");
        // A bash that has ended takes no more of it.
        child.stdin.take().expect("a pipe").write_all(&script).unwrap_or_default();
        child.wait_with_output().expect("an end")
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn assert_says_how_to_get_python(output: &Output) {
    let said = said(output);
    assert!(!output.status.success(), "{said}");
    for words in [
        "no CPython 3.12 that runs was found",
        "apt install python3.12",
        "pyenv install 3.12",
        "uv python install 3.12",
    ] {
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn without_an_interpreter_it_says_how_to_get_one() {
    let host = Host::new(&[]);
    assert_says_how_to_get_python(&host.set_up());
    assert!(!host.root().exists());
}

#[test]
fn interpreters_that_do_not_run_or_are_others_are_none() {
    let host = Host::new(&[("python3.12", "echo 'python3.12: command not found' >&2; exit 127")]);
    let other = host.add_program("3.12", "exit 1");
    let versions = host.home.path().join(".pyenv/versions/3.12.9/bin");
    fs::create_dir_all(&versions).expect("a folder");
    fs::rename(other, versions.join("python3.12")).expect("a move");
    assert_says_how_to_get_python(&host.set_up());
}

#[test]
fn packages_that_lost_their_content_are_not_reused() {
    let python = fs::read_to_string(installed().join("python")).expect("an installation");
    let host = Host::new(&[]);
    host.install(Path::new(python.trim()));
    assert!(said(&host.set_up()).contains("reused"));
    // As after a loss of power: the names are there.
    fs::remove_file(host.root().join("site")).expect("a link");
    fs::create_dir_all(host.root().join("site/sympy")).expect("a folder");
    fs::write(host.root().join("site/sympy/__init__.py"), "").expect("a file");
    assert_says_how_to_get_python(&host.set_up());
}

#[tokio::test]
async fn an_interpreter_that_has_gone_is_looked_for_again() {
    let host = Host::new(&[]);
    host.install(Path::new("/nonexistent/python3.12"));
    let installation = Installation::in_folder(host.root());
    let error = installation.open().await.unwrap_err();
    assert!(matches!(error, SetupError::Interpreter(_)), "{error}");
    assert_says_how_to_get_python(&host.set_up());
    assert!(host.root().join("site/sympy").is_dir(), "what was there stays until something better is");
}

#[test]
fn what_it_starts_cannot_read_the_scripts_own_text() {
    let host = Host::new(&[]);
    // Asked whether it is the right one, it reads all that there is to read.
    let greedy = host.add_program("greedy", "cat >/dev/null; exit 1");
    host.install(&greedy);
    assert_says_how_to_get_python(&host.set_up());
}

#[tokio::test]
async fn a_second_run_changes_nothing() {
    let host = Host::new(&[]);
    let python = fs::read_to_string(installed().join("python")).expect("`make evaluator` was run");
    host.install(Path::new(python.trim()));
    let look = || {
        let found = fs::metadata(host.root()).expect("a folder");
        (found.ino(), found.mtime(), found.mtime_nsec(), fs::read_dir(host.home.path()).expect("a folder").count())
    };
    let before = look();
    for _ in 0..2 {
        let output = host.set_up();
        assert!(output.status.success() && said(&output).contains("reused"), "{}", said(&output));
        assert_eq!(look(), before);
    }
    let installation = Installation::in_folder(host.root());
    installation.set_up().await.expect("nothing to do");
    let interpreter = installation.open().await.expect("an interpreter");
    assert_eq!((interpreter.sympy_version.as_str(), look()), ("1.14.0", before));
}
