//! Rows that are made up, and golden files.

use grail_protocol::binding::{CommitBinding, commitments_hash};
use grail_protocol::hash::token_hash;
use grail_protocol::ids::{BlockHash, BlockNumber, CheckpointWindow, GroupIndex, RolloutIndex, TokenId, WindowStart};
use grail_protocol::keys::Keypair;
use grail_protocol::randomness::MinerRandomness;
use grail_protocol::window_file::{Commit, Header, Rollout, Row, WindowFile, read_bytes};

pub const WINDOW: u64 = 3_600_000;
pub const BLOCK_HASH: &str = "0x6049b61fa07f040040b2b7411fc90c324230932b72bc3c2b4b2986ee14847f77";

pub fn window() -> WindowStart {
    WindowStart::containing(BlockNumber(WINDOW))
}

pub fn keypair() -> Keypair {
    Keypair::from_uri("//Alice").unwrap()
}

pub fn header() -> Header {
    Header { wallet: keypair().hotkey().clone(), window: window(), timestamp: 1_732_301_234.25 }
}

/// A signed row whose tokens, sketches and logprobs follow from `seed`.
pub fn row(group: i64, rollout: u8, prompt: u32, completion: u32) -> Row {
    let seed = u32::try_from(group.rem_euclid(1000)).unwrap() * 16 + u32::from(rollout);
    let mix =
        |index: u32, salt: u32| (index + 1).wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(salt)) >> 1;
    let length = prompt + completion;
    let tokens: Vec<TokenId> = (0..prompt)
        .map(|index| TokenId(index % 400))
        .chain((0..completion).map(|index| TokenId(mix(index, 40_503) % 400)))
        .collect();
    let sketches: Vec<u32> = (0..length).map(|index| mix(index, 97) % 2_147_483_647).collect();
    let reward = f64::from(rollout % 2);
    let commit = Commit {
        tokens,
        sketches,
        model_name: "tiny/qwen3-tied".to_owned(),
        signature: String::new(),
        randomness: MinerRandomness::from_bytes(&[0xA5; 32]),
        rollout: Rollout {
            total_reward: reward,
            advantage: 2.0 * reward - 1.0,
            success: reward > 0.0,
            completion_logprobs: (0..completion).map(|index| -0.125 * (mix(index, 7) % 64) as f32).collect(),
            prompt_length: prompt,
        },
    };
    let mut row = Row {
        window: window(),
        block: BlockNumber(WINDOW + 3),
        block_hash: BlockHash(BLOCK_HASH.to_owned()),
        use_drand: true,
        group: GroupIndex(group),
        rollout: RolloutIndex::new(rollout).unwrap(),
        checkpoint: CheckpointWindow(WINDOW - 30),
        commit,
        timestamp: 1_732_301_200.5,
        hotkey: keypair().hotkey().clone(),
        signature: String::new(),
    };
    sign(&mut row);
    row
}

/// Signs commit and row anew.
pub fn sign(row: &mut Row) {
    let pair = keypair();
    let (tokens, sketches) = (token_hash(&row.commit.tokens), commitments_hash(&row.commit.sketches));
    let randomness = row.commit.randomness.to_bytes();
    let digest = CommitBinding::new(&tokens, &randomness, &row.commit.model_name, &sketches).digest();
    row.commit.signature = pair.sign(&digest).to_string();
    row.signature = pair.sign(row.challenge().as_bytes()).to_string();
}

/// Whole groups of 16 rows.
pub fn rows(groups: std::ops::Range<i64>, prompt: u32, completion: u32) -> Vec<Row> {
    groups.flat_map(|group| RolloutIndex::all().map(move |index| row(group, index.get(), prompt, completion))).collect()
}

pub fn golden(name: &str) -> WindowFile {
    read_bytes(golden_bytes(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

pub fn golden_bytes(name: &str) -> Vec<u8> {
    grail_golden::bytes(&format!("protocol/windows/{name}.parquet"))
}
