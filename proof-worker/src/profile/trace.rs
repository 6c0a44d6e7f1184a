//! A trace in the JSON format of Chrome and Perfetto.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::error::WorkerError;

/// Something that began and ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    pub name: String,
    /// `group` or `stage`.
    pub category: &'static str,
    /// Row in the picture.
    pub lane: u32,
    /// From the beginning of the trace.
    pub start: Duration,
    pub length: Duration,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'e> {
    trace_events: Vec<CompleteEvent<'e>>,
    display_time_unit: &'static str,
}

#[derive(Serialize)]
struct CompleteEvent<'e> {
    name: &'e str,
    cat: &'static str,
    /// `X`: an event with its length.
    ph: &'static str,
    /// Microseconds.
    ts: f64,
    dur: f64,
    pid: u32,
    tid: u32,
}

/// Writes `events` to `path`.
///
/// # Errors
/// [`WorkerError::Trace`].
pub(crate) fn write(path: &Path, events: &[Event]) -> Result<(), WorkerError> {
    let microseconds = |time: Duration| time.as_secs_f64() * 1e6;
    let pid = std::process::id();
    let trace_events = events
        .iter()
        .map(|event| CompleteEvent {
            name: &event.name,
            cat: event.category,
            ph: "X",
            ts: microseconds(event.start),
            dur: microseconds(event.length),
            pid,
            tid: event.lane,
        })
        .collect();
    let document = Document { trace_events, display_time_unit: "ms" };
    let failed = |source| WorkerError::Trace { path: path.to_owned(), source };
    let text = serde_json::to_vec(&document).map_err(|error| failed(error.into()))?;
    std::fs::write(path, text).map_err(failed)
}
