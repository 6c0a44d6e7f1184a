use std::sync::atomic::Ordering;

use super::super::backend::fake::FakeBackend;
use super::*;

const EOS: TokenId = TokenId(31);

fn ids(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

fn job(rid: &str, prompt: &[u32], max_new_tokens: usize) -> (Job, oneshot::Receiver<Finished>) {
    let (reply, answer) = oneshot::channel();
    let job = Job {
        rid: rid.to_owned(),
        prompt: ids(prompt),
        max_new_tokens,
        min_new_tokens: 0,
        sampling: Sampling::default(),
        stop_ids: Arc::new(BTreeSet::new()),
        poison_replacement: EOS,
        draws: DrawStream::of_request(1, rid),
        return_logprob: false,
        reply,
    };
    (job, answer)
}

fn scheduler(backend: FakeBackend, max_running: usize, kv_tokens: usize) -> Scheduler {
    Scheduler::new(Box::new(backend), Bounds { max_running, kv_tokens })
}

fn run_to_idle(scheduler: &mut Scheduler) {
    while !scheduler.is_idle() {
        scheduler.step().unwrap();
    }
}

/// What one sample gives on a server of its own.
fn alone(rid: &str, prompt: &[u32], max_new_tokens: usize) -> Vec<TokenId> {
    let mut scheduler = scheduler(FakeBackend::new(1), 1, 10_000);
    let (job, mut answer) = job(rid, prompt, max_new_tokens);
    scheduler.submit(job);
    run_to_idle(&mut scheduler);
    answer.try_recv().unwrap().output
}

#[test]
fn results_do_not_depend_on_the_batch() {
    let mut scheduler = scheduler(FakeBackend::new(4 + SPARE_SLOTS), 4, 10_000);
    let mut answers = Vec::new();
    for index in 0..24_u32 {
        let (rid, prompt, length) = (format!("r{index}"), [index % 3, 5, 7], 3 + index as usize % 9);
        let (job, answer) = job(&rid, &prompt, length);
        scheduler.submit(job);
        answers.push((rid, prompt, length, answer));
        if index % 5 == 0 {
            scheduler.step().unwrap();
        }
    }
    run_to_idle(&mut scheduler);
    for (rid, prompt, length, mut answer) in answers {
        let finished = answer.try_recv().unwrap();
        assert_eq!(finished.output, alone(&rid, &prompt, length), "{rid}");
        assert_eq!(finished.finish, Finish::Length);
    }
}

#[test]
fn at_most_max_running_run_and_the_rest_waits_in_order() {
    let mut scheduler = scheduler(FakeBackend::new(2 + SPARE_SLOTS), 2, 10_000);
    let mut answers: Vec<_> = (0..5)
        .map(|index| {
            let (job, answer) = job(&format!("r{index}"), &[1], 4);
            scheduler.submit(job);
            answer
        })
        .collect();
    scheduler.step().unwrap();
    assert_eq!((scheduler.load().running, scheduler.load().waiting), (2, 3));
    let mut order = Vec::new();
    while !scheduler.is_idle() {
        scheduler.step().unwrap();
        assert!(scheduler.load().running <= 2);
        for (index, answer) in answers.iter_mut().enumerate() {
            if answer.try_recv().is_ok() {
                order.push(index);
            }
        }
    }
    assert_eq!(order, [0, 1, 2, 3, 4]);
}

#[test]
fn an_identical_prompt_is_computed_once() {
    let backend = FakeBackend::new(4 + SPARE_SLOTS);
    let prefilled = Arc::clone(&backend.prefilled);
    let mut scheduler = scheduler(backend, 4, 10_000);
    let submit = |scheduler: &mut Scheduler, rid: &str, prompt: &[u32]| {
        let (job, answer) = job(rid, prompt, 6);
        scheduler.submit(job);
        answer
    };
    let mut answers: Vec<_> =
        (0..16).map(|index| submit(&mut scheduler, &format!("r{index}"), &[1, 2, 3, 4])).collect();
    run_to_idle(&mut scheduler);
    assert_eq!(prefilled.load(Ordering::Relaxed), 4);
    let cached: Vec<usize> = answers.iter_mut().map(|answer| answer.try_recv().unwrap().cached_tokens).collect();
    assert_eq!(cached[0], 0);
    assert!(cached[1..].iter().all(|cached| *cached == 3));
    // A later one finds it too, until the cache is flushed.
    let mut later = submit(&mut scheduler, "later", &[1, 2, 3, 4]);
    run_to_idle(&mut scheduler);
    assert_eq!(later.try_recv().unwrap().cached_tokens, 3);
    assert!(scheduler.flush());
    let mut after = submit(&mut scheduler, "after", &[1, 2, 3, 4]);
    assert!(!scheduler.flush(), "something waits");
    run_to_idle(&mut scheduler);
    assert_eq!(after.try_recv().unwrap().cached_tokens, 0);
    assert_eq!(prefilled.load(Ordering::Relaxed), 8);
    assert_eq!(scheduler.load().cached_prompt_tokens, 16 * 3);
}

#[test]
fn a_common_beginning_is_computed_once() {
    let backend = FakeBackend::new(4 + SPARE_SLOTS);
    let prefilled = Arc::clone(&backend.prefilled);
    let mut scheduler = scheduler(backend, 4, 10_000);
    let system: Vec<u32> = (0..20).collect();
    let prompt = |question: &[u32]| [system.as_slice(), question].concat();
    let (one, two) = (prompt(&[25, 26, 27]), prompt(&[28, 29]));
    let (first, mut first_answer) = job("one", &one, 5);
    let (second, mut second_answer) = job("two", &two, 5);
    scheduler.submit(first);
    scheduler.submit(second);
    run_to_idle(&mut scheduler);
    assert_eq!(prefilled.load(Ordering::Relaxed), 23 + 2);
    let (first, second) = (first_answer.try_recv().unwrap(), second_answer.try_recv().unwrap());
    assert_eq!((first.cached_tokens, second.cached_tokens), (0, 20));
    assert_eq!((first.output, second.output), (alone("one", &one, 5), alone("two", &two, 5)));
}

/// Many prompts through few slots: the fake refuses any slot that is filled twice or copied from when empty.
#[test]
fn few_slots_and_many_prompts_never_clash() {
    for slots in 1..6 {
        let mut scheduler = scheduler(FakeBackend::new(slots), slots, 10_000);
        let mut answers = Vec::new();
        for index in 0..40_u32 {
            let prompt = [index * index % 7, 3];
            let (job, answer) = job(&format!("r{index}"), &prompt, 1 + index as usize % 4);
            answers.push((index, prompt, answer));
            scheduler.submit(job);
        }
        run_to_idle(&mut scheduler);
        for (index, prompt, mut answer) in answers {
            let finished = answer.try_recv().unwrap();
            assert_eq!(finished.output, alone(&format!("r{index}"), &prompt, 1 + index as usize % 4));
        }
    }
}

#[test]
fn the_length_comes_before_a_stop_token() {
    let whole = alone("r", &[9, 9], 6);
    let run = |max_new_tokens: usize, stop: TokenId| {
        let mut scheduler = scheduler(FakeBackend::new(1), 1, 10_000);
        let (mut job, mut answer) = job("r", &[9, 9], max_new_tokens);
        job.stop_ids = Arc::new(BTreeSet::from([stop]));
        scheduler.submit(job);
        run_to_idle(&mut scheduler);
        answer.try_recv().unwrap()
    };
    let stop = whole[3];
    let first = whole.iter().position(|token| *token == stop).unwrap();
    let stopped = run(6, stop);
    assert_eq!((stopped.finish, stopped.output.as_slice()), (Finish::Stop(stop), &whole[..=first]));
    let ended = run(first + 1, stop);
    assert_eq!((ended.finish, ended.output.as_slice()), (Finish::Length, &whole[..=first]));
}

#[test]
fn stop_tokens_wait_for_the_least_length() {
    let mut scheduler = scheduler(FakeBackend::new(1), 1, 10_000);
    let (mut job, mut answer) = job("r", &[9, 9], 40);
    let stops: BTreeSet<TokenId> = (0..31).map(TokenId).collect();
    job.stop_ids = Arc::new(stops);
    job.min_new_tokens = 5;
    scheduler.submit(job);
    run_to_idle(&mut scheduler);
    let finished = answer.try_recv().unwrap();
    assert!(matches!(finished.finish, Finish::Stop(_) | Finish::Length));
    assert_eq!(finished.output[..5], [EOS; 5], "the only token that is no stop");
}

#[test]
fn no_tokens_asked_none_given() {
    let mut scheduler = scheduler(FakeBackend::new(1), 1, 10_000);
    let (job, mut answer) = job("r", &[1], 0);
    scheduler.submit(job);
    assert!(scheduler.is_idle());
    let finished = answer.try_recv().unwrap();
    assert_eq!((finished.finish, finished.output), (Finish::Length, vec![]));
}

#[test]
fn an_abort_gives_what_there_is() {
    let mut scheduler = scheduler(FakeBackend::new(2), 2, 10_000);
    let mut answers: Vec<_> = ["a-0", "a-1", "b-0", "a-2"]
        .into_iter()
        .map(|rid| {
            let (job, answer) = job(rid, &[1, 2], 50);
            scheduler.submit(job);
            answer
        })
        .collect();
    for _ in 0..3 {
        scheduler.step().unwrap();
    }
    scheduler.abort(&AbortTarget::Prefix("a-".to_owned()));
    let waiting = answers[3].try_recv().unwrap();
    assert_eq!((waiting.finish, waiting.output), (Finish::AbortedWaiting, vec![]));
    scheduler.step().unwrap();
    for (index, rid) in [(0, "a-0"), (1, "a-1")] {
        let finished = answers[index].try_recv().unwrap();
        assert_eq!(finished.finish, Finish::AbortedRunning);
        // One at the start, one a step, one more after the abort.
        assert_eq!(finished.output, alone(rid, &[1, 2], 5));
    }
    scheduler.abort(&AbortTarget::Prefix("nobody".to_owned()));
    run_to_idle(&mut scheduler);
    assert_eq!(answers[2].try_recv().unwrap().finish, Finish::Length);
}

#[test]
fn an_exact_abort_spares_longer_names() {
    let mut scheduler = scheduler(FakeBackend::new(1), 1, 10_000);
    let (first, mut first_answer) = job("r1", &[1], 3);
    let (second, mut second_answer) = job("r10", &[1], 3);
    scheduler.submit(first);
    scheduler.submit(second);
    scheduler.abort(&AbortTarget::Exactly("r1".to_owned()));
    assert_eq!(first_answer.try_recv().unwrap().finish, Finish::AbortedWaiting);
    scheduler.abort(&AbortTarget::All);
    assert_eq!(second_answer.try_recv().unwrap().finish, Finish::AbortedWaiting);
    assert!(scheduler.is_idle());
}

#[test]
fn poisoned_logits_are_told() {
    let mut backend = FakeBackend::new(1);
    backend.poison_at = Some(4);
    let mut scheduler = scheduler(backend, 1, 10_000);
    let (job, mut answer) = job("r", &[1, 2], 50);
    scheduler.submit(job);
    run_to_idle(&mut scheduler);
    let finished = answer.try_recv().unwrap();
    assert_eq!(finished.finish, Finish::Poison);
    assert_eq!((finished.output.len(), finished.output[2]), (3, EOS));
}

#[test]
fn a_full_pool_retracts_and_the_results_stay() {
    let backend = FakeBackend::new(8);
    // Three prompts of 4 with 20 tokens each want 72 tokens.
    let mut scheduler = scheduler(backend, 8, 40);
    let mut answers: Vec<_> = (0..3_u32)
        .map(|index| {
            let prompt = [index, 1, 2, 3];
            let (job, answer) = job(&format!("r{index}"), &prompt, 20);
            scheduler.submit(job);
            (index, prompt, answer)
        })
        .collect();
    while !scheduler.is_idle() {
        scheduler.step().unwrap();
        assert!(scheduler.load().used_tokens <= 40, "{:?}", scheduler.load());
    }
    let mut retractions = 0;
    for (index, prompt, answer) in &mut answers {
        let finished = answer.try_recv().unwrap();
        retractions += finished.retractions;
        assert_eq!(finished.output, alone(&format!("r{index}"), prompt, 20));
    }
    assert!(retractions > 0);
    assert_eq!(u64::from(retractions), scheduler.load().retractions);
}

#[test]
fn a_retracted_sample_keeps_its_tokens_when_it_is_aborted() {
    let mut scheduler = scheduler(FakeBackend::new(8), 8, 20);
    let mut answers: Vec<_> = ["r0", "r1"]
        .into_iter()
        .map(|rid| {
            let (job, answer) = job(rid, &[4, 4], 15);
            scheduler.submit(job);
            answer
        })
        .collect();
    while scheduler.load().retractions == 0 {
        scheduler.step().unwrap();
    }
    scheduler.abort(&AbortTarget::All);
    let finished = answers[1].try_recv().unwrap();
    assert_eq!((finished.finish, finished.retractions), (Finish::AbortedWaiting, 1));
    let given = finished.output.len();
    assert!(given > 1);
    assert_eq!(finished.output, alone("r1", &[4, 4], given));
}

#[test]
fn another_model_takes_over_only_when_nothing_runs() {
    let mut scheduler = scheduler(FakeBackend::new(2), 2, 10_000);
    let (first, mut first_answer) = job("r", &[1, 2], 5);
    scheduler.submit(first);
    scheduler.step().unwrap();
    let other = || Box::new(FakeBackend { salt: 99, ..FakeBackend::new(2) });
    assert!(scheduler.replace(other()).is_err());
    run_to_idle(&mut scheduler);
    assert!(scheduler.replace(other()).is_ok());
    let (second, mut second_answer) = job("r", &[1, 2], 5);
    scheduler.submit(second);
    run_to_idle(&mut scheduler);
    let (first, second) = (first_answer.try_recv().unwrap(), second_answer.try_recv().unwrap());
    assert_ne!(first.output, second.output);
    assert_eq!(second.cached_tokens, 0, "nothing of the old model is used");
}

#[test]
fn a_broken_model_leaves_requests_unanswered() {
    let mut backend = FakeBackend::new(2);
    backend.fail_at_step = Some(2);
    let mut scheduler = scheduler(backend, 2, 10_000);
    let (job, mut answer) = job("r", &[1], 50);
    scheduler.submit(job);
    scheduler.step().unwrap();
    let error = scheduler.step().unwrap_err();
    assert_eq!(error.to_string(), "step failed: told to fail");
    drop(scheduler);
    assert_eq!(answer.try_recv(), Err(oneshot::error::TryRecvError::Closed));
}

#[test]
fn logprobs_come_with_the_tokens_if_asked() {
    let mut scheduler = scheduler(FakeBackend::new(1), 1, 10_000);
    let (mut job, mut answer) = job("r", &[1, 2], 4);
    job.return_logprob = true;
    job.sampling.temperature = 0.7;
    scheduler.submit(job);
    run_to_idle(&mut scheduler);
    let finished = answer.try_recv().unwrap();
    let model = FakeBackend::new(1);
    let mut sequence = ids(&[1, 2]);
    for (token, logprob) in finished.output.iter().zip(&finished.logprobs) {
        let row: Vec<f64> = model.logits(&sequence).iter().map(|logit| f64::from(*logit) / 0.7).collect();
        let total: f64 = row.iter().map(|logit| logit.exp()).sum();
        let expected = row[token.0 as usize] - total.ln();
        assert!((f64::from(*logprob) - expected).abs() < 1e-5);
        sequence.push(*token);
    }
    assert_eq!(finished.logprobs.len(), 4);
}
