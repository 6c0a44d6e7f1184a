//! Phases of a start, read from the marks in a server's log. Hints for people: readiness is decided over HTTP.

use std::sync::Mutex;
use std::sync::PoisonError;

use grail_ipc::messages::ServerPhase;

/// Texts that SGLang (and the builtin server) print when a phase begins.
const MARKS: [(&str, ServerPhase); 9] = [
    ("Uvicorn running on", ServerPhase::Listening),
    ("Init torch distributed begin", ServerPhase::LoadingWeights),
    ("Load weight begin", ServerPhase::LoadingWeights),
    ("Load weight end", ServerPhase::LoadingWeights),
    ("KV Cache is allocated", ServerPhase::WarmingUp),
    ("Capture target decode CUDA graph begin", ServerPhase::WarmingUp),
    ("Capture cuda graph begin", ServerPhase::WarmingUp),
    ("max_total_num_tokens=", ServerPhase::WarmingUp),
    ("The server is fired up and ready to roll!", ServerPhase::WarmingUp),
];

/// The phase whose mark is in `line`.
#[must_use]
pub fn phase_of(line: &str) -> Option<ServerPhase> {
    // The dump of all arguments holds every name.
    if line.contains("server_args=ServerArgs(") {
        return None;
    }
    MARKS.iter().find(|(text, _)| line.contains(text)).map(|(_, phase)| *phase)
}

/// Whether a server ended because its port was taken.
#[must_use]
pub fn is_port_taken(lines: &[String]) -> bool {
    const SIGNATURES: [&str; 4] = ["address already in use", "[errno 98]", "eaddrinuse", "port is already in use"];
    lines.iter().any(|line| {
        let line = line.to_ascii_lowercase();
        SIGNATURES.iter().any(|signature| line.contains(signature))
    })
}

/// Follows one start: tells of a line whether something new happened.
#[derive(Debug, Default)]
pub struct PhaseFollower {
    last: Mutex<Option<ServerPhase>>,
}

impl PhaseFollower {
    /// The phase that begins with this line; `None` if the line has no mark or only repeats the phase.
    pub fn observe(&self, line: &str) -> Option<ServerPhase> {
        let phase = phase_of(line)?;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        (last.replace(phase) != Some(phase)).then_some(phase)
    }

    /// The last phase that was seen.
    #[must_use]
    pub fn last(&self) -> Option<ServerPhase> {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phases(log: &str) -> Vec<ServerPhase> {
        let follower = PhaseFollower::default();
        log.lines().filter_map(|line| follower.observe(line)).collect()
    }

    #[test]
    fn a_real_start_has_its_phases_in_order() {
        // Lines of a recorded start of SGLang 0.5.16.
        let log = "\
[2026-11-22 17:04:11] server_args=ServerArgs(model_path='<ckpt0>', note='Load weight begin')
[2026-11-22 17:04:31] Init torch distributed begin.
[2026-11-22 17:04:33] Load weight begin. avail mem=78.50 GB
Multi-thread loading shards: 100% Completed | 1/1 [00:00<00:00, 162.00it/s]
[2026-11-22 17:04:33] Load weight end. elapsed=0.09 s, type=Qwen2ForCausalLM, avail mem=78.48 GB, mem usage=0.03 GB.
[2026-11-22 17:04:33] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 400000, K size: 0.76 GB, V size: 0.76 GB
[2026-11-22 17:04:36] Capture target decode CUDA graph end. elapsed=2.87 s, mem usage=0.11 GB, avail mem=76.71 GB.
[2026-11-22 17:04:36] INFO:     Uvicorn running on http://127.0.0.1:31000 (Press CTRL+C to quit)
[2026-11-22 17:04:37] The server is fired up and ready to roll!";
        use ServerPhase::{Listening, LoadingWeights, WarmingUp};
        assert_eq!(phases(log), [LoadingWeights, WarmingUp, Listening, WarmingUp]);
    }

    #[test]
    fn a_taken_port_is_recognised() {
        let lines = |line: &str| vec!["before".to_owned(), line.to_owned()];
        assert!(is_port_taken(&lines("OSError: [Errno 98] error while attempting to bind")));
        assert!(is_port_taken(&lines("Initialization failed. bind: Address already in use")));
        assert!(!is_port_taken(&lines("Load weight begin. avail mem=78.50 GB")));
    }
}
