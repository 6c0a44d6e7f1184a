//! What a child writes: lines of bounded length at a bounded rate, and the last of them for a post-mortem.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

/// Bytes read at once; also what a child may write before it has to wait for us.
const READ_BYTES: usize = 16 << 10;

/// Which pipe a line came through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    /// `stdout` or `stderr`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// One line of a child, for a sink.
#[derive(Debug, Clone, Copy)]
pub struct LogLine<'l> {
    /// Name of the child.
    pub child: &'l str,
    pub pid: i32,
    pub stream: Stream,
    /// Without its line end, already scrubbed.
    pub text: &'l str,
    /// Lines that were left out since the last, because they came too fast.
    pub left_out: u64,
}

type Sink = Arc<dyn Fn(&LogLine<'_>) + Send + Sync>;
type Scrub = Arc<dyn for<'t> Fn(&'t str) -> Cow<'t, str> + Send + Sync>;

/// How a child's log is taken.
#[derive(Clone)]
pub struct LogPolicy {
    /// Longer lines are cut.
    pub line_bytes: usize,
    /// Lines kept for a post-mortem, of both streams together.
    pub kept_lines: usize,
    /// Lines a second that reach the sink in the long run.
    pub lines_per_second: u32,
    /// Lines that may come at once.
    pub burst_lines: u32,
    sink: Sink,
    scrub: Option<Scrub>,
}

impl LogPolicy {
    /// Lines go to `sink`, which must not block.
    #[must_use]
    pub fn to_sink(sink: impl Fn(&LogLine<'_>) + Send + Sync + 'static) -> Self {
        Self {
            line_bytes: 8 << 10,
            kept_lines: 200,
            lines_per_second: 50,
            burst_lines: 500,
            sink: Arc::new(sink),
            scrub: None,
        }
    }

    /// Passes every line through `scrub` before anything else sees it.
    #[must_use]
    pub fn scrubbed_by(mut self, scrub: impl for<'t> Fn(&'t str) -> Cow<'t, str> + Send + Sync + 'static) -> Self {
        self.scrub = Some(Arc::new(scrub));
        self
    }
}

impl Default for LogPolicy {
    /// Lines become events of the target `grail_child`, without the secrets of this process's environment.
    fn default() -> Self {
        let redactor = grail_telemetry::Redactor::from_environment();
        Self::to_sink(|line| {
            if line.left_out > 0 {
                tracing::warn!(target: "grail_child", child = line.child, left_out = line.left_out, "Lines were left out.");
            }
            tracing::info!(target: "grail_child", child = line.child, stream = line.stream.name(), "{}", line.text);
        })
        .scrubbed_by(move |text| redactor.redact(text))
    }
}

impl fmt::Debug for LogPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogPolicy")
            .field("line_bytes", &self.line_bytes)
            .field("kept_lines", &self.kept_lines)
            .field("lines_per_second", &self.lines_per_second)
            .field("burst_lines", &self.burst_lines)
            .finish_non_exhaustive()
    }
}

/// Cuts bytes into lines; what is too long is cut, what is not text is made so. `\r` ends a line too: progress bars use it.
#[derive(Debug)]
struct LineCutter {
    line: Vec<u8>,
    most_bytes: usize,
    is_cut: bool,
}

impl LineCutter {
    fn new(most_bytes: usize) -> Self {
        Self { line: Vec::new(), most_bytes, is_cut: false }
    }

    fn push(&mut self, bytes: &[u8], mut take: impl FnMut(&str)) {
        for part in bytes.split_inclusive(|byte| matches!(byte, b'\n' | b'\r')) {
            let (content, is_ended) = match part {
                [content @ .., b'\n' | b'\r'] => (content, true),
                content => (content, false),
            };
            let room = self.most_bytes - self.line.len();
            self.line.extend_from_slice(&content[..content.len().min(room)]);
            self.is_cut |= content.len() > room;
            if is_ended {
                self.finish(&mut take);
            }
        }
    }

    /// Gives what has no line end yet. Empty lines say nothing.
    fn finish(&mut self, take: &mut impl FnMut(&str)) {
        if !self.line.is_empty() {
            let text = String::from_utf8_lossy(&self.line);
            if self.is_cut { take(&format!("{text} [cut]")) } else { take(&text) }
        }
        self.line.clear();
        self.is_cut = false;
    }
}

/// Lets `burst` lines through at once and `per_second` in the long run.
#[derive(Debug)]
struct RateLimit {
    per_second: f64,
    burst: f64,
    credit: f64,
    last: Option<Instant>,
}

impl RateLimit {
    fn new(per_second: u32, burst: u32) -> Self {
        Self { per_second: per_second.into(), burst: burst.into(), credit: burst.into(), last: None }
    }

    fn admits(&mut self, now: Instant) -> bool {
        let passed = self.last.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.last = Some(now);
        self.credit = (self.credit + passed.as_secs_f64() * self.per_second).min(self.burst);
        if self.credit < 1.0 {
            return false;
        }
        self.credit -= 1.0;
        true
    }
}

/// The log of one child, shared by its two pipes.
pub(crate) struct Log {
    child: String,
    pid: i32,
    policy: LogPolicy,
    state: Mutex<LogState>,
}

struct LogState {
    kept: VecDeque<String>,
    rate: RateLimit,
    left_out: u64,
}

