//! What belongs to one slot alone: its GPU, and the CPUs and memory next to it.

use grail_process::cgroup::Delegation;
use grail_process::{ChildSpec, Limit, Resource};

/// The kernel takes a worker before the launcher and the launcher's server before the supervisor: a worker comes back in
/// seconds and its groups go to others.
const WORKER_OOM_SCORE: i16 = 500;
const LAUNCHER_OOM_SCORE: i16 = 300;

/// Descriptors of a child: checkpoint shards, sockets and the driver's own.
const OPEN_FILES: u64 = 65_536;

/// Where the worker of one slot runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotPin {
    /// `cpu`, or `cuda:0`: a worker sees one GPU at most.
    pub device: String,
    /// The one entry of its `CUDA_VISIBLE_DEVICES`; `None` for a worker on the CPU, which sees none.
    pub visible: Option<String>,
    /// CPUs it may run on; empty = all of the supervisor's.
    pub cpus: Vec<usize>,
    /// NUMA node that its memory comes from first.
    pub numa_node: Option<u32>,
}

impl SlotPin {
    /// A worker on the CPUs `cpus`, all of the supervisor's if there are none.
    #[must_use]
    pub fn cpu(cpus: Vec<usize>) -> Self {
        Self { device: "cpu".to_owned(), visible: None, cpus, numa_node: None }
    }
}

/// Pins a worker: it sees its own GPU only, runs next to it, and dies first when memory runs out.
#[must_use]
pub fn apply(mut spec: ChildSpec, pin: &SlotPin) -> ChildSpec {
    spec.environment.set("CUDA_VISIBLE_DEVICES", pin.visible.as_deref().unwrap_or_default());
    spec.environment.set("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
    spec.cpus.clone_from(&pin.cpus);
    spec.numa_node = pin.numa_node;
    limited(spec, WORKER_OOM_SCORE)
}

/// What the launcher and, by inheritance, its server get.
#[must_use]
pub fn apply_to_launcher(mut spec: ChildSpec) -> ChildSpec {
    spec.environment.set("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
    limited(spec, LAUNCHER_OOM_SCORE)
}

/// Gives the child a control group of its own where ours was delegated to us; without one it is found and ended by its group
/// and marker.
#[must_use]
pub fn confine(mut spec: ChildSpec, delegation: Option<&Delegation>) -> ChildSpec {
    if let Some(delegation) = delegation {
        match delegation.leaf(&spec.name) {
            Ok(leaf) => spec.cgroup = Some(leaf),
            Err(error) => tracing::warn!(child = %spec.name, %error, "A child gets no control group of its own."),
        }
    }
    spec
}

fn limited(mut spec: ChildSpec, oom_score: i16) -> ChildSpec {
    spec.oom_score_adjustment = Some(oom_score);
    // A core of a process with a model in memory fills the disk; pinned buffers are locked memory.
    spec.limits.push(Limit::fixed(Resource::RLIMIT_CORE, 0));
    spec.limits.push(Limit::fixed(Resource::RLIMIT_NOFILE, OPEN_FILES));
    spec.limits.push(Limit::most(Resource::RLIMIT_MEMLOCK));
    spec
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use grail_process::placement::allowed_cpus;
    use grail_process::{ExitCause, LogPolicy, spawn};
    use nix::sys::resource::getrlimit;

    use super::*;

    /// What a child sees of itself, a line each.
    const SCRIPT: &str = r#"echo "sees [${CUDA_VISIBLE_DEVICES-unset}]"; echo "$CUDA_DEVICE_ORDER"; cat /proc/self/oom_score_adj
        ulimit -Hc; ulimit -Sn; grep 'Max locked memory' /proc/self/limits | tr -s ' '
        grep Cpus_allowed_list /proc/self/status"#;

    async fn seen(change: impl FnOnce(ChildSpec) -> ChildSpec) -> Vec<String> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&lines);
        let mut spec = ChildSpec::new("shell", "/bin/sh").arguments(["-c", SCRIPT]);
        spec.log = LogPolicy::to_sink(move |line| sink.lock().unwrap().push(line.text.to_owned()));
        // As the fleet passes ours on; the pin comes after it.
        spec.environment.set("CUDA_VISIBLE_DEVICES", "0,1,2,3");
        spec.environment.set("CUDA_DEVICE_ORDER", "FASTEST_FIRST");
        let child = spawn(change(spec)).await.unwrap();
        assert_eq!(child.wait().await.cause, ExitCause::Code(0), "{lines:?}");
        lines.lock().unwrap().clone()
    }

    fn limits() -> [String; 2] {
        let most = |resource| getrlimit(resource).unwrap().1;
        let locked = match most(Resource::RLIMIT_MEMLOCK) {
            u64::MAX => "unlimited unlimited".to_owned(),
            bytes => format!("{bytes} {bytes}"),
        };
        let files = OPEN_FILES.min(most(Resource::RLIMIT_NOFILE));
        [files.to_string(), format!("Max locked memory {locked} bytes ")]
    }

    #[tokio::test]
    async fn a_worker_sees_its_own_gpu_and_cpus() {
        let cpu = *allowed_cpus().last().unwrap();
        let [files, locked] = limits();
        let pin = SlotPin {
            device: "cuda:0".to_owned(),
            visible: Some("GPU-8932f937".to_owned()),
            cpus: vec![cpu],
            numa_node: Some(0),
        };
        let allowed = format!("Cpus_allowed_list:\t{cpu}");
        assert_eq!(
            seen(|spec| apply(spec, &pin)).await,
            ["sees [GPU-8932f937]", "PCI_BUS_ID", "500", "0", &files, &locked, &allowed]
        );
    }

    #[tokio::test]
    async fn a_worker_on_the_cpu_sees_no_gpu() {
        let lines = seen(|spec| apply(spec, &SlotPin::cpu(Vec::new()))).await;
        assert_eq!(lines[..3], ["sees []", "PCI_BUS_ID", "500"]);
        let own = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(own.lines().any(|line| line == lines[6]), "all of ours: {lines:?}");
    }

    #[tokio::test]
    async fn without_delegation_a_child_runs_all_the_same() {
        let lines = seen(|spec| confine(apply(spec, &SlotPin::cpu(Vec::new())), None)).await;
        assert_eq!(lines[2], "500");
    }

    #[tokio::test]
    async fn the_launcher_keeps_the_gpus_and_dies_after_the_workers() {
        let lines = seen(apply_to_launcher).await;
        assert_eq!(lines[..3], ["sees [0,1,2,3]", "PCI_BUS_ID", "300"]);
        const { assert!(LAUNCHER_OOM_SCORE < WORKER_OOM_SCORE) };
    }
}
