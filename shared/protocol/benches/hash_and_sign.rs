//! Everything that hashing and signing a window costs: 5,000 rollouts of 1,000 tokens, each with its token hash, the hash of
//! its compact commitments, the commit binding and its two signatures. Budget on two cores: 0.6 s.
//!
//! `cargo bench -p grail-protocol --bench hash_and_sign`

use divan::Bencher;
use divan::counter::ItemsCount;
use grail_protocol::binding::{CommitBinding, commitments_hash, spaced_commitments};
use grail_protocol::hash::{completion_digest, token_hash};
use grail_protocol::ids::{BlockHash, Nonce, TokenId};
use grail_protocol::keys::{Keypair, Signature};
use grail_protocol::nonce::challenge_text;
use rayon::prelude::*;

const ROLLOUTS: u32 = 5_000;
const TOKENS: u32 = 1_000;

fn main() {
    divan::main();
}

struct Rollout {
    nonce: Nonce,
    tokens: Vec<TokenId>,
    sketches: Vec<u32>,
}

fn rollouts() -> Vec<Rollout> {
    let rollout = |index: u32| Rollout {
        nonce: Nonce(index.into()),
        tokens: (0..TOKENS).map(|token| TokenId((token * 7_919 + index * 31) % 152_000)).collect(),
        // Half of the sketches are negative numbers modulo 2^31 − 1 and so have ten digits.
        sketches: (0..TOKENS)
            .map(|token| if token % 2 == 0 { (token * index) % 9_000 } else { 2_147_480_000 + token % 3_000 })
            .collect(),
    };
    (0..ROLLOUTS).map(rollout).collect()
}

fn sign(rollout: &Rollout, keypair: &Keypair, block_hash: &BlockHash) -> (Signature, Signature) {
    let tokens = token_hash(&rollout.tokens);
    let commitments = commitments_hash(&rollout.sketches);
    let binding = CommitBinding::new(&tokens, &[9; 32], "Qwen/Qwen2.5-1.5B-Instruct", &commitments);
    let row = challenge_text(block_hash, rollout.nonce);
    (keypair.sign(&binding.digest()), keypair.sign(row.as_bytes()))
}

#[divan::bench(sample_count = 10)]
fn hash_and_sign_window(bencher: Bencher) {
    let rollouts = rollouts();
    let keypair = Keypair::from_uri("//Alice").expect("a development key");
    let block_hash = BlockHash(format!("0x{}", "5a".repeat(32)));
    bencher
        .counter(ItemsCount::new(rollouts.len()))
        .bench(|| rollouts.par_iter().map(|rollout| sign(rollout, &keypair, &block_hash)).collect::<Vec<_>>());
}

#[divan::bench(sample_count = 10)]
fn hash_window(bencher: Bencher) {
    let rollouts = rollouts();
    bencher.counter(ItemsCount::new(rollouts.len())).bench(|| {
        rollouts
            .par_iter()
            .map(|rollout| (token_hash(&rollout.tokens), commitments_hash(&rollout.sketches)))
            .collect::<Vec<_>>()
    });
}

#[divan::bench(sample_count = 10)]
fn digest_and_text_of_window(bencher: Bencher) {
    let rollouts = rollouts();
    bencher.counter(ItemsCount::new(rollouts.len())).bench(|| {
        rollouts
            .par_iter()
            .map(|rollout| (completion_digest(&rollout.tokens, 100), spaced_commitments(&rollout.sketches).len()))
            .collect::<Vec<_>>()
    });
}
