//! Where on the host a child should run: the CPUs and the NUMA node that lie next to its GPU, shared with the other children
//! that have the same neighbours.
//!
//! GPUs are found without a CUDA context: by `nvidia-smi`, else by the driver's own files. All paths lie below a root, which
//! is `/` but in tests.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tracing::{debug, info};

use crate::child::{StopPlan, spawn};
use crate::spec::{ChildSpec, Output};

/// How long `nvidia-smi` may take; without persistence mode it wakes every GPU first.
const NVIDIA_SMI_LIMIT: Duration = Duration::from_secs(20);

/// More than it writes on any host.
const NVIDIA_SMI_MOST_BYTES: u64 = 1 << 20;

/// The address of a PCI device as the kernel writes it, for instance `0000:17:00.0`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress(String);

impl PciAddress {
    /// From any of the ways to write it: the kernel has four digits of domain, NVIDIA's tools have eight.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.trim().split(':');
        let (domain, bus, rest) = (parts.next()?, parts.next()?, parts.next()?);
        let (device, function) = rest.split_once('.')?;
        let hex = |text: &str| u32::from_str_radix(text, 16).ok();
        let (domain, bus, device, function) = (hex(domain)?, hex(bus)?, hex(device)?, hex(function)?);
        let fits = bus <= 0xff && device <= 0x1f && function <= 7 && parts.next().is_none();
        fits.then(|| Self(format!("{domain:04x}:{bus:02x}:{device:02x}.{function:x}")))
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A GPU of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its number in the order of the bus, which is CUDA's with `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
    pub index: usize,
    /// `GPU-…`.
    pub uuid: String,
    pub address: PciAddress,
    /// `MIG-…` of its instances, as far as they were asked for.
    pub instances: Vec<String>,
}

/// The GPUs of this host, in the order of the bus.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inventory {
    gpus: Vec<Gpu>,
}

impl Inventory {
    /// Asks `nvidia_smi`, a program that is found along PATH if it has no slash, and the driver's files if it does not answer.
    /// Empty on a host without GPUs.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O enabled.
    pub async fn read(root: &Path, nvidia_smi: &Path) -> Self {
        let query = ["--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"];
        let mut inventory = match ask(nvidia_smi, &query, NVIDIA_SMI_LIMIT).await {
            Some(answer) => Self::from_query(&answer),
            None => Self::default(),
        };
        if inventory.gpus.is_empty() {
            return Self::from_driver(root);
        }
        if let Some(answer) = ask(nvidia_smi, &["-L"], NVIDIA_SMI_LIMIT).await {
            inventory.add_instances(&answer);
        }
        inventory
    }

    /// From `nvidia-smi --query-gpu=index,uuid,pci.bus_id --format=csv,noheader`; what is no GPU is left out.
    #[must_use]
    pub fn from_query(answer: &str) -> Self {
        let gpu = |line: &str| {
            let mut fields = line.split(',').map(str::trim);
            let (index, uuid, address) = (fields.next()?, fields.next()?, fields.next()?);
            Some(Gpu {
                index: index.parse().ok()?,
                uuid: uuid.to_owned(),
                address: PciAddress::parse(address)?,
                instances: Vec::new(),
            })
        };
        let mut gpus: Vec<Gpu> = answer.lines().filter_map(gpu).collect();
        gpus.sort_by_key(|gpu| gpu.index);
        Self { gpus }
    }

    /// From `/proc/driver/nvidia/gpus/*/information`.
    #[must_use]
    pub fn from_driver(root: &Path) -> Self {
        let entries = std::fs::read_dir(root.join("proc/driver/nvidia/gpus")).into_iter().flatten().flatten();
        let found = entries.filter_map(|entry| {
            let address = PciAddress::parse(entry.file_name().to_str()?)?;
            let information = std::fs::read_to_string(entry.path().join("information")).ok()?;
            let uuid = information.lines().find_map(|line| line.strip_prefix("GPU UUID:"))?.trim().to_owned();
            Some((address, uuid))
        });
        let mut found: Vec<(PciAddress, String)> = found.collect();
        found.sort();
        let gpu = |(index, (address, uuid))| Gpu { index, uuid, address, instances: Vec::new() };
        Self { gpus: found.into_iter().enumerate().map(gpu).collect() }
    }

    /// From `nvidia-smi -L`, in which the instances of a GPU follow its own line.
    fn add_instances(&mut self, list: &str) {
        let mut index = None;
        for line in list.lines() {
            let Some((before, rest)) = line.split_once("(UUID: ") else { continue };
            let uuid = rest.trim_end().trim_end_matches(')');
            if !line.starts_with(' ') {
                let number = before.strip_prefix("GPU ").and_then(|rest| rest.split(':').next());
                index = number.and_then(|number| number.parse::<usize>().ok());
            } else if let Some(gpu) = self.gpus.iter_mut().find(|gpu| Some(gpu.index) == index) {
                gpu.instances.push(uuid.to_owned());
            }
        }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.gpus.len()
    }

    /// The GPU that an entry of `CUDA_VISIBLE_DEVICES` means: a number in the order of the bus, the beginning of one UUID, or an
    /// instance of a GPU.
    #[must_use]
    pub fn find(&self, entry: &str) -> Option<&Gpu> {
        let entry = entry.trim();
        if let Ok(index) = entry.parse::<usize>() {
            return self.gpus.iter().find(|gpu| gpu.index == index);
        }
        if let Some(rest) = entry.strip_prefix("MIG-GPU-") {
            // The older form: UUID of the GPU, then its two kinds of instances.
            let uuid = format!("GPU-{}", rest.split('/').next().unwrap_or_default());
            return self.gpus.iter().find(|gpu| gpu.uuid == uuid);
        }
        if entry.starts_with("MIG-") {
            return self.gpus.iter().find(|gpu| gpu.instances.iter().any(|instance| instance == entry));
        }
        let mut named = self.gpus.iter().filter(|gpu| entry.len() > "GPU-".len() && gpu.uuid.starts_with(entry));
        named.next().filter(|_| named.next().is_none())
    }
}

