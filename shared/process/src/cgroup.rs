//! One control group (v2) a child, where ours was delegated to us: what a child starts cannot leave it, so all of it can be
//! ended at once, and the kernel counts its memory and the processes that it killed for lack of it.
//!
//! Nothing here is needed for work: without delegation children are found by group, session and marker, and there is no
//! account of memory.
//!
//! All paths lie below a root, which is `/` but in tests.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{AccessFlags, Pid, access};
use tracing::{debug, warn};

/// Beginning of the names of all folders that we make.
const PREFIX: &str = "grail";

/// First and longest pause between two tries to remove a folder whose processes are about to end.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// How long the processes of a dead supervisor may take to end.
const STALE_LIMIT: Duration = Duration::from_secs(5);

/// Who made a folder: a process id with the moment of its start, which tells it from a later process of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owner {
    pid: i32,
    /// Field 22 of `/proc/PID/stat`, in ticks since boot.
    started: u64,
}

impl Owner {
    /// The living process `pid`; `self` for our own.
    fn living(root: &Path, pid: &str) -> Option<Self> {
        let stat = std::fs::read_to_string(root.join("proc").join(pid).join("stat")).ok()?;
        let number = stat.split(' ').next()?.parse().ok()?;
        // The second field, the name, may hold blanks and parentheses; 19 fields lie between it and the start.
        let (_, rest) = stat.rsplit_once(')')?;
        Some(Self { pid: number, started: rest.split_ascii_whitespace().nth(19)?.parse().ok()? })
    }

    /// The maker of the folder `name`, if it is one of ours.
    fn of_folder(name: &OsStr) -> Option<Self> {
        let mut parts = name.to_str()?.split('.');
        if parts.next()? != PREFIX {
            return None;
        }
        Some(Self { pid: parts.next()?.parse().ok()?, started: parts.next()?.parse().ok()? })
    }

    fn is_alive(self, root: &Path) -> bool {
        Self::living(root, &self.pid.to_string()) == Some(self)
    }

    fn folder(self, rest: &str) -> String {
        format!("{PREFIX}.{}.{}.{rest}", self.pid, self.started)
    }
}

/// The control group of this process, in which it may make others.
#[derive(Debug)]
pub struct Delegation {
    folder: PathBuf,
    owner: Owner,
    count: AtomicU64,
}

impl Delegation {
    /// Our control group, if it was delegated to us: it lies on a mounted v2 hierarchy, is writable and can have children.
    /// Leftovers of supervisors that are dead are ended and removed, and memory is accounted for if the kernel lets us.
    ///
    /// Only processes of control groups without children may be in one whose children have controllers, so this process moves
    /// into a child of its own first. It does not where others share its control group: they are not ours to move.
    ///
    /// To be called once a process, at its start; it may wait a few seconds for leftovers to end.
    #[must_use]
    pub fn open(root: &Path) -> Option<Self> {
        match Self::find(root) {
            Ok(delegation) => {
                delegation.remove_stale(root);
                delegation.account_memory();
                Some(delegation)
            }
            Err(reason) => {
                debug!(reason, "No control group was delegated to this process; children get none of their own.");
                None
            }
        }
    }

