//! Sealing and reading a window file of 5,000 rollouts of 1,000 tokens.
//!
//! Budget on two cores: sealed within 1 s and 0.5 GiB beside the rows, read back within 1.5 s. Run with
//! `cargo bench -p grail-protocol --bench window_file`; the peak of resident memory over the rows is printed first.

use std::hint::black_box;

use divan::Bencher;
use grail_protocol::ids::{
    BlockHash, BlockNumber, CheckpointWindow, GroupIndex, Hotkey, RolloutIndex, TokenId, WindowStart,
};
use grail_protocol::randomness::MinerRandomness;
use grail_protocol::validation::{group_digests, groups};
use grail_protocol::window_file::{Commit, Header, Rollout, Row, read_bytes, write_file};

const GROUPS: i64 = 313;
const PROMPT: u32 = 200;
const COMPLETION: u32 = 800;

/// Numbers as a proof makes them: sketches and logprobs of no pattern, tokens of a large vocabulary.
fn rows() -> Vec<Row> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u32::try_from(state >> 33).expect("31 bits are left")
    };
    let mut rows = Vec::new();
    for group in 0..GROUPS {
        let prompt: Vec<TokenId> = (0..PROMPT).map(|_| TokenId(random() % 151_936)).collect();
        for index in RolloutIndex::all() {
            let completion = (0..COMPLETION).map(|_| TokenId(random() % 151_936));
            let commit = Commit {
                tokens: prompt.iter().copied().chain(completion).collect(),
                sketches: (0..PROMPT + COMPLETION).map(|_| random() % 2_147_483_647).collect(),
                model_name: "Qwen/Qwen3-4B-Instruct-2507".to_owned(),
                signature: "5a".repeat(64),
                randomness: MinerRandomness::from_bytes(&[0xA5; 32]),
                rollout: Rollout {
                    total_reward: 0.5,
                    advantage: 0.25,
                    success: true,
                    completion_logprobs: (0..COMPLETION).map(|_| -(random() as f32) / 1e8).collect(),
                    prompt_length: PROMPT,
                },
            };
            rows.push(Row {
                window: WindowStart::containing(BlockNumber(3_600_000)),
                block: BlockNumber(3_600_003),
                block_hash: BlockHash("0x6049b61fa07f040040b2b7411fc90c324230932b72bc3c2b4b2986ee14847f77".to_owned()),
                use_drand: true,
                group: GroupIndex(group),
                rollout: index,
                checkpoint: CheckpointWindow(3_599_970),
                commit,
                timestamp: 1_732_301_200.5,
                hotkey: Hotkey("5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY".to_owned()),
                signature: "a5".repeat(64),
            });
        }
    }
    rows
}

fn header() -> Header {
    Header {
        wallet: Hotkey("5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY".to_owned()),
        window: WindowStart::containing(BlockNumber(3_600_000)),
        timestamp: 1_732_301_234.25,
    }
}

fn sealed(rows: &[Row]) -> Vec<u8> {
    write_file(Vec::new(), header(), rows).expect("the rows are well formed")
}

#[divan::bench(sample_count = 5, sample_size = 1)]
fn seal(bencher: Bencher) {
    let rows = rows();
    bencher.bench(|| sealed(black_box(&rows)));
}

#[divan::bench(sample_count = 5, sample_size = 1)]
fn read_back(bencher: Bencher) {
    let file = sealed(&rows());
    bencher.with_inputs(|| file.clone()).bench_values(|file| read_bytes(file).expect("the file was just written"));
}

/// What sampling costs a validator: the canonical JSON of every commit.
#[divan::bench(sample_count = 3, sample_size = 1)]
fn digest_groups(bencher: Bencher) {
    let file = read_bytes(sealed(&rows())).expect("the file was just written");
    let groups = groups(&file.rows);
    bencher.bench(|| group_digests(black_box(&file.rows), &groups));
}

/// A number of `/proc/self/status` in MiB: `VmRSS` is the memory now, `VmHWM` its peak.
fn memory_mib(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

fn main() {
    // Writing 5 there makes the kernel forget the peak so far; where it may not, the peak includes making the rows.
    let reset_peak = || drop(std::fs::write("/proc/self/clear_refs", "5"));
    let rows = rows();
    reset_peak();
    let before = memory_mib("VmRSS");
    let file = sealed(&rows);
    println!(
        "seal: file {} MiB, peak {} MiB over the rows",
        file.len() >> 20,
        memory_mib("VmHWM").saturating_sub(before)
    );
    drop(rows);
    reset_peak();
    let before = memory_mib("VmRSS");
    let read = read_bytes(file).expect("the file was just written");
    println!("read: {} rows, peak {} MiB over the file", read.rows.len(), memory_mib("VmHWM").saturating_sub(before));
    drop(read);
    divan::main();
}
