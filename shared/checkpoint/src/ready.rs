//! READY markers and the rule by which a window's checkpoint is chosen. Validators apply the same rule, so every oddity of
//! the reference's parsing is kept.

use grail_protocol::ids::{CheckpointWindow, WindowStart};

use crate::python;

/// A checkpoint that is published, and the window in which it became so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Choice {
    /// Window in which the upload finished. First in the order: the checkpoint that became ready last wins, not the newest.
    pub ready: u64,
    pub checkpoint: CheckpointWindow,
}

/// The checkpoint for `window` by a complete listing: the greatest (ready window, checkpoint window) among the markers
/// whose ready window lies strictly before `window`. `None`: nothing is ready, the window is not mined.
#[must_use]
pub fn resolve<K: AsRef<str>>(keys: impl IntoIterator<Item = K>, window: WindowStart) -> Option<Choice> {
    markers(keys).filter(|choice| choice.ready < window.block().0).max()
}

/// All markers of a listing, in its order; several on one checkpoint are several candidates.
pub fn markers<K: AsRef<str>>(keys: impl IntoIterator<Item = K>) -> impl Iterator<Item = Choice> {
    keys.into_iter().filter_map(|key| parse_marker(key.as_ref()))
}

/// Reads a marker's key: `*/*/checkpoint-{W}/READY-{R}` and whatever follows. The numbers are Python integers; text after a
/// second `-` is ignored. Anything else is no marker.
#[must_use]
pub fn parse_marker(key: &str) -> Option<Choice> {
    let mut parts = key.split('/').skip(2);
    let (checkpoint, ready) = (parts.next()?, parts.next()?);
    if !checkpoint.starts_with("checkpoint-") || !ready.starts_with("READY-") {
        return None;
    }
    Some(Choice { checkpoint: CheckpointWindow(number_after_dash(checkpoint)?), ready: number_after_dash(ready)? })
}

/// The number between the first and the second `-`. One that exceeds `u64` saturates: as a ready window it is never
/// eligible, as a checkpoint it names nothing that exists, so that the window is skipped as it is by the reference.
fn number_after_dash(part: &str) -> Option<u64> {
    let number = python::int_from_text(part.split('-').nth(1)?)?;
    if number < 0 { None } else { Some(u64::try_from(number).unwrap_or(u64::MAX)) }
}

#[cfg(test)]
mod tests {
    use grail_protocol::ids::BlockNumber;

    use super::*;

    #[test]
    fn a_number_beyond_any_window_is_never_ready_but_still_wins_as_a_checkpoint() {
        let huge = "9".repeat(30);
        let window = WindowStart::containing(BlockNumber(420));
        let never = format!("grail/checkpoints/checkpoint-300/READY-{huge}");
        assert_eq!(resolve([&never], window), None);
        let nowhere = format!("grail/checkpoints/checkpoint-{huge}/READY-390");
        let known = "grail/checkpoints/checkpoint-300/READY-390".to_owned();
        assert_eq!(
            resolve([&nowhere, &known], window).map(|choice| choice.checkpoint),
            Some(CheckpointWindow(u64::MAX))
        );
    }

    #[test]
    fn the_built_key_is_a_marker() {
        let key = crate::layout::ready_key(CheckpointWindow(60), 90);
        assert_eq!(parse_marker(&key), Some(Choice { ready: 90, checkpoint: CheckpointWindow(60) }));
    }
}
