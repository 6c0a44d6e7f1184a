//! Whether there is time for another group before the window ends (protocol §9).

use std::time::Duration;

use crate::constants::{
    BLOCK_TIME_SECONDS, MINER_EMA_ALPHA, MINER_GROUP_SECONDS_CAP, MINER_SAFETY_BLOCKS, WINDOW_LENGTH,
};
use crate::ids::{BlockNumber, WindowStart};
use crate::window::blocks_left;

/// Blocks that a group is taken to need before the first one was measured.
const UNMEASURED_GROUP_BLOCKS: f64 = 6.0;
/// Blocks that an upload is taken to need before the first one was measured.
const UNMEASURED_UPLOAD_BLOCKS: f64 = 1.0;

/// Blocks that an upload is given at most, whatever earlier ones took.
const MOST_UPLOAD_BLOCKS: f64 = 10.0;

/// Exponential moving average; the first sample starts it unless a value was given.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct MovingAverage(Option<f64>);

impl MovingAverage {
    fn add(&mut self, sample: f64) {
        self.0 = Some(self.0.map_or(sample, |mean| MINER_EMA_ALPHA * sample + (1.0 - MINER_EMA_ALPHA) * mean));
    }
}

/// Running averages of block, group and upload time, and the decision that follows from them.
#[derive(Clone, Debug)]
pub struct TimeGate {
    block_seconds: f64,
    group_seconds: MovingAverage,
    upload_seconds: MovingAverage,
    safety_blocks: u32,
    last_block: Option<(BlockNumber, Duration)>,
}

impl Default for TimeGate {
    fn default() -> Self {
        Self::new(MINER_SAFETY_BLOCKS)
    }
}

impl TimeGate {
    /// A gate without measurements that keeps `safety_blocks` free at the end of the window.
    #[must_use]
    pub fn new(safety_blocks: u32) -> Self {
        Self {
            block_seconds: BLOCK_TIME_SECONDS.into(),
            group_seconds: MovingAverage::default(),
            upload_seconds: MovingAverage::default(),
            safety_blocks,
            last_block: None,
        }
    }

    /// The same gate, assuming `block_time` before the first measurement: a simulated chain has blocks of its own length.
    #[must_use]
    pub fn with_block_time(self, block_time: Duration) -> Self {
        Self { block_seconds: block_time.as_secs_f64(), ..self }
    }

    /// Notes that `block` was current at `at`, a time on any steady clock. A block that is not newer is ignored.
    pub fn observe_block(&mut self, block: BlockNumber, at: Duration) {
        if let Some((last, since)) = self.last_block {
            if block <= last {
                return;
            }
            let sample = at.saturating_sub(since).as_secs_f64() / (block.0 - last.0) as f64;
            self.block_seconds = MINER_EMA_ALPHA * sample + (1.0 - MINER_EMA_ALPHA) * self.block_seconds;
        }
        self.last_block = Some((block, at));
    }

    /// Notes the time that one group took, from generation to proof; at most six minutes count.
    pub fn record_group(&mut self, took: Duration) {
        self.group_seconds.add(took.as_secs_f64().min(MINER_GROUP_SECONDS_CAP));
    }

    /// Notes the time that one upload took; at most ten blocks count, since it may have waited for a store that was away, and a window
    /// must have room for more than its upload.
    pub fn record_upload(&mut self, took: Duration) {
        self.upload_seconds.add(took.as_secs_f64().min(MOST_UPLOAD_BLOCKS * self.block_seconds));
    }

    /// Notes that an upload was late: the next one is given twice the time, up to ten blocks. A failure takes as long as it is let, so
    /// its own time says nothing.
    pub fn upload_was_late(&mut self) {
        let before = self.upload_seconds();
        let most = MOST_UPLOAD_BLOCKS * self.block_seconds;
        self.upload_seconds = MovingAverage(Some((2.0 * before).min(most).max(before)));
    }

    /// Forgets what groups and uploads took: averages that leave no time for a group would never be corrected.
    pub fn forget(&mut self) {
        (self.group_seconds, self.upload_seconds) = Default::default();
    }

    /// Average seconds of an upload; one block before the first was measured.
    #[must_use]
    pub fn upload_seconds(&self) -> f64 {
        self.upload_seconds.0.unwrap_or(UNMEASURED_UPLOAD_BLOCKS * self.block_seconds)
    }

    /// Average seconds between blocks.
    #[must_use]
    pub const fn block_seconds(&self) -> f64 {
        self.block_seconds
    }

    /// Blocks that one more group with its upload and the safety margin need, `1..=29`.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "clamped to 1..=29 before")]
    pub fn needed_blocks(&self) -> u64 {
        const MOST: f64 = (WINDOW_LENGTH - 1) as f64;
        let block = self.block_seconds;
        let group = self.group_seconds.0.unwrap_or(UNMEASURED_GROUP_BLOCKS * block);
        let upload = self.upload_seconds.0.unwrap_or(UNMEASURED_UPLOAD_BLOCKS * block);
        let seconds = group + upload + f64::from(self.safety_blocks) * block;
        (seconds / block.max(0.001)).ceil().clamp(1.0, MOST) as u64
    }