    fn find(root: &Path) -> Result<Self, &'static str> {
        let own = read(&root.join("proc/self/cgroup"));
        let own = own.lines().find_map(|line| line.strip_prefix("0::")).ok_or("the kernel has no control groups v2")?;
        let mounts = read(&root.join("proc/self/mountinfo"));
        let mounted = mounts.lines().find_map(|line| mounted_at(line, own)).ok_or("no v2 hierarchy is mounted")?;
        let folder = root.join(mounted.strip_prefix("/").unwrap_or(&mounted));
        if !folder.join("cgroup.controllers").exists() {
            return Err("our control group has no controllers file");
        }
        let writable = |path: &Path| access(path, AccessFlags::W_OK).is_ok();
        if !writable(&folder) || !writable(&folder.join("cgroup.procs")) {
            return Err("our control group is not writable");
        }
        let owner = Owner::living(root, "self").ok_or("the process table cannot be read")?;
        Ok(Self { folder, owner, count: AtomicU64::new(0) })
    }

    /// Ends and removes what supervisors that are dead have left.
    fn remove_stale(&self, root: &Path) {
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return };
        for entry in entries.flatten() {
            let Some(owner) = Owner::of_folder(&entry.file_name()) else { continue };
            if owner.is_alive(root) {
                continue;
            }
            let stale = Leaf::at(entry.path());
            stale.kill();
            match stale.remove_within(STALE_LIMIT) {
                Ok(()) => debug!(folder = %stale.folder.display(), "Removed a dead supervisor's control group."),
                Err(error) => {
                    warn!(folder = %stale.folder.display(), %error, "A dead supervisor's control group stays behind.");
                }
            }
        }
    }

    /// Has the kernel account for the memory of our children, where it may.
    fn account_memory(&self) {
        let lists = |name: &str| {
            let text = read(&self.folder.join(name));
            text.split_ascii_whitespace().any(|controller| controller == "memory")
        };
        if lists("cgroup.subtree_control") {
            return;
        }
        if !lists("cgroup.controllers") {
            debug!("The memory of children is not accounted for: our control group has no memory controller.");
            return;
        }
        // The root of all has no type. What is enabled there is the host's matter.
        if !self.folder.join("cgroup.type").exists() {
            debug!("The memory of children is not accounted for: our control group is the host's root.");
            return;
        }
        if pids_in(&self.folder).iter().any(|pid| pid.as_raw() != self.owner.pid) {
            debug!("The memory of children is not accounted for: other processes share our control group.");
            return;
        }
        let result = self.move_aside().and_then(|()| write(&self.folder.join("cgroup.subtree_control"), "+memory"));
        if let Err(error) = result {
            debug!(%error, "The memory of children is not accounted for: the controller cannot be enabled.");
        }
    }

    fn move_aside(&self) -> io::Result<()> {
        let aside = self.folder.join(self.owner.folder("self"));
        std::fs::create_dir_all(&aside)?;
        write(&aside.join("cgroup.procs"), &self.owner.pid.to_string())
    }

    /// A control group for one child, whose name becomes part of the folder's.
    ///
    /// # Errors
    /// If the folder cannot be made, for instance because their number is limited.
    pub fn leaf(&self, child: &str) -> io::Result<Leaf> {
        let name: String = child.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let folder = self.folder.join(self.owner.folder(&format!("{name}.{number}")));
        std::fs::create_dir(&folder)?;
        Ok(Leaf::at(folder))
    }
}

/// Where the control group `own` is to be seen, if `line` of `mountinfo` mounts a v2 hierarchy that holds it.
fn mounted_at(line: &str, own: &str) -> Option<PathBuf> {
    let (place, kind) = line.split_once(" - ")?;
    if kind.split(' ').next() != Some("cgroup2") {
        return None;
    }
    let mut fields = place.split(' ').skip(3);
    let (mounted, at) = (fields.next()?, fields.next()?);
    let below = Path::new(own).strip_prefix(mounted).ok()?;
    // A group outside of our namespace is written with `..` and cannot be reached.
    let is_plain = below.components().all(|component| matches!(component, Component::Normal(_)));
    is_plain.then(|| Path::new(at).join(below))
}

/// What the kernel knows of a control group's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// In use now.
    pub current_bytes: Option<u64>,
    /// The most that was ever in use; Linux 5.19.
    pub peak_bytes: Option<u64>,
    /// Processes that were killed because memory ran out.
    pub oom_kills: u64,
}

/// The control group of one child and all that it starts. Dropping it ends what is in it and removes it.
#[derive(Debug)]
pub struct Leaf {
    folder: PathBuf,
    /// The last reading, kept when the folder is removed; `None` while it is there.
    last: Mutex<Option<Memory>>,
}

