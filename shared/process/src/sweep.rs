//! Finding and ending all that belongs to a child: its group, its session, its control group, and what carries its marker.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::cgroup::Leaf;
use crate::spec::Marker;

/// First and longest pause between two looks at the process table.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// What belongs to a child.
#[derive(Debug, Clone)]
pub struct Family {
    /// Pid of the leader, which is the number of its group and, where it has one, of its session.
    pub leader: Pid,
    pub marker: Option<Marker>,
    pub cgroup: Option<Arc<Leaf>>,
}

/// What a sweep did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Swept {
    /// How many processes it killed.
    pub killed: usize,
    /// What did not die in time: processes that wait in the kernel for a device.
    pub survivors: Vec<i32>,
}

/// One line of the process table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    pid: Pid,
    state: char,
    parent: Pid,
    group: Pid,
    session: Pid,
}

impl Process {
    /// Fields 1, 3, 4, 5 and 6 of `/proc/PID/stat`; the second, the name, may hold blanks and parentheses.
    fn parse(stat: &str) -> Option<Self> {
        let pid = stat.split(' ').next()?.parse().ok()?;
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        let mut number = || fields.next()?.parse().ok().map(Pid::from_raw);
        Some(Self { pid: Pid::from_raw(pid), state, parent: number()?, group: number()?, session: number()? })
    }

    fn has_ended(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

impl Family {
    /// Its living members but the leader.
    #[must_use]
    pub fn members(&self) -> Vec<Pid> {
        self.processes().into_iter().filter(|process| !process.has_ended()).map(|process| process.pid).collect()
    }

    fn processes(&self) -> Vec<Process> {
        let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
        let inside = self.cgroup.as_ref().map(|cgroup| cgroup.members()).unwrap_or_default();
        entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
            // A process that ends meanwhile has no file any more.
            .filter_map(|name| Process::parse(&std::fs::read_to_string(format!("/proc/{name}/stat")).ok()?))
            .filter(|process| process.pid != self.leader && self.owns(process, &inside))
            .collect()
    }

    fn owns(&self, process: &Process, inside: &HashSet<Pid>) -> bool {
        process.group == self.leader
            || process.session == self.leader
            || inside.contains(&process.pid)
            || self.is_marked(process.pid)
    }

    fn is_marked(&self, pid: Pid) -> bool {
        let Some(marker) = &self.marker else { return false };
        let wanted = format!("{}={}", marker.variable, marker.value);
        // Only of our own user; others cannot be ours.
        std::fs::read(format!("/proc/{pid}/environ"))
            .is_ok_and(|environment| environment.split(|byte| *byte == 0).any(|entry| entry == wanted.as_bytes()))
    }

    /// Kills all members but the leader and waits until they are gone, for at most `limit`.
    ///
    /// The leader must not have been reaped: its zombie keeps the number of the group from being given to somebody else.
    pub async fn sweep(&self, limit: Duration) -> Swept {
        let mut killed: Vec<Pid> = Vec::new();
        let mut pause = FIRST_PAUSE;
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            let mut living = Vec::new();
            for process in self.processes() {
                if !process.has_ended() {
                    living.push(process);
                } else if process.parent == Pid::this() {
                    // Only a subreaper has such; nobody else waits for them.
                    waitpid(process.pid, Some(WaitPidFlag::WNOHANG)).map(drop).unwrap_or_default();
                }
            }
            if living.is_empty() {
                return Swept { killed: killed.len(), survivors: Vec::new() };
            }
            // One that has ended meanwhile is what was wanted.
            killpg(self.leader, Signal::SIGKILL).unwrap_or_default();
            if let Some(cgroup) = &self.cgroup {
                // All at once, so that none can start another meanwhile.
                cgroup.kill();
            }
            for process in &living {
                if process.group != self.leader {
                    kill(process.pid, Signal::SIGKILL).unwrap_or_default();
                }
                if !killed.contains(&process.pid) {
                    killed.push(process.pid);
                }
            }
            if tokio::time::Instant::now() >= deadline {
                let survivors = living.into_iter().map(|process| process.pid.as_raw()).collect();
                return Swept { killed: killed.len(), survivors };
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_blanks_and_parentheses_are_skipped() {
        let process = Process::parse("42 (a (b) c) Z 1 40 39 0 -1 4194560").unwrap();
        let [pid, parent, group, session] = [42, 1, 40, 39].map(Pid::from_raw);
        assert_eq!(process, Process { pid, state: 'Z', parent, group, session });
        assert!(process.has_ended());
        for broken in ["", "x (a) S 1 1 1", "1 (a S 1 1 1", "1 (a) S 1 1"] {
            assert_eq!(Process::parse(broken), None, "{broken:?}");
        }
    }
}
