//! What earlier runs left behind: reported when a miner starts, kept for some days, then removed.
//!
//! Age counts by the chain and by the file's own time, and the lesser of the two holds, so that a clock that jumps removes
//! nothing that is young.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use grail_protocol::ids::WindowStart;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::{Pid, geteuid};

use crate::journal;
use crate::progress::LastUpload;
use crate::spool;

/// Folders of a state directory whose files belong to one window each, and how those files end.
const WINDOW_FILES: [(&str, &[&str]); 3] = [
    ("spool", &[".spool", ".sent", ".torn", ".aside"]),
    ("windows", &[".parquet", ".parquet.context.json"]),
    ("randomness", &[".json"]),
];

/// How spools end, open and closed.
const SPOOLS: [&str; 2] = [".spool", ".sent"];

/// Folder of jobs that killed workers, kept for inspection.
pub const POISONOUS: &str = "poisonous";
/// How long those are kept.
const KEEP_POISONOUS: Duration = Duration::from_secs(30 * 86_400);

/// How file names end that [`crate::durable::write`] has not renamed yet.
const PARTIAL: &str = ".partial";

/// What is old is judged by this.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// The window of the chain's head; it and later ones are never touched.
    pub current: WindowStart,
    pub block_time: Duration,
    pub now: SystemTime,
    /// How long files of a window that is over are kept.
    pub keep: Duration,
}

/// A window of the past that has a spool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    pub window: WindowStart,
    pub path: PathBuf,
    pub groups: usize,
    /// Whether the journal says that its file reached the store.
    pub uploaded: bool,
}

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    pub files: usize,
    pub bytes: u64,
    /// Windows among them that had never been uploaded.
    pub lost: BTreeSet<WindowStart>,
}

/// Reports what lies in the state directory `root` from windows before `current`, one line each.
///
/// # Errors
/// If the journal or the spool folder cannot be read.
pub fn report(root: &Path, current: WindowStart) -> io::Result<()> {
    let uploads = journal::uploads(root)?;
    let found = spools(root, current, &uploads)?;
    for Leftover { window, path, groups, uploaded } in &found {
        let spool = path.display();
        if *uploaded {
            tracing::debug!(%window, groups, uploaded, %spool, "An earlier window has a spool.");
        } else {
            tracing::warn!(%window, groups, uploaded, %spool, "An earlier window was not uploaded; its groups are kept.");
        }
    }
    if !found.is_empty() {
        let unsent = found.iter().filter(|leftover| !leftover.uploaded).count();
        tracing::info!(windows = found.len(), not_uploaded = unsent, "Earlier windows have spools.");
    }
    Ok(())
}

fn spools(root: &Path, current: WindowStart, uploads: &BTreeMap<WindowStart, LastUpload>) -> io::Result<Vec<Leftover>> {
    let mut found = Vec::new();
    for path in files(&root.join("spool"))? {
        if let Some(window) = window_of(&path, &SPOOLS)
            && window < current
        {
            let groups = spool::count_groups(&path)?;
            found.push(Leftover { window, path, groups, uploaded: uploads.contains_key(&window) });
        }
    }
    found.sort_by_key(|leftover| leftover.window);
    Ok(found)
}

/// Removes files of windows that are over for longer than `moment.keep`, and old poisonous jobs.
///
/// # Errors
/// If the journal or a folder cannot be read. A file that cannot be removed is logged and left.
pub fn clean(root: &Path, moment: &Moment) -> io::Result<Removed> {
    let uploads = journal::uploads(root)?;
    let mut removed = Removed::default();
    for (folder, endings) in WINDOW_FILES {
        for path in files(&root.join(folder))? {
            let Some(window) = window_of(&path, endings) else { continue };
            if moment.window_age(window).min(moment.file_age(&path)) >= moment.keep && remove(&path, &mut removed) {
                let is_spool = window_of(&path, &SPOOLS).is_some();
                if is_spool && !uploads.contains_key(&window) {
                    removed.lost.insert(window);
                }
            }
        }
    }
    for path in files(&root.join(POISONOUS))? {
        if moment.file_age(&path) >= KEEP_POISONOUS {
            remove(&path, &mut removed);
        }
    }
    for window in &removed.lost {
        tracing::warn!(%window, "The spool of a window that was never uploaded was removed for its age.");
    }
    if removed.files > 0 {
        tracing::info!(files = removed.files, bytes = removed.bytes, "Removed files of old windows.");
    }
    Ok(removed)
}

