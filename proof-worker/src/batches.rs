//! Groups that are proved together, and the next ones begun while they are.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use grail_ipc::jobs::{GroupProof, ProveJob};
use grail_ipc::messages::RequestId;
use grail_process::fault::{Armed, Point};
use tracing::debug;

use crate::compute::{Known, Outcome, Outcomes, Work, failed, injected, panic_text};
use crate::prover::{ComputeError, Prover, Proving};

/// How often a device is asked whether it is done while more requests may come: far below the time of a batch, and no load.
const LOOK: Duration = Duration::from_micros(500);

/// A group to prove, and who wants it.
#[derive(Debug)]
pub(crate) struct Request {
    pub id: RequestId,
    pub job: ProveJob,
    pub outcomes: Outcomes,
}

/// Groups that were begun.
struct Begun {
    requests: Vec<Request>,
    proving: Box<dyn Proving>,
}

/// The line of work before a prover: requests that come one after the other are proved together where that is faster, and the
/// next ones are begun while the device still computes.
pub(crate) struct Batches<'a> {
    inbox: &'a mpsc::Receiver<Work>,
    known: &'a Known,
    faults: &'a Armed,
    /// Taken from the inbox, and not part of the batch that was begun.
    next: Option<Work>,
    running: Option<Begun>,
}

impl<'a> Batches<'a> {
    pub(crate) const fn new(inbox: &'a mpsc::Receiver<Work>, known: &'a Known, faults: &'a Armed) -> Self {
        Self { inbox, known, faults, next: None, running: None }
    }

    /// The next work; what is running is finished when it is done, or when nothing more will come. `None` at the end.
    pub(crate) fn next(&mut self) -> Option<Work> {
        if let Some(work) = self.next.take() {
            return Some(work);
        }
        while let Some(running) = &self.running {
            match self.inbox.recv_timeout(LOOK) {
                Ok(work) => return Some(work),
                Err(RecvTimeoutError::Timeout) if !running.proving.is_done() => {}
                Err(_) => self.finish(),
            }
        }
        self.inbox.recv().ok()
    }

    /// Proves `first` together with the requests behind it that fit one batch, and finishes what was begun before.
    pub(crate) fn prove(&mut self, prover: &dyn Prover, first: Request) {
        let requests: Vec<Request> =
            self.together(prover, first).into_iter().filter_map(|request| self.admit(prover, request)).collect();
        if requests.is_empty() {
            return;
        }
        let jobs: Vec<&ProveJob> = requests.iter().map(|request| &request.job).collect();
        let begun = catch_unwind(AssertUnwindSafe(|| prover.begin(&jobs)));
        self.finish();
        match begun {
            Ok(proving) => self.running = Some(Begun { requests, proving }),
            Err(panic) => {
                let error = ComputeError::Panicked { detail: panic_text(&*panic) };
                requests.into_iter().for_each(|request| self.answer(request, Err(error.clone())));
            }
        }
        if self.running.as_ref().is_some_and(|running| running.proving.is_done()) {
            self.finish();
        }
    }

    /// Waits for what is running, and answers.
    pub(crate) fn finish(&mut self) {
        let Some(Begun { requests, proving }) = self.running.take() else { return };
        let results = catch_unwind(AssertUnwindSafe(|| proving.finish()))
            .unwrap_or_else(|panic| vec![Err(ComputeError::Panicked { detail: panic_text(&*panic) }); requests.len()]);
        for (request, result) in requests.into_iter().zip(results) {
            self.answer(request, result);
        }
    }

    /// `first` and the requests that are waiting directly behind it, as many as fit.
    fn together(&mut self, prover: &dyn Prover, first: Request) -> Vec<Request> {
        let budget = prover.batch_tokens();
        let mut tokens = first.job.tokens();
        let mut requests = vec![first];
        while tokens < budget {
            match self.inbox.try_recv() {
                Ok(Work::Prove(request)) if tokens + request.job.tokens() <= budget => {
                    tokens += request.job.tokens();
                    requests.push(request);
                }
                Ok(other) => {
                    self.next = Some(other);
                    break;
                }
                Err(_) => break,
            }
        }
        requests
    }

    /// The request, if somebody wants it still, the weights are those asked for, and no fault comes between.
    fn admit(&self, prover: &dyn Prover, request: Request) -> Option<Request> {
        if request.outcomes.is_closed() {
            debug!("Skipped a request whose sender has gone.");
            return None;
        }
        let (asked, loaded) = (request.job.weights, prover.weights());
        let right = if asked == loaded { Ok(()) } else { Err(ComputeError::WrongWeights { asked, loaded }) };
        match right.and_then(|()| injected(self.faults.reach(Point::MidProof))) {
            Ok(()) => Some(request),
            Err(error) => {
                self.answer(request, Err(error));
                None
            }
        }
    }