impl Log {
    pub(crate) fn new(child: String, pid: i32, policy: LogPolicy) -> Self {
        let rate = RateLimit::new(policy.lines_per_second, policy.burst_lines);
        let state = Mutex::new(LogState { kept: VecDeque::new(), rate, left_out: 0 });
        Self { child, pid, policy, state }
    }

    /// The last lines, oldest first.
    pub(crate) fn kept_lines(&self) -> Vec<String> {
        self.lock().kept.iter().cloned().collect()
    }

    fn take(&self, stream: Stream, text: &str, now: Instant) {
        let text = self.policy.scrub.as_ref().map_or(Cow::Borrowed(text), |scrub| scrub(text));
        let left_out = {
            let mut state = self.lock();
            if state.kept.len() >= self.policy.kept_lines {
                state.kept.pop_front();
            }
            if self.policy.kept_lines > 0 {
                state.kept.push_back(text.clone().into_owned());
            }
            if !state.rate.admits(now) {
                state.left_out += 1;
                return;
            }
            std::mem::take(&mut state.left_out)
        };
        (self.policy.sink)(&LogLine { child: &self.child, pid: self.pid, stream, text: &text, left_out });
    }

    /// Reads a pipe to its end.
    pub(crate) async fn follow(self: Arc<Self>, stream: Stream, descriptor: OwnedFd) {
        let mut pipe = match pipe::Receiver::from_owned_fd(descriptor) {
            Ok(pipe) => pipe,
            Err(error) => {
                tracing::warn!(child = %self.child, stream = stream.name(), %error, "Cannot read a child's log.");
                return;
            }
        };
        let mut cutter = LineCutter::new(self.policy.line_bytes);
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let read = match pipe.read(&mut buffer).await {
                Ok(read) => read,
                Err(error) => {
                    tracing::warn!(child = %self.child, stream = stream.name(), %error, "Lost a child's log.");
                    0
                }
            };
            let now = tokio::time::Instant::now().into_std();
            if read == 0 {
                cutter.finish(&mut |text: &str| self.take(stream, text, now));
                return;
            }
            cutter.push(&buffer[..read], |text| self.take(stream, text, now));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, LogState> {
        // Nothing here can panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").field("child", &self.child).field("policy", &self.policy).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(chunks: &[&[u8]], most_bytes: usize) -> Vec<String> {
        let mut cutter = LineCutter::new(most_bytes);
        let mut lines = Vec::new();
        for chunk in chunks {
            cutter.push(chunk, |line| lines.push(line.to_owned()));
            assert!(cutter.line.len() <= most_bytes);
        }
        cutter.finish(&mut |line: &str| lines.push(line.to_owned()));
        lines
    }

    #[test]
    fn bytes_become_lines() {
        assert_eq!(lines(&[b"a\nb", b"c\r\n", b"\n10%\r20%\r", b"end"], 100), ["a", "bc", "10%", "20%", "end"]);
        assert_eq!(lines(&[b"\xff\xfe\n"], 100), ["\u{fffd}\u{fffd}"]);
        assert_eq!(lines(&[b"123", b"456\n12345\n"], 5), ["12345 [cut]", "12345"]);
        assert_eq!(lines(&[&[b'x'; 1_000_000]], 4), ["xxxx [cut]"]);
    }

    proptest! {
        #[test]
        fn chunks_do_not_matter(text in "[a-zé\n\r]{0,200}", cuts in prop::collection::vec(1_usize..40, 1..10)) {
            let mut chunks: Vec<&[u8]> = Vec::new();
            let mut rest = text.as_bytes();
            let mut cuts = cuts.iter().copied().cycle();
            while !rest.is_empty() {
                let (chunk, after) = rest.split_at(cuts.next().unwrap_or(1).min(rest.len()));
                chunks.push(chunk);
                rest = after;
            }
            prop_assert_eq!(lines(&chunks, 1_000), lines(&[text.as_bytes()], 1_000));
        }
    }

    #[test]
    fn a_flood_is_let_through_at_its_rate() {
        let start = Instant::now();
        let mut rate = RateLimit::new(10, 5);
        let admitted = |rate: &mut RateLimit, at: Instant| (0..100).filter(|_| rate.admits(at)).count();
        assert_eq!(admitted(&mut rate, start), 5);
        assert_eq!(admitted(&mut rate, start + Duration::from_millis(200)), 2);
        assert_eq!(admitted(&mut rate, start + Duration::from_secs(60)), 5, "credit does not pile up");
        assert_eq!(admitted(&mut rate, start), 0, "time that runs backwards gives none");
    }

    #[test]
    fn the_last_lines_are_kept_whatever_the_rate() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let mut policy =
            LogPolicy::to_sink(move |line| sink.lock().unwrap().push((line.text.to_owned(), line.left_out)))
                .scrubbed_by(|text| Cow::Owned(text.replace("secret", "[redacted]")));
        policy.kept_lines = 2;
        policy.burst_lines = 1;
        policy.lines_per_second = 1;
        let log = Log::new("worker-0".into(), 1, policy);
        let start = Instant::now();
        for text in ["one secret", "two", "three secret"] {
            log.take(Stream::Stderr, text, start);
        }
        assert_eq!(log.kept_lines(), ["two", "three [redacted]"]);
        log.take(Stream::Stderr, "four", start + Duration::from_secs(5));
        assert_eq!(*seen.lock().unwrap(), [("one [redacted]".to_owned(), 0), ("four".to_owned(), 2)]);
    }
}
