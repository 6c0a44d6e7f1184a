//! Which GPUs the generation server and the proof workers get, checked against those that are visible. Pure.

use std::collections::BTreeMap;

use super::origin::{Origin, Sourced};

/// What `CUDA_VISIBLE_DEVICES` says to a process on a host with `physical` GPUs, as entries that it may be set to for a
/// child: numbers or UUIDs. As in CUDA, the list ends at the first entry that names no GPU.
#[must_use]
pub fn visible_devices(cuda_visible_devices: Option<&str>, physical: usize) -> Vec<String> {
    let Some(list) = cuda_visible_devices else {
        return (0..physical).map(|index| index.to_string()).collect();
    };
    let names_a_device = |entry: &&str| match entry.parse::<usize>() {
        Ok(index) => index < physical,
        Err(_) => entry.starts_with("GPU-") || entry.starts_with("MIG-"),
    };
    list.split(',').map(str::trim).take_while(names_a_device).map(str::to_owned).collect()
}

/// The GPUs that a configuration asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct GpuRequest {
    /// `None` if the generation server needs no GPU of this host.
    pub generation: Option<GenerationGpus>,
    pub proof: ProofGpus,
}

/// GPUs of the generation server: `first` and those after it.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationGpus {
    pub first: Sourced<u32>,
    pub count: Sourced<u32>,
}

/// GPUs of the proof workers.
#[derive(Debug, Clone, PartialEq)]
pub enum ProofGpus {
    /// `GRAIL_PIPELINE_PROOF_GPU_IDS`: one worker each.
    List(Sourced<Vec<u32>>),
    /// `GRAIL_PIPELINE_PROOF_GPU`: one worker.
    Single(Sourced<u32>),
}

impl ProofGpus {
    const fn variable(&self) -> &'static str {
        match self {
            Self::List(_) => "GRAIL_PIPELINE_PROOF_GPU_IDS",
            Self::Single(_) => "GRAIL_PIPELINE_PROOF_GPU",
        }
    }

    fn indices(&self) -> &[u32] {
        match self {
            Self::List(list) => &list.value,
            Self::Single(single) => std::slice::from_ref(&single.value),
        }
    }

    const fn origin(&self) -> &Origin {
        match self {
            Self::List(list) => &list.origin,
            Self::Single(single) => &single.origin,
        }
    }
}

/// Entries for `CUDA_VISIBLE_DEVICES` of the children.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuLayout {
    /// In the order of the ranks; empty if the server needs none.
    pub generation: Vec<String>,
    /// One entry per proof worker.
    pub proof: Vec<String>,
}

