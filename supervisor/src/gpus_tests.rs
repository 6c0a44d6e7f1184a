//! The examples of the miner's guide and what can be wrong with them, on hosts that are made up.

use std::collections::BTreeSet;
use std::fs;

use super::*;
use crate::config::{Config, EnvFile, Inputs, Mode};

/// What a network needs beside GPUs.
const NETWORK: &str = "R2_ACCOUNT_ID=0123456789abcdef0123456789abcdef\nR2_BUCKET_ID=0123456789abcdef0123456789abcdef\n\
    R2_READ_ACCESS_KEY_ID=a\nR2_READ_SECRET_ACCESS_KEY=b\nR2_WRITE_ACCESS_KEY_ID=c\nR2_WRITE_SECRET_ACCESS_KEY=d\n";

const TWO_GPUS: &str = "GRAIL_PIPELINE_BACKEND=sglang\nGRAIL_PIPELINE_VLLM_GPU=0\nGRAIL_PIPELINE_PROOF_GPU=1\n\
    GRAIL_PIPELINE_VLLM_TP=1\n";

const FOUR_GPUS: &str = "GRAIL_PIPELINE_VLLM_TP=2\nGRAIL_PIPELINE_PROOF_GPU_IDS=2,3\n";

const EIGHT_GPUS: &str = "GRAIL_PIPELINE_VLLM_GPU=0\nGRAIL_PIPELINE_VLLM_TP=4\nGRAIL_PIPELINE_PROOF_GPU=4\n\
    GRAIL_PIPELINE_PROOF_GPU_IDS=4,5,6,7\nGRAIL_PIPELINE_PROOF_SUBPROCESS=true\n";

fn uuid(index: usize) -> String {
    format!("GPU-{index}0000000-aaaa-4000-8000-000000000000")
}

/// A host with `count` GPUs, four on either socket.
fn host(count: usize, visible: Option<&str>) -> HostGpus {
    let line = |index: usize| format!("{index}, {}, 00000000:{:02X}:00.0\n", uuid(index), 0x10 * (index + 1));
    let query: String = (0..count).map(line).collect();
    HostGpus { inventory: Inventory::from_query(&query), visible: visible.map(str::to_owned), order: None }
}

fn request(env_file: &str) -> GpuRequest {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(".env"), format!("{NETWORK}{env_file}")).unwrap();
    let environment = [("HOME".into(), "/home/miner".into())].into_iter().collect();
    let inputs = Inputs { environment, env_file: EnvFile::InFolder(folder.path().to_owned()), flags: Vec::new() };
    Config::load(&inputs, Mode::Network).unwrap().gpu_request().unwrap()
}

#[test]
fn the_examples_of_the_guide_are_laid_out() {
    let all = "0,1,2,3,4,5,6,7";
    type Case = (&'static str, usize, Option<&'static str>, &'static [&'static str], &'static [&'static str]);
    let cases: [Case; 8] = [
        (TWO_GPUS, 2, Some("0,1"), &["0"], &["1"]),
        (TWO_GPUS, 8, Some("6,3"), &["6"], &["3"]),
        (FOUR_GPUS, 4, None, &["0", "1"], &["2", "3"]),
        (EIGHT_GPUS, 8, Some(all), &["0", "1", "2", "3"], &["4", "5", "6", "7"]),
        (EIGHT_GPUS, 8, None, &["0", "1", "2", "3"], &["4", "5", "6", "7"]),
        ("", 2, None, &["0"], &["1"]),
        // Numbers count within the list, whatever stands in it.
        ("", 8, Some("GPU-7,5"), &["GPU-7"], &["5"]),
        // With the builtin server one GPU is enough.
        ("GRAIL_PIPELINE_BACKEND=builtin\nGRAIL_PIPELINE_PROOF_GPU=0\n", 1, None, &[], &["0"]),
    ];
    for (env_file, count, visible, generation, proof) in cases {
        let layout = layout(&host(count, visible), &request(env_file)).unwrap();
        assert_eq!(layout.generation, generation, "{env_file} {visible:?}");
        assert_eq!(layout.proof, proof, "{env_file} {visible:?}");
    }
}