    /// True if a group of `window` may start at `block`. Also asked once before the first group: on a no the window is
    /// skipped.
    #[must_use]
    pub fn admits(&self, window: WindowStart, block: BlockNumber) -> bool {
        block >= window.block() && blocks_left(window, block) > self.needed_blocks()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WINDOW: u64 = 300;

    fn window() -> WindowStart {
        WindowStart::containing(BlockNumber(WINDOW))
    }

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn without_measurements_ten_blocks_are_needed() {
        let gate = TimeGate::default();
        assert_eq!(gate.needed_blocks(), 6 + 1 + 3);
        assert!(gate.admits(window(), BlockNumber(WINDOW + 19)));
        assert!(!gate.admits(window(), BlockNumber(WINDOW + 20)));
    }

    #[test]
    fn the_first_sample_starts_an_average_and_later_ones_move_it_by_a_fifth() {
        let mut gate = TimeGate::new(0);
        gate.record_upload(Duration::ZERO);
        gate.record_group(seconds(120));
        assert_eq!(gate.needed_blocks(), 10);
        gate.record_group(seconds(60));
        assert_eq!(gate.needed_blocks(), 9, "(0.2 · 60 + 0.8 · 120) / 12");
    }

    #[test]
    fn a_slow_group_counts_six_minutes() {
        let mut gate = TimeGate::new(0);
        gate.record_upload(Duration::ZERO);
        gate.record_group(seconds(36_000));
        gate.record_group(Duration::ZERO);
        assert_eq!(gate.needed_blocks(), 24, "0.8 · 360 / 12");
    }

    #[test]
    fn late_uploads_double_what_the_next_is_given_and_stay_within_a_window() {
        let mut gate = TimeGate::new(0);
        let mut given = vec![gate.upload_seconds()];
        for _ in 0..5 {
            gate.upload_was_late();
            given.push(gate.upload_seconds());
        }
        assert_eq!(given, [12.0, 24.0, 48.0, 96.0, 120.0, 120.0]);
        let mut gate = TimeGate::new(0);
        gate.record_upload(seconds(300));
        assert_eq!(gate.upload_seconds(), 120.0, "it leaves room for groups");
        gate.record_group(seconds(100));
        assert!(gate.admits(window(), BlockNumber(WINDOW)));
    }

    #[test]
    fn an_average_that_admits_nothing_can_be_forgotten() {
        let mut gate = TimeGate::default();
        gate.record_group(seconds(360));
        assert!(!gate.admits(window(), BlockNumber(WINDOW + 1)));
        gate.forget();
        assert!(gate.admits(window(), BlockNumber(WINDOW + 1)));
    }

    #[test]
    fn block_time_is_averaged_over_skipped_blocks_and_ignores_repeats() {
        let mut gate = TimeGate::default();
        gate.observe_block(BlockNumber(10), seconds(100));
        gate.observe_block(BlockNumber(10), seconds(111));
        gate.observe_block(BlockNumber(9), seconds(112));
        gate.observe_block(BlockNumber(14), seconds(120));
        assert!((gate.block_seconds() - (0.2 * 5.0 + 0.8 * 12.0)).abs() < 1e-12);
    }

    #[test]
    fn no_group_starts_outside_its_window() {
        let mut gate = TimeGate::new(0);
        gate.record_group(Duration::ZERO);
        gate.record_upload(Duration::ZERO);
        assert!(!gate.admits(window(), BlockNumber(WINDOW - 1)));
        assert!(gate.admits(window(), BlockNumber(WINDOW + 28)));
        assert!(!gate.admits(window(), BlockNumber(WINDOW + 29)), "one block is always needed");
        assert!(!gate.admits(window(), BlockNumber(WINDOW + 30)));
    }

    #[derive(Clone, Debug)]
    enum Event {
        Block { blocks: u64, milliseconds: u64 },
        Group(u64),
        Upload(u64),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            (0..5_u64, 0..100_000_u64).prop_map(|(blocks, milliseconds)| Event::Block { blocks, milliseconds }),
            (0..4_000_000_u64).prop_map(Event::Group),
            (0..400_000_u64).prop_map(Event::Upload),
        ]
    }

    proptest! {
        #[test]
        fn whatever_was_measured_the_need_is_within_a_window_and_admission_ends_once(
            events in proptest::collection::vec(event(), 0..60), safety_blocks in 0..40_u32
        ) {
            let mut gate = TimeGate::new(safety_blocks);
            let (mut block, mut clock) = (BlockNumber(WINDOW), Duration::ZERO);
            for event in events {
                match event {
                    Event::Block { blocks, milliseconds } => {
                        block.0 += blocks;
                        clock += Duration::from_millis(milliseconds);
                        gate.observe_block(block, clock);
                    }
                    Event::Group(milliseconds) => gate.record_group(Duration::from_millis(milliseconds)),
                    Event::Upload(milliseconds) => gate.record_upload(Duration::from_millis(milliseconds)),
                }
            }
            let needed = gate.needed_blocks();
            prop_assert!((1..=29).contains(&needed));
            for offset in 0..30 {
                let admitted = gate.admits(window(), BlockNumber(WINDOW + offset));
                prop_assert_eq!(admitted, 30 - offset > needed);
            }
        }

        #[test]
        fn a_longer_group_or_upload_never_needs_fewer_blocks(group in 0..500_u64, upload in 0..500_u64, more in 0..500_u64) {
            let needed = |group, upload| {
                let mut gate = TimeGate::default();
                gate.record_group(seconds(group));
                gate.record_upload(seconds(upload));
                gate.needed_blocks()
            };
            prop_assert!(needed(group + more, upload) >= needed(group, upload));
            prop_assert!(needed(group, upload + more) >= needed(group, upload));
        }
    }
}