/// A GPU that cannot be used as configured. Every text carries the word that operators of the reference look for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuProblem {
    #[error(
        "ProtocolViolationError: {variable} ({origin}) asks for GPU {index}, but {} visible; {}",
        count_text(*count), range_text(*count)
    )]
    NotVisible { variable: &'static str, origin: Origin, index: u64, count: usize },
    #[error(
        "ProtocolViolationError: {variable} ({origin}) asks for GPU {index}, which the generation server has \
         (GRAIL_PIPELINE_VLLM_GPU and GRAIL_PIPELINE_VLLM_TP); {} visible, give the proof workers others",
        count_text(*count)
    )]
    Shared { variable: &'static str, origin: Origin, index: u64, count: usize },
    #[error("ProtocolViolationError: {variable} ({origin}) asks twice for GPU {index}; {} visible, name each once", count_text(*count))]
    Twice { variable: &'static str, origin: Origin, index: u64, count: usize },
}

fn count_text(count: usize) -> String {
    if count == 1 { "1 GPU is".to_owned() } else { format!("{count} GPUs are") }
}

fn range_text(count: usize) -> String {
    match count {
        0 => "check the driver and CUDA_VISIBLE_DEVICES, or mine on the CPU with --local".to_owned(),
        1 => "only 0 may be used: a generation server and proofs on GPUs need two".to_owned(),
        _ => format!("use numbers from 0 to {}, counted within CUDA_VISIBLE_DEVICES", count - 1),
    }
}

/// Holds a request against the visible devices.
///
/// # Errors
/// Every GPU that is not visible, asked for twice, or wanted by generation and proofs alike.
pub fn gpu_layout(visible: &[String], request: &GpuRequest) -> Result<GpuLayout, Vec<GpuProblem>> {
    let count = visible.len();
    let mut problems = Vec::new();
    let device = |index: u64| usize::try_from(index).ok().and_then(|index| visible.get(index)).cloned();
    let mut generation = BTreeMap::new();
    if let Some(gpus) = &request.generation {
        let first = u64::from(gpus.first.value);
        for index in first..first + u64::from(gpus.count.value) {
            // The first GPU is the one variable's matter, those after it the other's.
            let (variable, origin) = if index == first {
                ("GRAIL_PIPELINE_VLLM_GPU", gpus.first.origin.clone())
            } else {
                ("GRAIL_PIPELINE_VLLM_TP", gpus.count.origin.clone())
            };
            match device(index) {
                Some(entry) => drop(generation.insert(index, entry)),
                None => problems.push(GpuProblem::NotVisible { variable, origin, index, count }),
            }
        }
    }
    let (variable, origin) = (request.proof.variable(), request.proof.origin());
    let mut proof = Vec::new();
    let mut seen = Vec::new();
    for index in request.proof.indices().iter().copied().map(u64::from) {
        let origin = origin.clone();
        match device(index) {
            None => problems.push(GpuProblem::NotVisible { variable, origin, index, count }),
            Some(_) if generation.contains_key(&index) => {
                problems.push(GpuProblem::Shared { variable, origin, index, count });
            }
            Some(_) if seen.contains(&index) => problems.push(GpuProblem::Twice { variable, origin, index, count }),
            Some(entry) => proof.push(entry),
        }
        seen.push(index);
    }
    if problems.is_empty() {
        Ok(GpuLayout { generation: generation.into_values().collect(), proof })
    } else {
        Err(problems)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sourced<T>(value: T) -> Sourced<T> {
        Sourced { value, origin: Origin::Default }
    }

    fn generation(first: u32, count: u32) -> Option<GenerationGpus> {
        Some(GenerationGpus { first: sourced(first), count: sourced(count) })
    }

    fn list(indices: &[u32]) -> ProofGpus {
        ProofGpus::List(sourced(indices.to_vec()))
    }

    fn single(index: u32) -> ProofGpus {
        ProofGpus::Single(sourced(index))
    }

    /// Visible devices, what generation and proofs ask for, and the refused variables with the GPU of each.
    type Case = (usize, Option<GenerationGpus>, ProofGpus, &'static [(&'static str, u64)]);

    #[test]
    fn the_visible_list_follows_cuda() {
        for (variable, physical, expected) in [
            (None, 2, &["0", "1"][..]),
            (Some(""), 2, &[]),
            (Some("1,0"), 2, &["1", "0"]),
            (Some(" 1 , 0 "), 2, &["1", "0"]),
            (Some("1,5,0"), 2, &["1"]),
            (Some("-1"), 2, &[]),
            (Some("GPU-8932f937,MIG-GPU-1/2/3"), 2, &["GPU-8932f937", "MIG-GPU-1/2/3"]),
            (Some("none"), 2, &[]),
        ] {
            assert_eq!(visible_devices(variable, physical), expected, "{variable:?}");
        }
    }

    #[test]
    fn layouts_of_the_guide() {
        for (visible, generation, proof, expected) in [
            (2, generation(0, 1), single(1), (vec!["0"], vec!["1"])),
            (8, generation(0, 4), list(&[4, 5, 6, 7]), (vec!["0", "1", "2", "3"], vec!["4", "5", "6", "7"])),
            (4, generation(2, 2), list(&[1, 0]), (vec!["2", "3"], vec!["1", "0"])),
            (1, None, single(0), (vec![], vec!["0"])),
        ] {
            let devices = visible_devices(None, visible);
            let layout = gpu_layout(&devices, &GpuRequest { generation, proof }).unwrap();
            assert_eq!(
                (layout.generation, layout.proof),
                (
                    expected.0.into_iter().map(str::to_owned).collect(),
                    expected.1.into_iter().map(str::to_owned).collect(),
                )
            );
        }
    }

    #[test]
    fn devices_are_passed_on_by_the_names_they_have() {
        let devices = ["GPU-a".to_owned(), "7".to_owned()];
        let layout = gpu_layout(&devices, &GpuRequest { generation: generation(1, 1), proof: single(0) }).unwrap();
        assert_eq!((layout.generation, layout.proof), (vec!["7".to_owned()], vec!["GPU-a".to_owned()]));
    }

    #[test]
    fn every_gpu_that_cannot_be_used_is_named() {
        let cases: [Case; 8] = [
            (1, generation(0, 1), single(1), &[("GRAIL_PIPELINE_PROOF_GPU", 1)]),
            (0, generation(0, 1), single(1), &[("GRAIL_PIPELINE_VLLM_GPU", 0), ("GRAIL_PIPELINE_PROOF_GPU", 1)]),
            (4, generation(2, 4), list(&[0]), &[("GRAIL_PIPELINE_VLLM_TP", 4), ("GRAIL_PIPELINE_VLLM_TP", 5)]),
            (2, generation(5, 1), single(0), &[("GRAIL_PIPELINE_VLLM_GPU", 5)]),
            (8, generation(0, 4), list(&[3, 4]), &[("GRAIL_PIPELINE_PROOF_GPU_IDS", 3)]),
            (
                8,
                generation(0, 4),
                list(&[4, 8, 9]),
                &[("GRAIL_PIPELINE_PROOF_GPU_IDS", 8), ("GRAIL_PIPELINE_PROOF_GPU_IDS", 9)],
            ),
            (2, generation(0, 1), single(0), &[("GRAIL_PIPELINE_PROOF_GPU", 0)]),
            (3, generation(0, 1), list(&[1, 1]), &[("GRAIL_PIPELINE_PROOF_GPU_IDS", 1)]),
        ];
        for (visible, generation, proof, expected) in cases {
            let devices = visible_devices(None, visible);
            let problems = gpu_layout(&devices, &GpuRequest { generation, proof }).unwrap_err();
            let found: Vec<(&str, u64)> = problems
                .iter()
                .map(|problem| match problem {
                    GpuProblem::NotVisible { variable, index, .. }
                    | GpuProblem::Shared { variable, index, .. }
                    | GpuProblem::Twice { variable, index, .. } => (*variable, *index),
                })
                .collect();
            assert_eq!(found, expected);
            for problem in problems {
                let text = problem.to_string();
                let (variable, index) = found.iter().find(|(variable, _)| text.contains(variable)).unwrap();
                let visible = if visible == 1 { "1 GPU is".to_owned() } else { format!("{visible} GPUs are") };
                for part in ["ProtocolViolationError", variable, &visible] {
                    assert!(text.contains(part), "{text}: {part}, {index}");
                }
            }
        }
    }

    #[test]
    fn the_text_says_what_to_do() {
        let devices = visible_devices(None, 4);
        let request = GpuRequest { generation: generation(0, 1), proof: list(&[9]) };
        assert_eq!(
            gpu_layout(&devices, &request).unwrap_err()[0].to_string(),
            "ProtocolViolationError: GRAIL_PIPELINE_PROOF_GPU_IDS (default) asks for GPU 9, but 4 GPUs are visible; \
             use numbers from 0 to 3, counted within CUDA_VISIBLE_DEVICES"
        );
    }
}