    fn answer(&self, request: Request, result: Result<GroupProof, ComputeError>) {
        let outcome = match result {
            Ok(proof) => {
                self.known.count(&proof);
                debug!(group = %proof.group, tokens = request.job.tokens(), compute = ?proof.compute, "Group proved.");
                Outcome::Proved { id: request.id, proof }
            }
            Err(error) => failed(request.id, error),
        };
        // Whoever asked may have gone meanwhile.
        drop(request.outcomes.send(outcome));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use grail_ipc::jobs::{RowFacts, VerifyJob};
    use grail_protocol::ids::{GroupIndex, TokenId, WeightsHash};
    use tokio::sync::mpsc as async_mpsc;

    use super::*;
    use crate::prover::Reloader;

    const WEIGHTS: WeightsHash = WeightsHash(1);

    /// What a device was told, in order.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<String>>>);

    impl Log {
        fn write(&self, what: &str, groups: &[i64]) {
            self.0.lock().unwrap().push(format!("{what} {groups:?}"));
        }

        fn lines(&self) -> Vec<String> {
            self.0.lock().unwrap().clone()
        }
    }

    /// A device that is never done before somebody waits for it, and panics over group 13.
    struct Slow {
        log: Log,
        batch_tokens: usize,
    }

    struct SlowBatch {
        log: Log,
        groups: Vec<i64>,
    }

    impl Proving for SlowBatch {
        fn is_done(&self) -> bool {
            false
        }

        fn finish(self: Box<Self>) -> Vec<Result<GroupProof, ComputeError>> {
            self.log.write("finish", &self.groups);
            let proof = |group: &i64| {
                let (group, weights) = (GroupIndex(*group), WEIGHTS);
                Ok(GroupProof { group, weights, prompt_sketches: vec![], members: vec![], compute: Duration::ZERO })
            };
            self.groups.iter().map(proof).collect()
        }
    }

    impl Prover for Slow {
        fn weights(&self) -> WeightsHash {
            WEIGHTS
        }

        fn device(&self) -> String {
            String::new()
        }

        fn prove(&self, _: &ProveJob) -> Result<GroupProof, ComputeError> {
            panic!("groups are begun")
        }

        fn verify(&self, _: &VerifyJob) -> Result<Vec<RowFacts>, ComputeError> {
            panic!("nothing is verified here")
        }

        fn reloader(&self) -> Box<dyn Reloader> {
            panic!("nothing is reloaded here")
        }

        fn batch_tokens(&self) -> usize {
            self.batch_tokens
        }

        fn begin(&self, jobs: &[&ProveJob]) -> Box<dyn Proving> {
            let groups: Vec<i64> = jobs.iter().map(|job| job.group.0).collect();
            assert!(!groups.contains(&13), "as told");
            self.log.write("begin", &groups);
            Box::new(SlowBatch { log: self.log.clone(), groups })
        }
    }

    fn request(group: i64, weights: WeightsHash, outcomes: &Outcomes) -> Work {
        let id = RequestId(u64::try_from(group).unwrap());
        let (randomness, eos_token) = (vec![0; 32], TokenId(0));
        // Ten tokens each.
        let (prompt, completions) = (vec![TokenId(1); 4], vec![vec![TokenId(2); 3]; 2]);
        let job = ProveJob { group: GroupIndex(group), weights, randomness, eos_token, prompt, completions };
        Work::Prove(Request { id, job, outcomes: outcomes.clone() })
    }

    /// Lets the groups through, and returns what the device was told and how each was answered.
    fn run(batch_tokens: usize, groups: &[(i64, WeightsHash)]) -> (Vec<String>, Vec<Outcome>) {
        let (work, inbox) = mpsc::channel();
        let (outcomes, mut answers) = async_mpsc::unbounded_channel();
        for (group, weights) in groups {
            work.send(request(*group, *weights, &outcomes)).unwrap();
        }
        drop((work, outcomes));
        let (known, faults) = (Known::default(), Armed::default());
        let prover = Slow { log: Log::default(), batch_tokens };
        let mut batches = Batches::new(&inbox, &known, &faults);
        while let Some(work) = batches.next() {
            let Work::Prove(request) = work else { panic!("only groups were sent") };
            batches.prove(&prover, request);
        }
        (prover.log.lines(), std::iter::from_fn(|| answers.blocking_recv()).collect())
    }

    fn sent(groups: &[i64]) -> Vec<(i64, WeightsHash)> {
        groups.iter().map(|group| (*group, WEIGHTS)).collect()
    }

    #[test]
    fn groups_that_fit_are_proved_together_and_the_next_begun_before_they_are_finished() {
        let (log, outcomes) = run(25, &sent(&[1, 2, 3, 4, 5]));
        assert_eq!(log, ["begin [1, 2]", "begin [3, 4]", "finish [1, 2]", "begin [5]", "finish [3, 4]", "finish [5]"]);
        let proved: Vec<i64> = outcomes
            .iter()
            .map(|outcome| match outcome {
                Outcome::Proved { proof, .. } => proof.group.0,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(proved, [1, 2, 3, 4, 5]);
    }

    #[test]
    fn one_group_at_a_time_where_that_is_asked_for() {
        let (log, _) = run(0, &sent(&[1, 2]));
        assert_eq!(log, ["begin [1]", "begin [2]", "finish [1]", "finish [2]"]);
        let (log, _) = run(5, &sent(&[1, 2]));
        assert_eq!(log[0], "begin [1]", "a group larger than the budget goes alone");
    }

    #[test]
    fn a_request_for_other_weights_leaves_the_rest_of_its_batch_alone() {
        let (log, outcomes) = run(100, &[(1, WEIGHTS), (2, WeightsHash(9)), (3, WEIGHTS)]);
        assert_eq!(log, ["begin [1, 3]", "finish [1, 3]"]);
        assert!(matches!(&outcomes[0], Outcome::Failed { id: RequestId(2), error: ComputeError::WrongWeights { .. } }));
        assert_eq!(outcomes.len(), 3);
    }

    #[test]
    fn a_panic_is_the_answer_to_its_batch_and_to_no_other() {
        let (log, outcomes) = run(0, &sent(&[1, 13, 2]));
        assert_eq!(log, ["begin [1]", "finish [1]", "begin [2]", "finish [2]"]);
        assert!(matches!(&outcomes[1], Outcome::Failed { id: RequestId(13), error: ComputeError::Panicked { .. } }));
        assert!(matches!(&outcomes[..], [Outcome::Proved { .. }, _, Outcome::Proved { .. }]));
    }
}
