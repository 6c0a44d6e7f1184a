//! Arithmetic of windows, and the names and times that follow from it (protocol §2, §9, §10).

use crate::constants::{DEADLINE_SLACK_SECONDS, WINDOW_LENGTH};
use crate::ids::{BlockNumber, CheckpointWindow, Hotkey, WindowStart};

/// The window that a validator works on at `block`: the last finished one. `None` in the first window of the chain.
#[must_use]
pub fn validated_at(block: BlockNumber) -> Option<WindowStart> {
    let finished = WindowStart::containing(block).block().0.checked_sub(WINDOW_LENGTH)?;
    Some(WindowStart::containing(BlockNumber(finished)))
}

/// The block whose hash makes the challenge randomness of `window`.
#[must_use]
pub const fn challenge_block(window: WindowStart) -> BlockNumber {
    window.end()
}

/// Blocks of `window` from `block` to the end, `block` included; 0 after the end.
#[must_use]
pub const fn blocks_left(window: WindowStart, block: BlockNumber) -> u64 {
    window.end().0.saturating_sub(block.0)
}

/// True if a checkpoint that became ready in `ready` may be used in `window`: strictly before it.
#[must_use]
pub const fn is_ready_for(ready: CheckpointWindow, window: WindowStart) -> bool {
    ready.0 < window.block().0
}

/// Key of the window file in the miner's bucket.
#[must_use]
pub fn object_key(hotkey: &Hotkey, window: WindowStart) -> String {
    format!("grail/windows/{hotkey}-window-{window}.parquet")
}

/// Unix seconds after which an upload is late, from the timestamp of the block after the window. There is no grace.
#[must_use]
pub fn upload_deadline(end_block_unix_seconds: f64) -> f64 {
    end_block_unix_seconds + DEADLINE_SLACK_SECONDS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_left_counts_the_current_block_and_stops_at_zero() {
        let window = WindowStart::containing(BlockNumber(60));
        for (block, left) in [(60, 30), (89, 1), (90, 0), (500, 0)] {
            assert_eq!(blocks_left(window, BlockNumber(block)), left);
        }
    }

    #[test]
    fn a_checkpoint_that_is_ready_in_the_window_itself_comes_too_late() {
        let window = WindowStart::containing(BlockNumber(60));
        assert!(is_ready_for(CheckpointWindow(30), window));
        assert!(!is_ready_for(CheckpointWindow(60), window));
    }

    #[test]
    fn names_and_times() {
        let window = WindowStart::containing(BlockNumber(60));
        assert_eq!(object_key(&Hotkey("5Abc".to_owned()), window), "grail/windows/5Abc-window-60.parquet");
        assert!((upload_deadline(1_000.0) - 996.0).abs() < 1e-9);
    }
}
