//! A generation server without a process: what it draws follows from the name of the request, so that the checks can repeat it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use grail_protocol::constants::CHALLENGE_K;
use grail_protocol::ids::{TokenId, WeightsHash};
use grail_supervisor::generation::{GenerationError, Generator, Sample};
use tokio::time::Instant;

use crate::schedule::derived;

#[derive(Debug)]
pub struct SimGenerator {
    pub seed: u64,
    /// What it draws depends on its weights, as with a real one.
    pub weights: WeightsHash,
    /// Of a thousand samples these fail.
    pub bad_samples: u64,
    /// Real worlds are faster by this.
    pub haste: u32,
    /// Nothing is drawn in this time.
    pub outage: Option<(Instant, Instant)>,
    pub drawn: AtomicU64,
}

impl Generator for SimGenerator {
    fn sample(&self, sample: Sample) -> BoxFuture<'_, Result<Vec<TokenId>, GenerationError>> {
        async move {
            let name = sample.rid.bytes().map(u64::from).collect::<Vec<_>>();
            let attempt = self.drawn.fetch_add(1, Ordering::Relaxed);
            let luck = derived(&[self.seed, 3, derived(&name), attempt]);
            tokio::time::sleep(Duration::from_millis(1_000 + luck % 20_000) / self.haste).await;
            if let Some((from, until)) = self.outage
                && (from..until).contains(&Instant::now())
            {
                tokio::time::sleep_until(until).await;
            }
            if luck / 32_768 % 1_000 < self.bad_samples {
                let detail = "simulated".to_owned();
                return Err(GenerationError::Unreadable { rid: sample.rid, detail });
            }
            // A sample that is drawn again is drawn as the first time would have been.
            let name = sample.rid.split_once("-t").map_or(&*sample.rid, |(name, _)| name);
            Ok(completion(name, self.weights))
        }
        .boxed()
    }

    fn abort_all(&self) -> BoxFuture<'_, ()> {
        async {}.boxed()
    }
}

/// Tokens of every completion: the most that the window allows, so that a model need not find its end likely.
pub const COMPLETION_TOKENS: usize = CHALLENGE_K + 8;

/// What a server with `weights` draws for the request `rid`.
pub fn completion(rid: &str, weights: WeightsHash) -> Vec<TokenId> {
    let name = derived(&format!("{rid} {weights}").bytes().map(u64::from).collect::<Vec<_>>());
    // Printable characters of the demo's byte-level vocabulary.
    let token = |position: usize| TokenId(20 + u32::try_from(derived(&[name, position as u64]) % 60).unwrap());
    (0..COMPLETION_TOKENS).map(token).collect()
}

/// Name of a request, as the miner makes it.
pub fn request_name(window: u64, group: i64, rollout: usize) -> String {
    format!("w{window}-g{group}-r{rollout}")
}