#[test]
fn everything_that_is_wrong_is_in_one_report() {
    // Each line of the report: a variable, an index and a count that it must name.
    type Line = (&'static str, usize, usize);
    type Case = (&'static str, usize, Option<&'static str>, &'static [Line]);
    let cases: [Case; 11] = [
        ("", 1, None, &[("BACKEND", 1, 1), ("PROOF_GPU", 1, 1)]),
        ("", 0, None, &[("BACKEND", 0, 0), ("VLLM_GPU", 0, 0), ("PROOF_GPU", 1, 0)]),
        ("", 8, Some(""), &[("BACKEND", 0, 0), ("VLLM_GPU", 0, 0), ("PROOF_GPU", 1, 0)]),
        (EIGHT_GPUS, 8, Some("0,1,2,3,4,5"), &[("PROOF_GPU_IDS", 6, 6), ("PROOF_GPU_IDS", 7, 6)]),
        (
            EIGHT_GPUS,
            2,
            None,
            &[
                ("VLLM_TP", 2, 2),
                ("VLLM_TP", 3, 2),
                ("PROOF_GPU_IDS", 4, 2),
                ("PROOF_GPU_IDS", 5, 2),
                ("PROOF_GPU_IDS", 6, 2),
                ("PROOF_GPU_IDS", 7, 2),
            ],
        ),
        (
            "GRAIL_PIPELINE_VLLM_TP=3\nGRAIL_PIPELINE_PROOF_GPU_IDS=1,2,3\n",
            4,
            None,
            &[("PROOF_GPU_IDS", 1, 4), ("PROOF_GPU_IDS", 2, 4)],
        ),
        (TWO_GPUS, 8, Some("0,9"), &[("BACKEND", 1, 1), ("CUDA_VISIBLE_DEVICES", 1, 1), ("PROOF_GPU", 1, 1)]),
        (
            FOUR_GPUS,
            8,
            Some("0,1,GPU-f,3"),
            &[("CUDA_VISIBLE_DEVICES", 2, 2), ("PROOF_GPU_IDS", 2, 2), ("PROOF_GPU_IDS", 3, 2)],
        ),
        (TWO_GPUS, 8, Some("3,3"), &[("CUDA_VISIBLE_DEVICES", 1, 2)]),
        (TWO_GPUS, 8, Some("3,GPU-3"), &[("CUDA_VISIBLE_DEVICES", 1, 2)]),
        ("GRAIL_PIPELINE_BACKEND=builtin\n", 1, None, &[("PROOF_GPU", 1, 1)]),
    ];
    for (env_file, count, visible, expected) in cases {
        let error = layout(&host(count, visible), &request(env_file)).unwrap_err();
        let text = error.to_string();
        let lines: Vec<&str> = text.lines().skip(1).filter(|line| !line.contains("is it up?")).collect();
        assert_eq!(lines.len(), expected.len(), "{text}");
        for (line, (variable, index, count)) in lines.iter().zip(expected) {
            let visible = if *count == 1 { "1 GPU is visible".to_owned() } else { format!("{count} GPUs are visible") };
            let in_list = visible.replace("visible", "in it");
            assert!(line.contains("ProtocolViolationError") && line.contains(variable), "{line}: {variable}");
            assert!(line.contains(&format!("GPU {index}")), "{line}: {index}");
            assert!(line.contains(&visible) || line.contains(&in_list), "{line}: {visible}");
        }
    }
}

#[test]
fn a_driver_that_names_no_gpu_may_not_be_up_yet() {
    let error = |count, visible| layout(&host(count, visible), &request("")).unwrap_err();
    for visible in [None, Some("0,1")] {
        let bare = error(0, visible);
        assert!(bare.is_host_bare && bare.to_string().contains("is it up?"), "{bare}");
        assert_eq!(crate::commands::CommandError::from(bare).exit_code(), grail_process::ExitCode::Unavailable);
    }
    for chosen in [error(0, Some("")), error(1, None)] {
        assert!(!chosen.is_host_bare, "{chosen}");
        assert_eq!(crate::commands::CommandError::from(chosen).exit_code(), grail_process::ExitCode::Configuration);
    }
}

#[test]
fn the_report_reads_well() {
    let error = layout(&host(1, None), &request("")).unwrap_err();
    insta::assert_snapshot!(error, @r"
    the GPUs cannot be used as configured:
      ProtocolViolationError: GRAIL_PIPELINE_BACKEND asks for a generation server on this host, which with the proofs needs 2 GPUs at least, but 1 GPU is visible: there is no GPU 1; show more in CUDA_VISIBLE_DEVICES, or generate with GRAIL_PIPELINE_BACKEND=builtin
      ProtocolViolationError: GRAIL_PIPELINE_PROOF_GPU (default) asks for GPU 1, but 1 GPU is visible; only 0 may be used: a generation server and proofs on GPUs need two
    ");
}

#[test]
fn what_stops_nothing_is_told() {
    let warned =
        |visible, order: Option<&str>| warnings(&HostGpus { order: order.map(str::to_owned), ..host(2, visible) });
    assert_eq!(warned(Some("0,1"), Some("PCI_BUS_ID")), Vec::<String>::new());
    assert_eq!(warned(Some(""), None), Vec::<String>::new());
    let both = warned(Some("0,1,2"), Some("FASTEST_FIRST"));
    assert!(both.len() == 2 && both[0].contains("FASTEST_FIRST") && both[1].contains("\"2\""), "{both:?}");
}

/// The files of a host with two sockets of 8 CPUs; GPU 6 does not say its node.
fn sockets() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for index in 0..8 {
        let device = root.path().join(format!("sys/bus/pci/devices/0000:{:02x}:00.0", 0x10 * (index + 1)));
        fs::create_dir_all(&device).unwrap();
        let socket = index / 4;
        fs::write(device.join("numa_node"), if index == 6 { "-1".to_owned() } else { socket.to_string() }).unwrap();
        fs::write(device.join("local_cpulist"), ["0-7\n", "8-15\n"][socket]).unwrap();
    }
    root
}

#[test]
fn workers_of_one_socket_share_its_cpus() {
    let (root, host) = (sockets(), host(8, None));
    let allowed: Vec<usize> = (0..16).collect();
    let layout = layout(&host, &request(EIGHT_GPUS)).unwrap();
    let pins = pins_among(&allowed, &layout, &host, root.path());
    let pin = |entry: &str, cpus: &[usize], numa_node| SlotPin {
        device: "cuda:0".to_owned(),
        visible: Some(entry.to_owned()),
        cpus: cpus.to_vec(),
        numa_node,
    };
    let expected = [
        pin("4", &[8, 9], Some(1)),
        pin("5", &[10, 11, 12], Some(1)),
        pin("6", &[], None),
        pin("7", &[13, 14, 15], Some(1)),
    ];
    assert_eq!(pins, expected);
    let nothing_shown = slot_pins(&layout, &host, Path::new("/nonexistent"));
    assert!(nothing_shown.iter().all(|pin| pin.cpus.is_empty() && pin.numa_node.is_none() && pin.visible.is_some()));
}

#[test]
fn workers_on_the_cpu_share_ours() {
    let root = Path::new("/nonexistent");
    let cpus = |allowed: &[usize], slots| -> Vec<Vec<usize>> {
        cpu_pins_among(allowed, slots, root).into_iter().map(|pin| pin.cpus).collect()
    };
    assert_eq!(cpus(&[0, 1, 4], 2), [vec![0], vec![1, 4]]);
    assert_eq!(cpus(&[0, 1], 3), vec![Vec::<usize>::new(); 3]);
    let pins = cpu_pins(1, Path::new("/"));
    let all: BTreeSet<usize> = allowed_cpus().into_iter().collect();
    assert_eq!(pins[0].cpus.iter().copied().collect::<BTreeSet<_>>(), all);
    assert_eq!((pins[0].device.as_str(), &pins[0].visible), ("cpu", &None));
}
