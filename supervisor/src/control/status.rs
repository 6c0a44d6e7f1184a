//! What a running supervisor says about itself, for people and for programs.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use grail_protocol::ids::CheckpointWindow;
use serde::{Deserialize, Serialize};

use crate::fleet::{ServerStatus, SlotStatus};
use crate::progress::{LastUpload, Phase, Snapshot};
use crate::shutdown::Urgency;
use crate::terminal::printable;

/// Version of the JSON form of all answers of the control commands.
pub const SCHEMA: u32 = 1;

const MIB: u64 = 1 << 20;

/// State of a supervisor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    pub build: String,
    pub pid: u32,
    pub state_dir: PathBuf,
    /// Wall clock, for people; [`Self::up_seconds`] is measured.
    pub started_unix_ms: u64,
    pub up_seconds: u64,
    pub phase: Phase,
    pub stopping: Urgency,
    /// What is waited for, once it is told to stop.
    pub awaits: Option<String>,
    /// Counters of the window that runs or ran last.
    pub window: Option<Snapshot>,
    pub last_upload: Option<LastUpload>,
    /// Checkpoints whose folders must stay: the one that is mined with, what it was made from, what was fetched ahead.
    pub checkpoints_in_use: BTreeSet<CheckpointWindow>,
    pub slots: Vec<SlotStatus>,
    pub server: Option<ServerStatus>,
}

/// What a miner in `phase` must still do before it can end.
#[must_use]
pub fn awaited(phase: Phase, window: &Snapshot, children: usize) -> String {
    match phase {
        Phase::Starting => "the start of the children".to_owned(),
        Phase::Waiting => "the next look at the chain".to_owned(),
        Phase::Mining if window.generating + window.proving > 0 => format!(
            "{} groups in generation and {} in proof; {} are spooled",
            window.generating, window.proving, window.spooled
        ),
        Phase::Mining => format!("the file of window {} to be sealed, {} groups", window.window, window.spooled),
        Phase::Uploading => format!("the upload of window {}", window.window),
        Phase::Ending => format!("the end of {children} child processes"),
    }
}

impl Status {
    /// One document with its schema number.
    ///
    /// # Errors
    /// None in practice: every part has a JSON form.
    pub fn to_json(&self) -> serde_json::Result<serde_json::Value> {
        let mut document = serde_json::json!({ "schema": SCHEMA });
        if let (Some(document), serde_json::Value::Object(parts)) =
            (document.as_object_mut(), serde_json::to_value(self)?)
        {
            document.extend(parts);
        }
        Ok(document)
    }

    /// Lines for people; `now_unix_ms` is the reader's clock.
    #[must_use]
    pub fn render(&self, now_unix_ms: u64) -> String {
        let mut text = format!(
            "supervisor {}, pid {}, up {}, state directory {}\n",
            self.build,
            self.pid,
            duration(self.up_seconds),
            self.state_dir.display()
        );
        // Writing to a text cannot fail.
        let mut line = |content: &str| writeln!(text, "{}", printable(content.trim_end())).unwrap_or_default();
        line(&self.doing());
        if let Some(upload) = &self.last_upload {
            let ago = Duration::from_millis(now_unix_ms.saturating_sub(upload.unix_ms)).as_secs();
            line(&format!("last upload: window {}, {} bytes, {} ago", upload.window, upload.bytes, duration(ago)));
        }
        if !self.checkpoints_in_use.is_empty() {
            let windows: Vec<String> = self.checkpoints_in_use.iter().map(ToString::to_string).collect();
            line(&format!("checkpoints in use: {}", windows.join(", ")));
        }
        if let Some(server) = &self.server {
            line(&describe_server(server));
        }
        slot_table(&self.slots).iter().for_each(|row| line(row));
        text
    }

    fn doing(&self) -> String {
        let doing = match (self.phase, &self.window) {
            (Phase::Starting, _) => "starting".to_owned(),
            (Phase::Mining, Some(window)) => window.to_string(),
            (Phase::Uploading, Some(window)) => format!("window {} · uploading", window.window),
            (Phase::Ending, _) => "ending".to_owned(),
            _ => "waiting for the next window".to_owned(),
        };
        let told = match self.stopping {
            Urgency::None => return doing,
            Urgency::Drain => "stopping",
            Urgency::Now | Urgency::AtOnce => "stopping now",
        };
        format!("{told}, waiting for {} · {doing}", self.awaits.as_deref().unwrap_or("nothing"))
    }
}

fn describe_server(server: &ServerStatus) -> String {
    let mut parts = vec![format!("server: {}", server.state)];
    parts.extend(server.pid.map(|pid| format!("launcher pid {pid}")));
    parts.extend(server.server_pid.map(|pid| format!("server pid {pid}")));
    parts.extend(server.url.clone());
    parts.extend(server.weights.as_ref().map(|weights| format!("weights {weights}")));
    parts.push(deaths(server.deaths, server.last_death.as_deref()));
    parts.extend(server.detail.clone());
    parts.join(" · ")
}

