//! The GPUs of this host held against what the configuration asks for, before anything starts; and where the workers of the
//! GPUs run. No CUDA context is made.

use std::fmt;
use std::path::Path;

use grail_process::placement::{self, Inventory, Neighbourhood, allowed_cpus, neighbourhood};

use crate::config::{GpuLayout, GpuProblem, GpuRequest, gpu_layout};
use crate::fleet::SlotPin;

/// The variables by which an operator shows GPUs to this process.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";
const ORDER: &str = "CUDA_DEVICE_ORDER";

/// The order in which numbers mean the same GPU to everyone.
const BUS_ORDER: &str = "PCI_BUS_ID";

/// GPUs that a generation server of this host and the proof workers need together, at least.
const LEAST_GPUS: usize = 2;

/// What this host has and shows.
#[derive(Debug, Clone, Default)]
pub struct HostGpus {
    pub inventory: Inventory,
    /// `CUDA_VISIBLE_DEVICES` as it was set, if it was.
    pub visible: Option<String>,
    /// `CUDA_DEVICE_ORDER` as it was set, if it was.
    pub order: Option<String>,
}

impl HostGpus {
    /// Looks at the host below `root`; `variable` gives the variables of other programs, from the environment or the `.env`
    /// file.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O enabled.
    pub async fn read(root: &Path, variable: impl Fn(&str) -> Option<String>) -> Self {
        let inventory = Inventory::read(root, Path::new("nvidia-smi")).await;
        Self { inventory, visible: variable(VISIBLE), order: variable(ORDER) }
    }

    /// The entries of the list that name a GPU, as they are passed on to children. As in CUDA, the list ends at the first entry
    /// that names none.
    fn devices(&self) -> Devices {
        let Some(list) = &self.visible else {
            let entries = (0..self.inventory.count()).map(|index| index.to_string()).collect();
            return Devices { entries, stray: None, twice: None };
        };
        let mut devices = Devices::default();
        let mut seen = Vec::new();
        // An empty list shows nothing, and is no stray entry.
        for entry in list.split(',').map(str::trim).filter(|_| !list.trim().is_empty()) {
            let Some(gpu) = self.inventory.find(entry) else {
                devices.stray = Some(entry.to_owned());
                break;
            };
            // Instances of one GPU are devices of their own.
            let key = if entry.starts_with("MIG-") { entry } else { gpu.uuid.as_str() };
            if seen.contains(&key) {
                devices.twice.get_or_insert_with(|| (devices.entries.len(), entry.to_owned()));
            }
            seen.push(key);
            devices.entries.push(entry.to_owned());
        }
        devices
    }
}

/// The usable beginning of `CUDA_VISIBLE_DEVICES`.
#[derive(Debug, Default)]
struct Devices {
    entries: Vec<String>,
    /// The entry that ended the list.
    stray: Option<String>,
    /// An entry, with its place, whose GPU an earlier one names too.
    twice: Option<(usize, String)>,
}

/// GPUs that cannot be used as configured: all that is wrong at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuError {
    /// Never empty.
    pub problems: Vec<HostProblem>,
    /// The driver names no GPU at all, and nobody hid them: it may not be up yet.
    pub is_host_bare: bool,
}

impl fmt::Display for GpuError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the GPUs cannot be used as configured:")?;
        self.problems.iter().try_for_each(|problem| write!(f, "\n  {problem}"))?;
        if self.is_host_bare {
            f.write_str("\n  the driver names no GPU of this host: is it up? `nvidia-smi -L` lists them")?;
        }
        Ok(())
    }
}

impl std::error::Error for GpuError {}

/// One thing that is wrong. Every text carries the word that operators of the reference look for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HostProblem {
    #[error(transparent)]
    Gpu(#[from] GpuProblem),
    #[error(
        "ProtocolViolationError: GRAIL_PIPELINE_BACKEND asks for a generation server on this host, which with the \
         proofs needs {LEAST_GPUS} GPUs at least, but {} visible: there is no GPU {count}; show more in \
         CUDA_VISIBLE_DEVICES, or generate with GRAIL_PIPELINE_BACKEND=builtin",
        are(*count)
    )]
    TooFew { count: usize },
    #[error(
        "ProtocolViolationError: CUDA_VISIBLE_DEVICES shows GPU {index} ({entry}) twice, for which CUDA shows none; \
         {} in it, name each once",
        are(*count)
    )]
    ShownTwice { index: usize, entry: String, count: usize },
    #[error(
        "ProtocolViolationError: CUDA_VISIBLE_DEVICES ends for CUDA at GPU {index} ({entry:?}), which is none of the \
         {physical} of this host: {} visible; `nvidia-smi -L` lists them",
        are(*count)
    )]
    Stray { index: usize, entry: String, physical: usize, count: usize },
}

