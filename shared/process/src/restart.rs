//! Whether and when a child comes back: pure, with time and chance passed in.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// At most `most` deaths within `period`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Intensity {
    pub most: usize,
    pub period: Duration,
}

/// What the limiter says of a death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Restart,
    GiveUp(Intensity),
}

/// Restart limiter: more than `most` deaths inside a `period` gives up (OTP semantics), for a burst and for a sustained rate.
#[derive(Debug, Clone)]
pub struct RestartLimit {
    intensities: Vec<Intensity>,
    deaths: VecDeque<Instant>,
}

impl RestartLimit {
    /// A limiter that gives up when any of `intensities` is exceeded.
    #[must_use]
    pub fn new(intensities: Vec<Intensity>) -> Self {
        Self { intensities, deaths: VecDeque::new() }
    }

    /// Counts a death at `now`, which must not run backwards.
    pub fn record(&mut self, now: Instant) -> Verdict {
        let longest = self.intensities.iter().map(|intensity| intensity.period).max().unwrap_or_default();
        self.deaths.push_back(now);
        while self.deaths.front().is_some_and(|death| now.duration_since(*death) > longest) {
            self.deaths.pop_front();
        }
        let exceeded = self.intensities.iter().find(|intensity| {
            let recent = self.deaths.iter().rev().take_while(|death| now.duration_since(**death) <= intensity.period);
            recent.count() > intensity.most
        });
        exceeded.map_or(Verdict::Restart, |intensity| Verdict::GiveUp(*intensity))
    }

    /// Forgets all deaths.
    pub fn reset(&mut self) {
        self.deaths.clear();
    }
}

/// Exponential delays between restarts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BackoffPolicy {
    /// Delay after the first death.
    pub first: Duration,
    /// The longest delay.
    pub most: Duration,
    /// Share of a delay that chance may take away, `0.0..=1.0`.
    pub jitter: f64,
    /// Being ready for this long makes the next delay the first again.
    pub forgiven_after: Duration,
}

impl BackoffPolicy {
    /// Delay before restart number `attempt` in a row (0 is the first), with `chance` in `0.0..1.0`.
    #[must_use]
    pub fn delay(&self, attempt: u32, chance: f64) -> Duration {
        let doubled = self.first.saturating_mul(1_u32.checked_shl(attempt).unwrap_or(u32::MAX));
        let kept = 1.0 - self.jitter.clamp(0.0, 1.0) * chance.clamp(0.0, 1.0);
        doubled.min(self.most).mul_f64(kept)
    }
}

/// When a child comes back.
#[derive(Debug, Clone, PartialEq)]
pub struct RestartPolicy {
    pub intensities: Vec<Intensity>,
    pub backoff: BackoffPolicy,
    /// After this a child that died too often gets another chance; never without an operator if unset.
    pub quarantine: Option<Duration>,
}

impl Default for RestartPolicy {
    /// Five deaths a minute or eight in half an hour, which starts that hang reach too, put it into quarantine, for ten minutes; delays from 200 ms to 30 s, forgiven
    /// after a minute of work.
    fn default() -> Self {
        Self {
            intensities: vec![
                Intensity { most: 5, period: Duration::from_secs(60) },
                Intensity { most: 8, period: Duration::from_secs(1_800) },
            ],
            backoff: BackoffPolicy {
                first: Duration::from_millis(200),
                most: Duration::from_secs(30),
                jitter: 0.5,
                forgiven_after: Duration::from_secs(60),
            },
            quarantine: Some(Duration::from_secs(600)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_burst_limit_trips_on_one_death_too_many() {
        let start = Instant::now();
        let intensity = Intensity { most: 3, period: 10 * SECOND };
        let mut limit = RestartLimit::new(vec![intensity]);
        for second in 0..3 {
            assert_eq!(limit.record(start + second * SECOND), Verdict::Restart);
        }
        assert_eq!(limit.clone().record(start + 10 * SECOND), Verdict::GiveUp(intensity));
        assert_eq!(limit.record(start + 11 * SECOND), Verdict::Restart, "the first death is out of the period");
        limit.reset();
        assert_eq!(limit.record(start + 11 * SECOND), Verdict::Restart);
    }

    #[test]
    fn the_sustained_limit_trips_where_the_burst_limit_does_not() {
        let start = Instant::now();
        let burst = Intensity { most: 3, period: 10 * SECOND };
        let sustained = Intensity { most: 5, period: 100 * SECOND };
        let mut limit = RestartLimit::new(vec![burst, sustained]);
        let verdicts: Vec<Verdict> = (0..6).map(|n| limit.record(start + n * 8 * SECOND)).collect();
        assert_eq!(verdicts[..5], [Verdict::Restart; 5]);
        assert_eq!(verdicts[5], Verdict::GiveUp(sustained));
    }

    proptest! {
        #[test]
        fn within_a_period_no_more_than_the_most_are_restarted(
            gaps in prop::collection::vec(0_u64..20_000, 1..60), most in 0_usize..6, period in 1_u64..30_000,
        ) {
            let start = Instant::now();
            let period = Duration::from_millis(period);
            let mut limit = RestartLimit::new(vec![Intensity { most, period }]);
            let mut now = start;
            let mut restarted: Vec<Instant> = Vec::new();
            for gap in gaps {
                now += Duration::from_millis(gap);
                let recent = restarted.iter().filter(|death| now.duration_since(**death) <= period).count();
                match limit.record(now) {
                    Verdict::Restart => {
                        prop_assert!(recent < most);
                        restarted.push(now);
                    }
                    Verdict::GiveUp(_) => {
                        prop_assert!(recent >= most);
                        break;
                    }
                }
            }
        }

        #[test]
        fn delays_rise_to_the_most_and_chance_only_shortens(attempt in 0_u32..200, chance in 0.0_f64..1.0, jitter in 0.0_f64..=1.0) {
            let policy = BackoffPolicy { first: SECOND / 5, most: 30 * SECOND, jitter, forgiven_after: SECOND };
            let whole = policy.delay(attempt, 0.0);
            prop_assert!(whole <= policy.most);
            prop_assert!(whole >= policy.delay(attempt.saturating_sub(1), 0.0));
            let shortened = policy.delay(attempt, chance);
            prop_assert!(shortened <= whole);
            prop_assert!(shortened + Duration::from_nanos(2) >= whole.mul_f64(1.0 - jitter));
        }
    }

    #[test]
    fn the_first_delay_is_the_first() {
        let policy = RestartPolicy::default().backoff;
        assert_eq!(policy.delay(0, 0.0), Duration::from_millis(200));
        assert_eq!(policy.delay(3, 0.0), Duration::from_millis(1_600));
        assert_eq!(policy.delay(40, 0.0), policy.most);
    }
}