fn deaths(number: u64, last: Option<&str>) -> String {
    match (number, last) {
        (0, _) => "no deaths".to_owned(),
        (number, Some(last)) => format!("{number} deaths, the last: {last}"),
        (number, None) => format!("{number} deaths"),
    }
}

/// Columns as wide as their widest cell; numbers to the right would gain nothing, since each has its own unit.
fn slot_table(slots: &[SlotStatus]) -> Vec<String> {
    if slots.is_empty() {
        return Vec::new();
    }
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let header =
        ["SLOT", "STATE", "PID", "EPOCH", "DEVICE", "WEIGHTS", "JOBS", "TOKENS", "GROUPS", "MEMORY", "DEATHS", "NOTE"];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(slots.iter().map(|slot| {
        let note = slot.detail.clone().or_else(|| slot.last_death.as_ref().map(|cause| format!("last death: {cause}")));
        [
            slot.slot.to_string(),
            slot.state.clone(),
            or_dash(slot.pid.map(|pid| pid.to_string())),
            slot.epoch.to_string(),
            or_dash(slot.device.clone()),
            or_dash(slot.weights.map(|weights| weights.to_string().chars().take(8).collect())),
            slot.jobs.to_string(),
            slot.tokens.to_string(),
            slot.groups.to_string(),
            or_dash(slot.resident_bytes.map(|bytes| format!("{} MiB", bytes / MIB))),
            slot.deaths.to_string(),
            note.unwrap_or_default(),
        ]
    }));
    let widths: [usize; 12] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    rows.iter()
        .map(|row| row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}  ")).collect::<String>())
        .collect()
}

/// Seconds as people say them.
#[must_use]
pub fn duration(seconds: u64) -> String {
    match (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, seconds) => format!("{seconds} s"),
        (0, 0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (0, hours, minutes, _) => format!("{hours} h {minutes} min"),
        (days, hours, _, _) => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> Snapshot {
        Snapshot {
            window: 3_000,
            blocks_left: 21,
            generating: 2,
            proving: 1,
            spooled: 5,
            dropped: 0,
            workers_ready: 1,
            workers: 2,
            rollouts_per_second: 33.71,
        }
    }

    fn slot(number: u32) -> SlotStatus {
        SlotStatus {
            slot: number,
            state: "ready".into(),
            pid: Some(4_711),
            epoch: 2,
            device: Some("cpu".into()),
            weights: Some(grail_protocol::ids::WeightsHash(7)),
            deaths: 1,
            last_death: Some("signal 9".into()),
            detail: None,
            jobs: 2,
            tokens: 1_200,
            groups: 9,
            resident_bytes: Some(300 << 20),
        }
    }

    fn status() -> Status {
        Status {
            build: "0.1.0".into(),
            pid: 42,
            state_dir: "/var/lib/grail".into(),
            started_unix_ms: 1_000,
            up_seconds: 3_725,
            phase: Phase::Mining,
            stopping: Urgency::None,
            awaits: None,
            window: Some(snapshot()),
            last_upload: Some(LastUpload { window: 2_970, bytes: 123_456, unix_ms: 10_000, took_ms: Some(1_500) }),
            checkpoints_in_use: BTreeSet::from([CheckpointWindow(2_970), CheckpointWindow(3_000)]),
            slots: vec![
                slot(0),
                SlotStatus {
                    state: "quarantined".into(),
                    pid: None,
                    device: None,
                    weights: None,
                    detail: Some("for 60 s\u{1b}[31m".into()),
                    resident_bytes: None,
                    ..slot(1)
                },
            ],
            server: Some(ServerStatus {
                state: "serving".into(),
                pid: Some(43),
                server_pid: Some(44),
                url: Some("http://127.0.0.1:30000".into()),
                weights: Some("07".into()),
                deaths: 0,
                last_death: None,
                detail: None,
            }),
        }
    }

    #[test]
    fn the_table() {
        insta::assert_snapshot!(status().render(95_000));
    }

    #[test]
    fn a_miner_that_stops_says_what_it_waits_for() {
        let awaits = awaited(Phase::Mining, &snapshot(), 3);
        let text = Status { stopping: Urgency::Drain, awaits: Some(awaits), ..status() }.render(0);
        assert!(text.contains("stopping, waiting for 2 groups in generation and 1 in proof; 5 are spooled"), "{text}");
        let idle = Snapshot { generating: 0, proving: 0, ..snapshot() };
        assert_eq!(awaited(Phase::Mining, &idle, 0), "the file of window 3000 to be sealed, 5 groups");
        assert_eq!(awaited(Phase::Ending, &idle, 3), "the end of 3 child processes");
    }

    #[test]
    fn the_document() {
        insta::assert_json_snapshot!(status().to_json().unwrap());
    }

    #[test]
    fn durations_have_two_parts_at_most() {
        let texts = [59, 61, 3_661, 90_000].map(duration);
        assert_eq!(texts, ["59 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"]);
    }
}
