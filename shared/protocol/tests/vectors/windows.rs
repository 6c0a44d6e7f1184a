//! Windows, nonces, randomness, seeds.

use grail_protocol::ids::{
    BlockHash, BlockNumber, EnvironmentSeed, GroupIndex, Hotkey, Nonce, RolloutIndex, WindowStart,
};
use grail_protocol::nonce::challenge_text;
use grail_protocol::randomness::{
    DRAND_CHAIN_HASH, DRAND_GENESIS_SECONDS, DRAND_PERIOD_SECONDS, MinerRandomness, drand_round_at, mix_challenge,
    mix_miner,
};
use grail_protocol::seed::environment_seed;
use grail_protocol::window::{challenge_block, validated_at};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WindowFile {
    windows: Vec<WindowCase>,
    nonces: Vec<NonceCase>,
    randomness: Vec<RandomnessCase>,
    drand_chain: DrandChain,
    drand_rounds: Vec<RoundCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WindowCase {
    block: u64,
    window_start: u64,
    validated_window: i64,
    challenge_block: u64,
}

impl WindowCase {
    fn check(&self) {
        let block = BlockNumber(self.block);
        assert_eq!(u64::from(WindowStart::containing(block)), self.window_start);
        match validated_at(block) {
            Some(validated) => {
                assert_eq!(Ok(u64::from(validated)), u64::try_from(self.validated_window));
                assert_eq!(challenge_block(validated).0, self.challenge_block);
            }
            None => assert_eq!((self.validated_window, self.challenge_block), (-30, 0), "before the first window"),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NonceCase {
    group: i64,
    index: u8,
    nonce: i64,
    challenge: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RandomnessCase {
    block_hash: BlockHash,
    drand: String,
    miner_randomness: String,
    validator_randomness_same_hash: String,
    validator_no_drand: String,
    miner_no_drand_reference: String,
    miner_no_drand_passes_schema: bool,
}

impl RandomnessCase {
    fn check(&self) {
        assert_eq!(mix_miner(&self.block_hash, Some(&self.drand)).as_hex(), self.miner_randomness);
        let challenge = mix_challenge(&self.block_hash, Some(&self.drand));
        assert_eq!(challenge.as_hex(), self.validator_randomness_same_hash);
        assert_eq!(mix_challenge(&self.block_hash, None).as_hex(), self.validator_no_drand);
        // The reference's own value without drand is refused by validators, so ours is another.
        assert_eq!(self.miner_no_drand_reference, self.block_hash.0);
        let reference_is_usable = self.miner_no_drand_reference.parse::<MinerRandomness>().is_ok();
        assert_eq!(reference_is_usable, self.miner_no_drand_passes_schema);
        assert_eq!(mix_miner(&self.block_hash, None).as_hex(), self.validator_no_drand);
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DrandChain {
    hash: String,
    genesis_time: u64,
    period: u64,
    description: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RoundCase {
    time: u64,
    round: u64,
}

#[test]
fn windows_nonces_and_randomness() {
    const FILE: &str = "protocol/windows.json";
    let file: WindowFile = grail_golden::json(FILE);
    let mut ran = 0;
    for case in &file.windows {
        case.check();
        ran += 1;
    }
    for case in &file.nonces {
        let nonce = Nonce::new(GroupIndex(case.group), RolloutIndex::new(case.index).unwrap());
        assert_eq!(nonce, Nonce(case.nonce));
        assert_eq!(challenge_text(&file.randomness[0].block_hash, nonce), case.challenge);
        ran += 1;
    }
    for case in &file.randomness {
        case.check();
        ran += 1;
    }
    let DrandChain { hash, genesis_time, period, description } = &file.drand_chain;
    assert_eq!(
        (hash.as_str(), *genesis_time, *period),
        (DRAND_CHAIN_HASH, DRAND_GENESIS_SECONDS, DRAND_PERIOD_SECONDS)
    );
    assert!(description.contains("3-second"));
    ran += 1;
    for case in &file.drand_rounds {
        assert_eq!(drand_round_at(case.time), Some(case.round), "{}", case.time);
        ran += 1;
    }
    let in_file = file.windows.len() + file.nonces.len() + file.randomness.len() + 1 + file.drand_rounds.len();
    grail_golden::ran(FILE, ran, in_file);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SeedFile {
    cases: Vec<SeedCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SeedCase {
    hotkey: Hotkey,
    window_hash: BlockHash,
    problem_index: i64,
    seed: u64,
}

#[test]
fn environment_seeds() {
    const FILE: &str = "protocol/env_seeds.json";
    let file: SeedFile = grail_golden::json(FILE);
    let mut ran = 0;
    for case in &file.cases {
        let seed = environment_seed(&case.hotkey, &case.window_hash, GroupIndex(case.problem_index));
        assert_eq!(seed, EnvironmentSeed(case.seed), "{}", case.problem_index);
        ran += 1;
    }
    grail_golden::ran(FILE, ran, file.cases.len());
}
