//! A host with two sockets, eight GPUs and two threads a core, as files; and the CPUs of this one.

use std::fs;

use super::*;

/// CPUs of a socket: 8 cores, the second threads of all cores after the first ones of all.
const SOCKETS: [&str; 2] = ["0-7,16-23", "8-15,24-31"];

/// Bus of each GPU: four on either socket. The driver's folder does not list them in this order.
const BUSES: [u32; 8] = [0x07, 0x0f, 0x47, 0x4e, 0x87, 0x90, 0xb7, 0xbd];

fn uuid(index: usize) -> String {
    format!("GPU-{index}a2b3c4d-0000-4000-8000-00000000000{index}")
}

/// GPU 2 does not say its node and GPU 5 not its CPUs.
fn host() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let write = |path: String, text: &str| {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    for (index, bus) in BUSES.iter().enumerate() {
        let address = format!("0000:{bus:02x}:00.0");
        let information =
            format!("Model: \t\t NVIDIA A100-SXM4-80GB\nGPU UUID: \t {}\nBus Type: \t PCIe\n", uuid(index));
        write(format!("proc/driver/nvidia/gpus/{address}/information"), &information);
        let socket = index / 4;
        let node = if index == 2 { "-1".to_owned() } else { socket.to_string() };
        write(format!("sys/bus/pci/devices/{address}/numa_node"), &format!("{node}\n"));
        if index != 5 {
            write(format!("sys/bus/pci/devices/{address}/local_cpulist"), &format!("{}\n", SOCKETS[socket]));
        }
    }
    for (node, cpus) in SOCKETS.iter().enumerate() {
        write(format!("sys/devices/system/node/node{node}/cpulist"), &format!("{cpus}\n"));
    }
    for cpu in 0..32 {
        let first = cpu % 16;
        let siblings = format!("{first},{}\n", first + 16);
        write(format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"), &siblings);
    }
    root
}

fn query() -> String {
    let line = |(index, bus): (usize, &u32)| format!("{index}, {}, 00000000:{bus:02X}:00.0\n", uuid(index));
    BUSES.iter().enumerate().rev().map(line).collect()
}

fn all_cpus() -> Vec<usize> {
    (0..32).collect()
}

#[test]
fn both_sources_give_the_same_gpus_in_the_order_of_the_bus() {
    let host = host();
    let driver = Inventory::from_driver(host.path());
    assert_eq!(driver.count(), 8);
    assert_eq!(driver.gpus[4].address.to_string(), "0000:87:00.0");
    assert_eq!(Inventory::from_query(&query()), driver);
    let broken = "0, GPU-a, 00000000:07:00.0\nUnable to determine the device handle\n1, GPU-b, nonsense\n\n";
    assert_eq!(Inventory::from_query(broken).count(), 1);
    assert_eq!(Inventory::from_driver(&host.path().join("nowhere")), Inventory::default());
}

#[test]
fn addresses_are_written_as_the_kernel_does() {
    for (text, expected) in [
        ("00000000:17:00.0", Some("0000:17:00.0")),
        ("0000:BD:1F.7", Some("0000:bd:1f.7")),
        ("00010000:01:00.0", Some("10000:01:00.0")),
        ("17:00.0", None),
        ("0000:17:00", None),
        ("0000:100:00.0", None),
        ("0000:17:20.0", None),
        ("0000:17:00.8", None),
        ("0000:17:00.0:1", None),
        ("", None),
    ] {
        assert_eq!(PciAddress::parse(text).map(|address| address.to_string()).as_deref(), expected, "{text}");
    }
}

#[test]
fn an_entry_finds_its_gpu() {
    let mut inventory = Inventory::from_query(&query());
    inventory.add_instances(&format!(
        "GPU 0: NVIDIA A100 (UUID: {})\nGPU 3: NVIDIA A100 (UUID: {})\n  MIG 3g.40gb     Device  0: (UUID: MIG-11)\n  \
         MIG 3g.40gb     Device  1: (UUID: MIG-12)\nGPU 4: NVIDIA A100 (UUID: {})\n",
        uuid(0),
        uuid(3),
        uuid(4)
    ));
    let old_form = format!("MIG-{}/1/0", uuid(6));
    for (entry, expected) in [
        ("5", Some(5)),
        (" 5 ", Some(5)),
        ("8", None),
        ("-1", None),
        (uuid(7).as_str(), Some(7)),
        ("GPU-7a2b", Some(7)),
        ("GPU-", None),
        ("GPU-ffff", None),
        ("MIG-11", Some(3)),
        ("MIG-12", Some(3)),
        ("MIG-1", None),
        (old_form.as_str(), Some(6)),
        ("", None),
    ] {
        assert_eq!(inventory.find(entry).map(|gpu| gpu.index), expected, "{entry:?}");
    }
    inventory.gpus[1].uuid = format!("{}x", uuid(7));
    assert_eq!(inventory.find("GPU-7a2b"), None, "two GPUs begin so");
}

#[test]
fn neighbours_are_those_of_the_node_that_we_may_use() {
    let host = host();
    let inventory = Inventory::from_driver(host.path());
    let near = |index: usize, allowed: &[usize]| neighbourhood(host.path(), &inventory.gpus[index].address, allowed);
    let cpus = |socket: usize| parse_cpu_list(SOCKETS[socket]).unwrap();
    assert_eq!(near(0, &all_cpus()), Some(Neighbourhood { node: 0, cpus: cpus(0) }));
    assert_eq!(near(4, &all_cpus()), Some(Neighbourhood { node: 1, cpus: cpus(1) }));
    assert_eq!(near(5, &all_cpus()), Some(Neighbourhood { node: 1, cpus: cpus(1) }), "by its node");
    assert_eq!(near(2, &all_cpus()), None, "node -1");
    assert_eq!(near(4, &[3, 9, 25, 40]), Some(Neighbourhood { node: 1, cpus: vec![9, 25] }));
    assert_eq!(near(4, &[0, 1]), None, "none of its CPUs is ours");
    let missing = PciAddress::parse("0000:ff:00.0").unwrap();
    assert_eq!(neighbourhood(host.path(), &missing, &all_cpus()), None);
}

#[test]
fn neighbours_share_whole_cores() {
    let host = host();
    let inventory = Inventory::from_driver(host.path());
    let allowed = all_cpus();
    let places: Vec<Option<Neighbourhood>> =
        (0..8).map(|index| neighbourhood(host.path(), &inventory.gpus[index].address, &allowed)).collect();
    let shares = shares(host.path(), &places);
    let expected: [&[usize]; 8] = [
        // Three GPUs of the first socket have its eight cores.
        &[0, 1, 16, 17],
        &[2, 3, 4, 18, 19, 20],
        &[],
        &[5, 6, 7, 21, 22, 23],
        &[8, 9, 24, 25],
        &[10, 11, 26, 27],
        &[12, 13, 28, 29],
        &[14, 15, 30, 31],
    ];
    assert_eq!(shares, expected.map(<[usize]>::to_vec));
}

#[test]
fn shares_are_disjoint_as_long_as_there_are_enough() {
    let host = host();
    let shares = |cpus: &[usize], count| even_shares(host.path(), cpus, count);
    assert_eq!(shares(&[0, 1, 16, 17], 2), [vec![0, 16], vec![1, 17]], "cores");
    assert_eq!(shares(&[0, 1, 16, 17], 3), [vec![0], vec![1], vec![16, 17]], "threads");
    assert_eq!(shares(&[0, 16], 3), vec![vec![0, 16]; 3], "all for everyone");
    assert_eq!(shares(&[3], 1), [vec![3]]);
    assert_eq!(shares(&[3], 0), Vec::<Vec<usize>>::new());
    // A host that does not tell its topology.
    assert_eq!(even_shares(Path::new("/nonexistent"), &[4, 5, 6], 2), [vec![4], vec![5, 6]]);
}

#[test]
fn lists_of_cpus() {
    for (list, expected) in [
        ("0-3,8,10-11\n", Some(vec![0, 1, 2, 3, 8, 10, 11])),
        ("5", Some(vec![5])),
        ("", Some(vec![])),
        ("3-1", None),
        ("a", None),
        ("0-99999999999", None),
        ("1,,2", None),
    ] {
        assert_eq!(parse_cpu_list(list), expected, "{list:?}");
    }
}

#[test]
fn we_may_use_a_cpu() {
    let allowed = allowed_cpus();
    assert!(!allowed.is_empty() && allowed.is_sorted());
}

/// A program that stands for `nvidia-smi`.
fn program(folder: &Path, script: &str) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join("nvidia-smi");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test]
async fn the_tool_is_asked_first_and_the_driver_when_it_fails() {
    let host = host();
    let works = program(
        host.path(),
        "case $1 in -L) printf 'GPU 0: X (UUID: GPU-z)\\n  MIG 1g Device 0: (UUID: MIG-z)\\n';; \
         *) echo '0, GPU-z, 00000000:07:00.0';; esac",
    );
    let inventory = Inventory::read(host.path(), &works).await;
    assert_eq!(inventory.count(), 1);
    assert_eq!(inventory.find("MIG-z").map(|gpu| gpu.uuid.as_str()), Some("GPU-z"));
    let fails = program(host.path(), "echo '0, GPU-z, 00000000:07:00.0'; exit 9");
    assert_eq!(Inventory::read(host.path(), &fails).await.count(), 8);
    let hangs = program(host.path(), "exec sleep 1000");
    assert_eq!(ask(&hangs, &[], Duration::from_millis(20)).await, None);
    let missing = host.path().join("missing");
    assert_eq!(Inventory::read(host.path(), &missing).await.count(), 8);
    assert_eq!(Inventory::read(&missing, &missing).await, Inventory::default());
}