/// Removes half-written files of an earlier process. Only while nothing else writes, which is at the start.
///
/// # Errors
/// If a folder cannot be read.
pub fn remove_partial(root: &Path) -> io::Result<Removed> {
    let mut removed = Removed::default();
    for (folder, _) in WINDOW_FILES {
        for path in files(&root.join(folder))? {
            if path.to_str().is_some_and(|path| path.ends_with(PARTIAL)) {
                remove(&path, &mut removed);
            }
        }
    }
    Ok(removed)
}

/// Removes folders of sockets under `base` whose process is gone. One with our own number is of an earlier process, too, as
/// long as this one has not made its own.
///
/// # Errors
/// If `base` cannot be read.
pub fn remove_stale_runtimes(base: &Path) -> io::Result<usize> {
    let mut removed = 0;
    let entries = match std::fs::read_dir(base) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(pid_of_runtime) else { continue };
        // Not the target of a link, and nobody else's.
        let Ok(metadata) = entry.metadata() else { continue };
        if !metadata.is_dir() || metadata.uid() != geteuid().as_raw() || is_another_alive(pid) {
            continue;
        }
        match std::fs::remove_dir_all(entry.path()) {
            Ok(()) => {
                removed += 1;
                tracing::info!(folder = %entry.path().display(), "Removed the sockets of a process that is gone.");
            }
            Err(error) => {
                tracing::warn!(folder = %entry.path().display(), %error, "Old sockets could not be removed.");
            }
        }
    }
    Ok(removed)
}

fn pid_of_runtime(name: &str) -> Option<i32> {
    let number = name.strip_prefix("grail-mine-").or_else(|| name.strip_prefix("grail-verify-"))?;
    number.parse().ok().filter(|pid| *pid > 0)
}

fn is_another_alive(pid: i32) -> bool {
    let pid = Pid::from_raw(pid);
    pid != Pid::this() && kill(pid, None) != Err(Errno::ESRCH)
}

impl Moment {
    /// Time since the window by the chain's count; zero for the current one and those to come.
    fn window_age(&self, window: WindowStart) -> Duration {
        let blocks = self.current.block().0.saturating_sub(window.block().0);
        self.block_time.saturating_mul(u32::try_from(blocks).unwrap_or(u32::MAX))
    }

    /// Time since the last change of a file; zero if that lies ahead or is unknown.
    fn file_age(&self, path: &Path) -> Duration {
        let changed = std::fs::symlink_metadata(path).and_then(|metadata| metadata.modified());
        changed.ok().and_then(|changed| self.now.duration_since(changed).ok()).unwrap_or_default()
    }
}

/// Plain files of a folder; none if the folder is not there.
fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let plain = |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_file());
    Ok(entries.flatten().filter(plain).map(|entry| entry.path()).collect())
}

/// The window in a name such as `window-3000.spool` or `5F…-window-3000.parquet`, if it ends as it should.
fn window_of(path: &Path, endings: &[&str]) -> Option<WindowStart> {
    let name = path.file_name()?.to_str()?;
    let (_, rest) = name.rsplit_once("window-")?;
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (number, ending) = rest.split_at(digits);
    endings.contains(&ending).then(|| number.parse::<u64>().ok()?.try_into().ok())?
}