fn are(count: usize) -> String {
    if count == 1 { "1 GPU is".to_owned() } else { format!("{count} GPUs are") }
}

/// Holds `request` against what the host shows.
///
/// # Errors
/// [`GpuError`] with everything that is wrong.
pub fn layout(host: &HostGpus, request: &GpuRequest) -> Result<GpuLayout, GpuError> {
    let Devices { entries, stray, twice } = host.devices();
    let count = entries.len();
    let mut problems = Vec::new();
    if let Some((index, entry)) = twice {
        problems.push(HostProblem::ShownTwice { index, entry, count });
    }
    if request.generation.is_some() && count < LEAST_GPUS {
        problems.push(HostProblem::TooFew { count });
    }
    let layout = match gpu_layout(&entries, request) {
        Ok(layout) if problems.is_empty() => return Ok(layout),
        Ok(_) => Vec::new(),
        Err(found) => found,
    };
    // An entry that ends the list matters only where something is missing behind it.
    let is_short = layout.iter().any(|problem| matches!(problem, GpuProblem::NotVisible { .. })) || count < LEAST_GPUS;
    if let Some(entry) = stray.filter(|_| is_short) {
        problems.push(HostProblem::Stray { index: count, entry, physical: host.inventory.count(), count });
    }
    problems.extend(layout.into_iter().map(HostProblem::Gpu));
    let is_hidden = host.visible.as_deref().is_some_and(|list| list.trim().is_empty());
    Err(GpuError { problems, is_host_bare: host.inventory.count() == 0 && !is_hidden })
}

/// What is worth telling at the start although it stops nothing.
#[must_use]
pub fn warnings(host: &HostGpus) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(order) = host.order.as_deref().filter(|order| *order != BUS_ORDER) {
        warnings
            .push(format!("{ORDER} is {order}; numbers of GPUs are counted by {BUS_ORDER} here and in all children"));
    }
    if let Some(entry) = host.devices().stray {
        warnings.push(format!("{VISIBLE} ends for CUDA at {entry:?}, which names no GPU of this host"));
    }
    warnings
}

/// Pins for the proof workers of `layout`: each with its GPU and an even share of the CPUs next to it.
#[must_use]
pub fn slot_pins(layout: &GpuLayout, host: &HostGpus, root: &Path) -> Vec<SlotPin> {
    pins_among(&allowed_cpus(), layout, host, root)
}

fn pins_among(allowed: &[usize], layout: &GpuLayout, host: &HostGpus, root: &Path) -> Vec<SlotPin> {
    let near = |entry: &String| {
        let gpu = host.inventory.find(entry)?;
        neighbourhood(root, &gpu.address, allowed)
    };
    let places: Vec<Option<Neighbourhood>> = layout.proof.iter().map(near).collect();
    let lost: Vec<&str> = layout
        .proof
        .iter()
        .zip(&places)
        .filter(|(_, place)| place.is_none())
        .map(|(entry, _)| entry.as_str())
        .collect();
    if !lost.is_empty() {
        tracing::info!(gpus = lost.join(","), "The host does not show which CPUs lie next to these GPUs; no pinning.");
    }
    let shares = placement::shares(root, &places);
    let slots = layout.proof.iter().zip(places).zip(shares);
    let pin = |((entry, place), cpus): ((&String, Option<Neighbourhood>), Vec<usize>)| SlotPin {
        device: "cuda:0".to_owned(),
        visible: Some(entry.clone()),
        cpus,
        numa_node: place.map(|place| place.node),
    };
    slots.map(pin).collect()
}

/// Pins for `slots` workers on the CPU: disjoint shares of our CPUs as long as there are enough, all of them else.
#[must_use]
pub fn cpu_pins(slots: usize, root: &Path) -> Vec<SlotPin> {
    cpu_pins_among(&allowed_cpus(), slots, root)
}

fn cpu_pins_among(allowed: &[usize], slots: usize, root: &Path) -> Vec<SlotPin> {
    if allowed.len() < slots {
        return vec![SlotPin::cpu(Vec::new()); slots];
    }
    placement::even_shares(root, allowed, slots).into_iter().map(SlotPin::cpu).collect()
}

#[cfg(test)]
#[path = "gpus_tests.rs"]
mod tests;
