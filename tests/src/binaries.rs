//! The project's binaries, and runs of them that cannot hang a test.

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use grail_environments::sandbox::setup::Installation;

/// A run that takes longer than this has failed.
pub const LIMIT: Duration = Duration::from_secs(300);

/// Path of one of the project's binaries, built beside the tests.
///
/// # Panics
/// If it was not built: `make test` builds all binaries first.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let folder = test.ancestors().find(|folder| folder.join(name).is_file());
    let folder = folder.unwrap_or_else(|| panic!("{name} is not built; run `cargo build --workspace --bins` first"));
    folder.join(name)
}

/// What a finished run left.
#[derive(Debug)]
pub struct Finished {
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// A run under way; killed when it is dropped.
#[derive(Debug)]
pub struct Run {
    child: Child,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
}

impl Run {
    /// Starts `name` with `arguments` in `folder`, with a clean environment plus `variables`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start<A: AsRef<OsStr>>(name: &str, arguments: &[A], folder: &Path, variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(binary(name));
        command.args(arguments).current_dir(folder).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", folder);
        // The home of a test has no evaluator; the one of this user was set up before the tests.
        if let Ok(evaluator) = Installation::of_this_user(|name| std::env::var_os(name)) {
            command.env("GRAIL_EVALUATOR_DIR", evaluator.folder());
        }
        command.envs(variables.iter().copied());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("start {name}: {error}"));
        let (stdout, stderr) = (reader(child.stdout.take()), reader(child.stderr.take()));
        Self { child, stdout: Some(stdout), stderr: Some(stderr) }
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// If it takes longer than [`LIMIT`].
    #[must_use]
    pub fn wait(mut self) -> Finished {
        let deadline = std::time::Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            assert!(std::time::Instant::now() < deadline, "the run takes longer than {LIMIT:?}");
            std::thread::sleep(Duration::from_millis(20));
        };
        let text = |reader: Option<JoinHandle<String>>| {
            reader.and_then(|reader| reader.join().ok()).expect("output is read once")
        };
        Finished { code: status.code(), stdout: text(self.stdout.take()), stderr: text(self.stderr.take()) }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to kill.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn reader(source: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut source) = source {
            drop(source.read_to_end(&mut bytes));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
