//! Recording of groups, to give them to a proof worker again: `mine --record`.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use futures::future::BoxFuture;
use grail_ipc::jobs::ProveJob;
use grail_ipc::record::{RecordError, RecordWriter};
use grail_process::with_causes;
use grail_protocol::ids::{GroupIndex, WindowStart};

use crate::plan::WindowPlan;
use crate::proofs::{Proof, ProofError, Prover};

/// Where groups are recorded, if they are.
#[derive(Debug, Clone, Default)]
pub struct Recording {
    folder: Option<PathBuf>,
}

impl Recording {
    /// Into `folder`; unset records nothing.
    #[must_use]
    pub const fn into_folder(folder: Option<PathBuf>) -> Self {
        Self { folder }
    }

    /// `prover`, which records the groups of the window if they are to be.
    #[must_use]
    pub fn of_window(&self, plan: &WindowPlan, prover: Arc<dyn Prover>) -> Arc<dyn Prover> {
        match &self.folder {
            None => prover,
            Some(folder) => Arc::new(RecordingProver::new(folder, (plan.window, &plan.model_name), prover)),
        }
    }
}

/// File of a window's groups.
#[must_use]
pub fn path_of(folder: &Path, window: WindowStart) -> PathBuf {
    folder.join(format!("window-{window}.groups"))
}

/// Writes each job down once before it is proved. Mining does not depend on it: the first failure is logged, and nothing more is
/// recorded in the window.
#[derive(Debug)]
pub struct RecordingProver {
    prover: Arc<dyn Prover>,
    /// Unset once it has failed.
    file: Mutex<Option<OpenFile>>,
}

#[derive(Debug)]
struct OpenFile {
    writer: RecordWriter,
    held: HashSet<GroupIndex>,
}

impl RecordingProver {
    /// Records into the file of `window`, whose groups are of `model`, and proves with `prover`.
    #[must_use]
    pub fn new(folder: &Path, (window, model): (WindowStart, &str), prover: Arc<dyn Prover>) -> Self {
        let path = path_of(folder, window);
        let file = match OpenFile::open(&path, model) {
            Ok(file) => Some(file),
            Err(error) => {
                give_up(&error);
                None
            }
        };
        Self { prover, file: Mutex::new(file) }
    }

    fn record(&self, job: &ProveJob) {
        // A write of some hundred kilobytes into the page cache: not worth a thread.
        let mut place = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = place.as_mut() else { return };
        if !file.held.insert(job.group) {
            return;
        }
        if let Err(error) = file.writer.append(job) {
            give_up(&error);
            *place = None;
        }
    }
}

impl OpenFile {
    fn open(path: &Path, model: &str) -> Result<Self, RecordError> {
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(|source| RecordError::Io {
            action: "make the folder of",
            path: path.to_owned(),
            source,
        })?;
        let (writer, held) = RecordWriter::open(path, model)?;
        Ok(Self { writer, held: held.into_iter().collect() })
    }
}

fn give_up(error: &RecordError) {
    tracing::error!(error = with_causes(error), "Groups cannot be recorded; mining goes on without.");
}

impl Prover for RecordingProver {
    fn prove(&self, job: Arc<ProveJob>) -> BoxFuture<'_, Result<Proof, ProofError>> {
        self.record(&job);
        self.prover.prove(job)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use grail_ipc::jobs::GroupProof;
    use grail_ipc::messages::SlotId;
    use grail_ipc::record;
    use grail_protocol::ids::{TokenId, WeightsHash};
    use std::time::Duration;

    use super::*;

    #[derive(Debug)]
    struct Echo;

    impl Prover for Echo {
        fn prove(&self, job: Arc<ProveJob>) -> BoxFuture<'_, Result<Proof, ProofError>> {
            let group = GroupProof {
                group: job.group,
                weights: job.weights,
                prompt_sketches: vec![],
                members: vec![],
                compute: Duration::ZERO,
            };
            async { Ok(Proof { slot: SlotId(0), group }) }.boxed()
        }
    }

    fn job(group: i64) -> Arc<ProveJob> {
        Arc::new(ProveJob {
            group: GroupIndex(group),
            weights: WeightsHash(1),
            randomness: vec![1; 32],
            eos_token: TokenId(2),
            prompt: vec![TokenId(3)],
            completions: vec![vec![TokenId(4)]],
        })
    }

    fn window() -> WindowStart {
        WindowStart::try_from(3_000).unwrap()
    }

    async fn prove(prover: &RecordingProver, group: i64) {
        assert_eq!(prover.prove(job(group)).await.unwrap().group.group, GroupIndex(group));
    }

    #[tokio::test]
    async fn each_group_is_recorded_once_also_across_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("made");
        for groups in [[1, 2, 1], [2, 3, 3]] {
            let prover = RecordingProver::new(&folder, (window(), "m"), Arc::new(Echo));
            for group in groups {
                prove(&prover, group).await;
            }
        }
        let recorded = record::read(&path_of(&folder, window())).unwrap();
        assert_eq!(recorded.model, "m");
        assert_eq!(recorded.groups, [1, 2, 3].map(|group| (*job(group)).clone()));
    }

    #[tokio::test]
    async fn what_cannot_be_recorded_is_proved_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, b"").unwrap();
        let prover = RecordingProver::new(&file, (window(), "m"), Arc::new(Echo));
        prove(&prover, 1).await;
        assert!(prover.file.lock().unwrap().is_none(), "given up at the first failure");
    }

    #[tokio::test]
    async fn a_failed_write_ends_the_recording_and_not_the_mining() {
        let folder = tempfile::tempdir().unwrap();
        let prover = RecordingProver::new(folder.path(), (window(), "m"), Arc::new(Echo));
        prove(&prover, 1).await;
        let limited = Arc::new(ProveJob { completions: vec![vec![TokenId(4); 17 << 20]], ..(*job(2)).clone() });
        // A group that no frame can hold fails in the writer like any other error.
        prover.prove(limited).await.unwrap();
        assert!(prover.file.lock().unwrap().is_none());
        prove(&prover, 3).await;
        assert_eq!(record::read(&path_of(folder.path(), window())).unwrap().groups.len(), 1);
    }
}
