//! Control groups as files that only look like the kernel's; `tests/cgroup.rs` has the real ones.

use std::fs;

use super::*;

const OWN: &str = "sys/fs/cgroup/miner.service";

/// A root whose process 7 is us, in a control group that was delegated with a memory controller.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        host.write("proc/self/cgroup", "1:name=systemd:/x\n0::/miner.service\n");
        host.write(
            "proc/self/mountinfo",
            "24 1 0:21 / /sys rw - sysfs sysfs rw\n\
             31 24 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n",
        );
        host.process("self", 7, 700);
        host.process("7", 7, 700);
        host.write(&format!("{OWN}/cgroup.controllers"), "cpu memory pids\n");
        host.write(&format!("{OWN}/cgroup.subtree_control"), "");
        host.write(&format!("{OWN}/cgroup.type"), "domain\n");
        host.write(&format!("{OWN}/cgroup.procs"), "7\n");
        host
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn process(&self, folder: &str, pid: i32, started: u64) {
        let between = "0 ".repeat(18);
        self.write(&format!("proc/{folder}/stat"), &format!("{pid} (a b) c) S {between}{started} 0 0\n"));
    }

    fn own(&self, file: &str) -> String {
        fs::read_to_string(self.path().join(OWN).join(file)).unwrap()
    }

    fn folders(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path().join(OWN)).unwrap().map(Result::unwrap);
        let mut names: Vec<String> = entries
            .filter(|entry| entry.file_type().unwrap().is_dir())
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

#[test]
fn without_delegation_there_is_none() {
    type Change = fn(&Host);
    let changes: [(&str, Change); 5] = [
        ("version 1 only", |host| host.write("proc/self/cgroup", "4:memory:/miner.service\n")),
        ("not mounted", |host| host.write("proc/self/mountinfo", "24 1 0:21 / /sys rw - sysfs sysfs rw\n")),
        ("another part is mounted", |host| {
            host.write("proc/self/mountinfo", "31 24 0:27 /other /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
        }),
        ("outside of the namespace", |host| host.write("proc/self/cgroup", "0::/../miner.service\n")),
        ("no controllers file", |host| fs::remove_file(host.path().join(OWN).join("cgroup.controllers")).unwrap()),
    ];
    for (what, change) in changes {
        let host = Host::new();
        assert!(Delegation::find(host.path()).is_ok());
        change(&host);
        assert!(Delegation::open(host.path()).is_none(), "{what}");
        assert_eq!(host.own("cgroup.subtree_control"), "", "{what}");
    }
}

#[test]
fn a_part_of_the_hierarchy_may_be_mounted() {
    let line = "31 24 0:27 /pod /sys/fs/cgroup rw - cgroup2 cgroup2 rw";
    assert_eq!(mounted_at(line, "/pod/miner"), Some(PathBuf::from("/sys/fs/cgroup/miner")));
    assert_eq!(mounted_at(line, "/pods/miner"), None);
    assert_eq!(mounted_at("31 24 0:27 /pod /sys/fs/cgroup rw - cgroup memory rw", "/pod/miner"), None);
}

#[test]
fn memory_is_accounted_for_after_this_process_has_moved_aside() {
    let host = Host::new();
    assert!(Delegation::open(host.path()).is_some());
    // Here mkdir makes no entry, so this process stays and nothing is enabled.
    assert_eq!(host.folders(), ["grail.7.700.self"]);
    assert_eq!(host.own("cgroup.subtree_control"), "");
    host.write(&format!("{OWN}/grail.7.700.self/cgroup.procs"), "");
    assert!(Delegation::open(host.path()).is_some());
    assert_eq!(host.own("grail.7.700.self/cgroup.procs"), "7");
    assert_eq!(host.own("cgroup.subtree_control"), "+memory");
}

#[test]
fn this_process_stays_where_memory_is_not_to_be_had_or_others_are() {
    type Change = fn(&Host);
    let changes: [(&str, Change); 4] = [
        ("others are here", |host| host.write(&format!("{OWN}/cgroup.procs"), "6\n7\n")),
        ("no memory controller", |host| host.write(&format!("{OWN}/cgroup.controllers"), "cpu pids\n")),
        ("the host's root", |host| fs::remove_file(host.path().join(OWN).join("cgroup.type")).unwrap()),
        ("enabled before", |host| host.write(&format!("{OWN}/cgroup.subtree_control"), "memory\n")),
    ];
    for (what, change) in changes {
        let host = Host::new();
        change(&host);
        assert!(Delegation::open(host.path()).is_some(), "{what}");
        assert_eq!(host.folders(), Vec::<String>::new(), "{what}");
    }
}

#[test]
fn leftovers_of_the_dead_are_removed_and_those_of_the_living_stay() {
    let host = Host::new();
    host.process("9", 9, 900);
    let own = host.path().join(OWN);
    for folder in [
        "grail.8.800.worker-0.1/below",
        "grail.7.699.worker-0.0",
        "grail.9.900.worker-0.0",
        "grail.x.1.worker-0.0",
        "other",
    ] {
        fs::create_dir_all(own.join(folder)).unwrap();
    }
    let delegation = Delegation::find(host.path()).unwrap();
    delegation.remove_stale(host.path());
    // 7 is our own number, but another start: its maker is dead.
    assert_eq!(host.folders(), ["grail.9.900.worker-0.0", "grail.x.1.worker-0.0", "other"]);
}

#[test]
fn each_child_has_a_folder_of_its_own() {
    let host = Host::new();
    let delegation = Delegation::find(host.path()).unwrap();
    let leaves = [delegation.leaf("worker-0").unwrap(), delegation.leaf("../0").unwrap()];
    assert_eq!(host.folders(), ["grail.7.700.---0.1", "grail.7.700.worker-0.0"]);
    assert_eq!(leaves[0].memory(), Memory::default());
    drop(leaves);
    assert_eq!(host.folders(), Vec::<String>::new());
}

#[test]
fn memory_and_its_lack_are_read() {
    let host = Host::new();
    let delegation = Delegation::find(host.path()).unwrap();
    let leaf = delegation.leaf("worker-0").unwrap();
    let folder = leaf.folder().to_owned();
    let say = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
    say("memory.current", "4096\n");
    say("memory.peak", "8192\n");
    say("memory.events", "low 0\nhigh 0\nmax 3\noom 1\noom_kill 0\noom_group_kill 0\n");
    assert!(!leaf.was_oom_killed());
    say("memory.events", "low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\noom_group_kill 0\n");
    let memory = Memory { current_bytes: Some(4_096), peak_bytes: Some(8_192), oom_kills: 2 };
    assert_eq!(leaf.memory(), memory);
    assert!(leaf.was_oom_killed());
    // What cannot be removed, as the look-alikes of the kernel's files here, is no reason to forget or to fail.
    assert!(leaf.remove().is_err());
    assert_eq!(leaf.memory(), memory);
}

#[test]
fn a_folder_is_removed_once_with_all_below_it() {
    let host = Host::new();
    let leaf = Delegation::find(host.path()).unwrap().leaf("launcher").unwrap();
    fs::create_dir_all(leaf.folder().join("below/it")).unwrap();
    leaf.remove().unwrap();
    leaf.remove().unwrap();
    assert_eq!(host.folders(), Vec::<String>::new());
    assert_eq!(leaf.memory(), Memory::default());
}