fn remove(path: &Path, removed: &mut Removed) -> bool {
    let bytes = std::fs::symlink_metadata(path).map_or(0, |metadata| metadata.len());
    match std::fs::remove_file(path) {
        Ok(()) => {
            removed.files += 1;
            removed.bytes += bytes;
            true
        }
        Err(error) => {
            tracing::warn!(file = %path.display(), %error, "An old file could not be removed.");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::journal::{Event, Journal};

    const DAY: Duration = Duration::from_secs(86_400);

    fn window(block: u64) -> WindowStart {
        WindowStart::try_from(block).unwrap()
    }

    struct State(tempfile::TempDir);

    impl State {
        fn new() -> Self {
            let state = Self(tempfile::tempdir().unwrap());
            for folder in ["spool", "windows", "randomness", POISONOUS] {
                std::fs::create_dir(state.root().join(folder)).unwrap();
            }
            state
        }

        fn root(&self) -> &Path {
            self.0.path()
        }

        fn file(&self, name: &str, age: Duration) {
            let file = File::create(self.root().join(name)).unwrap();
            file.set_modified(SystemTime::now() - age).unwrap();
        }

        fn left(&self) -> Vec<String> {
            let mut left: Vec<String> = WINDOW_FILES
                .iter()
                .map(|(folder, _)| *folder)
                .chain([POISONOUS])
                .flat_map(|folder| files(&self.root().join(folder)).unwrap())
                .map(|path| path.strip_prefix(self.root()).unwrap().display().to_string())
                .collect();
            left.sort();
            left
        }
    }

    /// A day has 7,200 blocks of 12 seconds.
    fn moment(current: u64) -> Moment {
        Moment { current: window(current), block_time: Duration::from_secs(12), now: SystemTime::now(), keep: 7 * DAY }
    }

    #[test]
    fn windows_are_removed_by_age_and_never_before_both_clocks_agree() {
        let state = State::new();
        let old = 8 * DAY;
        for name in [
            "spool/window-3000.spool",
            "spool/window-3000.torn",
            "spool/window-3030.spool",
            "windows/5F-window-3000.parquet",
            "windows/5F-window-3000.parquet.context.json",
            "randomness/window-3000.json",
            // Old by their time, but the chain says that they are young, current or to come.
            "spool/window-54000.spool",
            "spool/window-63000.spool",
            "windows/5F-window-63030.parquet",
            // Not ours to judge.
            "spool/notes-window-3000.txt",
            "windows/window-3001.parquet",
            "windows/window-.parquet",
        ] {
            state.file(name, old);
        }
        // Old by the chain, but written lately.
        state.file("spool/window-3060.spool", DAY);
        state.file("poisonous/group-1.bin", 31 * DAY);
        state.file("poisonous/group-2.bin", old);
        let mut journal = Journal::open(state.root(), crate::clock::Clock::system()).unwrap();
        journal.record(Event::WindowUploaded { window: window(3_000), key: "k".into(), bytes: 1, took_ms: None });

        let removed = clean(state.root(), &moment(63_000)).unwrap();
        assert_eq!((removed.files, removed.lost), (7, BTreeSet::from([window(3_030)])));
        assert_eq!(
            state.left(),
            [
                "poisonous/group-2.bin",
                "spool/notes-window-3000.txt",
                "spool/window-3060.spool",
                "spool/window-54000.spool",
                "spool/window-63000.spool",
                "windows/5F-window-63030.parquet",
                "windows/window-.parquet",
                "windows/window-3001.parquet",
            ]
        );
    }

    #[test]
    fn earlier_spools_are_reported_with_their_fate() {
        let state = State::new();
        for name in ["spool/window-3030.spool", "spool/window-3000.spool", "spool/window-3060.spool"] {
            state.file(name, DAY);
        }
        let uploads =
            BTreeMap::from([(window(3_000), LastUpload { window: 3_000, bytes: 1, unix_ms: 1, took_ms: None })]);
        let found = spools(state.root(), window(3_060), &uploads).unwrap();
        let found: Vec<_> = found.iter().map(|leftover| (leftover.window.block().0, leftover.uploaded)).collect();
        assert_eq!(found, [(3_000, true), (3_030, false)]);
        report(state.root(), window(3_060)).unwrap();
        assert_eq!(state.left().len(), 3, "a report removes nothing");
    }

    #[test]
    fn half_written_files_go() {
        let state = State::new();
        state.file("windows/5F-window-3000.parquet.77.partial", Duration::ZERO);
        state.file("windows/5F-window-3000.parquet", Duration::ZERO);
        assert_eq!(remove_partial(state.root()).unwrap().files, 1);
        assert_eq!(state.left(), ["windows/5F-window-3000.parquet"]);
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(remove_partial(empty.path()).unwrap(), Removed::default());
    }

    #[test]
    fn sockets_of_processes_that_are_gone_are_removed() {
        let base = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let gone = child.id();
        child.wait().unwrap();
        let parent = nix::unistd::getppid();
        let names = [
            format!("grail-mine-{gone}"),
            format!("grail-mine-{}", std::process::id()),
            format!("grail-mine-{parent}"),
            format!("grail-verify-{gone}"),
            format!("other-{gone}"),
            "grail-mine-x".to_owned(),
        ];
        for name in &names {
            std::fs::create_dir(base.path().join(name)).unwrap();
            std::fs::write(base.path().join(name).join("worker-0.1.sock"), "").unwrap();
        }
        std::os::unix::fs::symlink(base.path().join(&names[2]), base.path().join("grail-verify-999999999")).unwrap();
        assert_eq!(remove_stale_runtimes(base.path()).unwrap(), 3);
        let left = names.iter().filter(|name| base.path().join(name).exists()).count();
        assert_eq!(left, 3);
        assert!(base.path().join(&names[2]).join("worker-0.1.sock").exists(), "of a process that lives");
        assert_eq!(remove_stale_runtimes(&base.path().join("nowhere")).unwrap(), 0);
    }
}