/// What `program` answers; `None` if it is not there, fails, or takes longer than `limit`.
async fn ask(program: &Path, arguments: &[&str], limit: Duration) -> Option<String> {
    let mut spec = ChildSpec::new("nvidia-smi", program).arguments(arguments.iter().copied());
    spec.stdout = Output::Piped;
    let child = spawn(spec).await.inspect_err(|error| debug!(%error, "GPUs are not asked for.")).ok()?;
    let stdout = child.take_stdout().ok().flatten()?;
    let mut answer = String::new();
    let asked = async {
        stdout.take(NVIDIA_SMI_MOST_BYTES).read_to_string(&mut answer).await.ok()?;
        Some(child.wait().await)
    };
    match tokio::time::timeout(limit, asked).await {
        Ok(Some(exit)) if exit.cause.code() == Some(0) => Some(answer),
        Ok(exit) => {
            debug!(?exit, "nvidia-smi failed.");
            None
        }
        Err(_) => {
            info!(?limit, "nvidia-smi did not answer.");
            // What waits in the kernel for the driver cannot be ended; it is told by the log.
            child.stop(&StopPlan::kill()).await.inspect_err(|error| debug!(%error, "nvidia-smi stays.")).ok();
            None
        }
    }
}

/// What lies next to a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbourhood {
    /// NUMA node.
    pub node: u32,
    /// CPUs of it, ascending, never empty.
    pub cpus: Vec<usize>,
}

/// The node of the device at `address` and its CPUs among `allowed`. `None` if the host does not show it: it has one node only,
/// is a virtual machine without the layout, or gives us none of the node's CPUs.
#[must_use]
pub fn neighbourhood(root: &Path, address: &PciAddress, allowed: &[usize]) -> Option<Neighbourhood> {
    let device = root.join("sys/bus/pci/devices").join(&address.0);
    // -1: the firmware does not say. The list of CPUs is that of all then, and says nothing either.
    let node: u32 = std::fs::read_to_string(device.join("numa_node")).ok()?.trim().parse().ok()?;
    let own = std::fs::read_to_string(device.join("local_cpulist")).ok();
    let list = own.filter(|list| !list.trim().is_empty()).or_else(|| {
        let of_node = root.join("sys/devices/system/node").join(format!("node{node}/cpulist"));
        std::fs::read_to_string(of_node).ok()
    })?;
    let near: BTreeSet<usize> = parse_cpu_list(&list)?.into_iter().collect();
    let cpus: Vec<usize> = allowed.iter().copied().filter(|cpu| near.contains(cpu)).collect();
    (!cpus.is_empty()).then_some(Neighbourhood { node, cpus })
}

/// CPUs of a list such as `0-3,8,10-11`; `None` if it is none.
#[must_use]
pub fn parse_cpu_list(list: &str) -> Option<Vec<usize>> {
    /// More than any kernel is built for.
    const MOST_CPUS: usize = 1 << 16;
    let list = list.trim();
    if list.is_empty() {
        return Some(Vec::new());
    }
    let mut cpus = BTreeSet::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= MOST_CPUS {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus.into_iter().collect())
}

/// CPUs that this process may use, ascending; empty if the kernel does not say.
#[must_use]
pub fn allowed_cpus() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else { return Vec::new() };
    (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect()
}

/// Shares of `cpus` for `count` children: disjoint and nearly equal, whole cores where there are enough of them, the threads of
/// a core where not, and the whole for everyone where there are more children than CPUs.
#[must_use]
pub fn even_shares(root: &Path, cpus: &[usize], count: usize) -> Vec<Vec<usize>> {
    let mut cores: Vec<Vec<usize>> = Vec::new();
    for &cpu in cpus {
        if cores.iter().any(|core| core.contains(&cpu)) {
            continue;
        }
        let topology = root.join(format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"));
        let siblings = std::fs::read_to_string(topology).ok().and_then(|list| parse_cpu_list(&list));
        let siblings = siblings.unwrap_or_default();
        cores.push(cpus.iter().copied().filter(|other| *other == cpu || siblings.contains(other)).collect());
    }
    if cores.len() < count {
        cores = cpus.iter().map(|cpu| vec![*cpu]).collect();
    }
    if cores.len() < count {
        return vec![cpus.to_vec(); count];
    }
    let share = |number: usize| {
        let place = |number: usize| number * cores.len() / count;
        let mut share: Vec<usize> = cores[place(number)..place(number + 1)].concat();
        share.sort_unstable();
        share
    };
    (0..count).map(share).collect()
}

/// Shares of CPUs for children that each have a neighbourhood or none: those with the same CPUs share them evenly, and who has
/// no neighbourhood gets no share.
#[must_use]
pub fn shares(root: &Path, places: &[Option<Neighbourhood>]) -> Vec<Vec<usize>> {
    let mut shares = vec![Vec::new(); places.len()];
    let distinct: BTreeSet<&[usize]> = places.iter().flatten().map(|place| place.cpus.as_slice()).collect();
    for cpus in distinct {
        let is_here = |place: &Option<Neighbourhood>| place.as_ref().is_some_and(|place| place.cpus == cpus);
        let here: Vec<usize> = (0..places.len()).filter(|child| is_here(&places[*child])).collect();
        for (child, share) in here.iter().zip(even_shares(root, cpus, here.len())) {
            shares[*child] = share;
        }
    }
    shares
}

#[cfg(test)]
#[path = "placement_tests.rs"]
mod tests;