impl Leaf {
    fn at(folder: PathBuf) -> Self {
        Self { folder, last: Mutex::new(None) }
    }

    /// The file to which a process writes `0` to enter.
    pub(crate) fn entrance(&self) -> io::Result<File> {
        OpenOptions::new().write(true).open(self.folder.join("cgroup.procs"))
    }

    /// The folder in the control group's file system.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its living processes, also those of control groups below it.
    #[must_use]
    pub fn members(&self) -> HashSet<Pid> {
        folders_below(&self.folder).iter().flat_map(|folder| pids_in(folder)).collect()
    }

    /// Kills all its processes without waiting for their end.
    pub fn kill(&self) {
        if write(&self.folder.join("cgroup.kill"), "1").is_ok() {
            return;
        }
        // Linux before 5.14.
        for pid in self.members() {
            // One that has ended meanwhile is what was wanted.
            kill(pid, Signal::SIGKILL).unwrap_or_default();
        }
    }

    /// Its memory; the last reading once it is removed. All unknown where memory is not accounted for.
    #[must_use]
    pub fn memory(&self) -> Memory {
        // Held while it is read, so that the folder is not removed meanwhile.
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.unwrap_or_else(|| self.read_memory())
    }

    fn read_memory(&self) -> Memory {
        let number = |name: &str| read(&self.folder.join(name)).trim().parse().ok();
        // `memory.events` counts the groups below too.
        let events = read(&self.folder.join("memory.events"));
        let oom_kills = events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok());
        Memory {
            current_bytes: number("memory.current"),
            peak_bytes: number("memory.peak"),
            oom_kills: oom_kills.unwrap_or(0),
        }
    }

    /// Whether the kernel has killed any of its processes because memory ran out.
    #[must_use]
    pub fn was_oom_killed(&self) -> bool {
        self.memory().oom_kills > 0
    }

    /// Removes the folder with all below it; what it said of memory is kept.
    ///
    /// # Errors
    /// `EBUSY` as long as a process is in it.
    pub fn remove(&self) -> io::Result<()> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some() {
            return Ok(());
        }
        let memory = self.read_memory();
        for folder in folders_below(&self.folder).iter().rev() {
            match std::fs::remove_dir(folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        *last = Some(memory);
        Ok(())
    }

    /// [`Self::remove`], tried until the processes that were killed have ended.
    fn remove_within(&self, limit: Duration) -> io::Result<()> {
        let (mut pause, mut waited) = (FIRST_PAUSE, Duration::ZERO);
        loop {
            match self.remove() {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && waited < limit => {
                    std::thread::sleep(pause);
                    waited += pause;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                result => return result,
            }
        }
    }
}

impl Drop for Leaf {
    fn drop(&mut self) {
        if self.last.get_mut().unwrap_or_else(PoisonError::into_inner).is_none() {
            self.kill();
            // Where a process has not ended yet the next start removes it.
            if let Err(error) = self.remove() {
                debug!(folder = %self.folder.display(), %error, "A control group stays behind for now.");
            }
        }
    }
}

/// `folder` and all below it, parents first.
fn folders_below(folder: &Path) -> Vec<PathBuf> {
    let mut folders = vec![folder.to_owned()];
    let mut next = 0;
    while let Some(folder) = folders.get(next) {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let below: Vec<PathBuf> = entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .collect();
        folders.extend(below);
        next += 1;
    }
    folders
}

fn pids_in(folder: &Path) -> Vec<Pid> {
    let text = read(&folder.join("cgroup.procs"));
    // 0 stands for a process of another namespace.
    text.lines().filter_map(|line| line.trim().parse().ok().filter(|pid| *pid > 0).map(Pid::from_raw)).collect()
}

/// A file of the kernel; empty if it is not there.
fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Writes to a file of the kernel, which must be there.
fn write(path: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}

#[cfg(test)]
#[path = "cgroup_tests.rs"]
mod tests;
