//! Bounds on what is taken from a store, and on how long it is asked for.

use std::path::Path;
use std::time::Duration;

use crate::store::StoreError;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// Bounds on what is taken from a store.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Largest weights file (`*.safetensors`), plain bytes.
    pub weights_bytes: u64,
    /// Largest delta payload (`*.zst`), plain bytes.
    pub delta_bytes: u64,
    /// Largest object of any other kind, plain bytes.
    pub other_bytes: u64,
    /// Longest wait for the next answer or the next piece of a body.
    pub stall: Duration,
    /// Objects fetched at the same time.
    pub parallel: usize,
    /// Bytes of a range; objects up to this size are fetched whole, larger ones range by range. 16 to 64 MiB suit a bucket.
    pub range_bytes: u64,
    /// Ranges of one object fetched at the same time.
    pub parallel_ranges: usize,
    pub retry: RetryLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            weights_bytes: 64 * GIB,
            delta_bytes: 16 * GIB,
            other_bytes: 64 * MIB,
            stall: Duration::from_secs(30),
            parallel: 4,
            range_bytes: 32 * MIB,
            parallel_ranges: 8,
            retry: RetryLimits::default(),
        }
    }
}

impl Limits {
    /// The cap for an object, by its name.
    #[must_use]
    pub fn cap(&self, name: &str) -> u64 {
        match Path::new(name).extension().and_then(|extension| extension.to_str()) {
            Some("safetensors") => self.weights_bytes,
            Some("zst") => self.delta_bytes,
            _ => self.other_bytes,
        }
    }
}

/// How often and how patiently a request is repeated. A client with retries of its own multiplies these: let it have none.
#[derive(Clone, Debug)]
pub struct RetryLimits {
    /// Requests in a row that may bring nothing; one that brought bytes begins a new count.
    pub attempts: u32,
    /// Wait after the first failure, doubled after each further one; between half and the whole of it is waited.
    pub first_wait: Duration,
    pub longest_wait: Duration,
}

impl Default for RetryLimits {
    fn default() -> Self {
        Self { attempts: 8, first_wait: Duration::from_millis(500), longest_wait: Duration::from_secs(15) }
    }
}

impl RetryLimits {
    /// The wait after `failures` failures in a row, of which `fraction` (0 to 1) decides the jittered half.
    fn wait(&self, failures: u32, fraction: f64) -> Duration {
        let doublings = failures.saturating_sub(1).min(30);
        let whole = self.first_wait.saturating_mul(1 << doublings).min(self.longest_wait);
        whole.mul_f64(0.5 + fraction.clamp(0.0, 1.0) / 2.0)
    }
}

/// Failures in a row of one request.
#[derive(Debug)]
pub(super) struct Retries<'a> {
    limits: &'a RetryLimits,
    failures: u32,
}

impl<'a> Retries<'a> {
    pub(super) const fn new(limits: &'a RetryLimits) -> Self {
        Self { limits, failures: 0 }
    }

    /// The request brought something: the store is there.
    pub(super) const fn progressed(&mut self) {
        self.failures = 0;
    }

    /// Waits before the next attempt, or gives the error back if there is none.
    pub(super) async fn after(&mut self, error: StoreError) -> Result<(), StoreError> {
        self.failures += 1;
        if !error.is_transient() || self.failures >= self.limits.attempts {
            return Err(error);
        }
        let wait = self.limits.wait(self.failures, random_fraction());
        tracing::debug!(
            error = &error as &dyn std::error::Error,
            failures = self.failures,
            wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
            "Asking the store again."
        );
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

/// 0 to 1. Every `RandomState` has other keys, which is random enough for spreading requests in time.
fn random_fraction() -> f64 {
    use std::hash::BuildHasher;
    let random = std::hash::RandomState::new().hash_one(()) >> 32;
    f64::from(u32::try_from(random).unwrap_or(u32::MAX)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_half_of_each_is_jitter() {
        let limits = RetryLimits::default();
        let whole: Vec<u128> = (1..=7).map(|failures| limits.wait(failures, 1.0).as_millis()).collect();
        assert_eq!(whole, [500, 1000, 2000, 4000, 8000, 15_000, 15_000]);
        assert_eq!(limits.wait(1, 0.0), Duration::from_millis(250));
        assert_eq!(limits.wait(u32::MAX, 0.0), Duration::from_millis(7500));
        assert!((0..100).map(|_| random_fraction()).all(|fraction| (0.0..=1.0).contains(&fraction)));
        assert_ne!(random_fraction(), random_fraction());
    }

    #[tokio::test]
    async fn only_what_may_pass_is_asked_again_and_not_for_ever() {
        let limits = RetryLimits { attempts: 3, first_wait: Duration::ZERO, longest_wait: Duration::ZERO };
        let stalled = || StoreError::Stalled { key: "k".to_owned(), seconds: 1 };
        let mut retries = Retries::new(&limits);
        retries.after(stalled()).await.unwrap();
        retries.after(stalled()).await.unwrap();
        retries.progressed();
        retries.after(stalled()).await.unwrap();
        retries.after(stalled()).await.unwrap();
        assert!(retries.after(stalled()).await.is_err());
        let absent = StoreError::NotFound { key: "k".to_owned() };
        assert!(Retries::new(&limits).after(absent).await.is_err());
    }
}
