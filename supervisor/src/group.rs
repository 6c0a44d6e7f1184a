//! One group from its index to a signed record: task, sixteen completions, proof and rewards side by side, signatures.
//!
//! A group is whole or it does not exist: any miss drops it, and its index stays used.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{try_join, try_join_all};
use grail_environments::{Environment, Evaluation, Task};
use grail_ipc::bulk;
use grail_ipc::generate_api::SamplingParams;
use grail_ipc::jobs::ProveJob;
use grail_ipc::record::{RecordError, RecordWriter};
use grail_process::with_causes;
use grail_protocol::binding::CommitBinding;
use grail_protocol::constants::{CHALLENGE_K, MIN_EOS_PROBABILITY};
use grail_protocol::ids::{BlockNumber, GroupIndex, Nonce, RolloutIndex, TokenId, WeightsHash};
use grail_protocol::keys::Keypair;
use grail_protocol::termination::CompletionEnd;
use grail_protocol::{advantage, binding, hash, nonce, seed};
use grail_text::{ChatTemplate, Tokenizer};

use crate::checkpoints::CheckpointRule;
use crate::clock::Clock;
use crate::generation::{GenerationError, Generator, Sample};
use crate::intake::Admitted;
use crate::offload::Offload;
use crate::plan::WindowPlan;
use crate::progress::{Progress, Stage};
use crate::proofs::{Proof, ProofError, Prover};
use crate::spool::{SpooledGroup, SpooledRollout};

/// What all groups of a window work with.
#[derive(Debug)]
pub struct WindowParts {
    pub plan: WindowPlan,
    pub environment: Arc<dyn Environment>,
    pub tokenizer: Arc<Tokenizer>,
    pub template: Arc<ChatTemplate>,
    pub eos_token: TokenId,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    /// Tokens that the server holds for one sequence.
    pub max_model_len: usize,
    pub generator: Arc<dyn Generator>,
    pub prover: Arc<dyn Prover>,
    /// Says when the checkpoint turns out to be another one.
    pub rule: Arc<dyn CheckpointRule>,
    pub signer: Arc<Keypair>,
    pub progress: Arc<Progress>,
    /// Where the inputs of groups are kept that kill workers.
    pub poisonous_dir: PathBuf,
    pub clock: Clock,
    pub offload: Offload,
}

/// Why a group was dropped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Dropped {
    #[error("no task for the group's seed")]
    Task(#[source] grail_environments::TaskError),
    #[error("prompt cannot be rendered")]
    Prompt(#[source] grail_text::PromptError),
    #[error("prompt of {prompt} tokens and {max_new} new ones do not fit into GRAIL_PIPELINE_MAX_MODEL_LEN={limit}")]
    TooLong { prompt: usize, max_new: usize, limit: usize },
    #[error("sample failed")]
    Generation(#[from] GenerationError),
    #[error("rollout {rollout} has {tokens} tokens, fewer than {CHALLENGE_K}")]
    TooShort { rollout: RolloutIndex, tokens: usize },
    #[error("proof failed")]
    Proof(#[from] ProofError),
    #[error("proof was made with weights {proof}, the window's are {plan}")]
    OtherWeights { proof: WeightsHash, plan: WeightsHash },
    #[error(
        "rollout {rollout} ends after {tokens} of {max_new} tokens with an EOS probability of {probability}, which a validator refuses"
    )]
    BadEnd { rollout: RolloutIndex, tokens: usize, max_new: u32, probability: f32 },
    #[error("logprob {logprob} of rollout {rollout} is not finite")]
    NotFinite { rollout: RolloutIndex, logprob: f32 },
    #[error("completion of rollout {rollout} cannot be decoded")]
    Decode { rollout: RolloutIndex, source: grail_text::TokenizeError },
    #[error(transparent)]
    Unevaluable(#[from] grail_environments::GroupUnevaluable),
    #[error("signing task failed")]
    Signing(#[source] tokio::task::JoinError),
}

/// Completions of one group, before proof and score.
#[derive(Debug)]
struct Generated {
    task: Task,
    /// Prompt, completions and what else a worker needs; the same for every try.
    job: Arc<ProveJob>,
}

/// Takes one group through all stages.
///
/// # Errors
/// [`Dropped`] says what the group failed on; nothing of it is kept.
pub async fn run(
    parts: Arc<WindowParts>,
    (group, admitted): (GroupIndex, Admitted),
    block: BlockNumber,
) -> Result<SpooledGroup, Dropped> {
    let stage = parts.progress.enter(Stage::Generating);
    let generated = generate(&parts, group, admitted).await?;
    let stage = stage.next(Stage::Proving);
    let (proof, evaluations) = try_join(prove(&parts, &generated), evaluate(&parts, &generated)).await?;
    check_proof(&parts, &generated, &proof)?;
    drop(stage);
    // Thirty-two signatures and the hashes of sixteen rollouts: milliseconds that the event loop should not wait for.
    let offload = parts.offload;
    offload.run(move || sign(&parts, group, block, &generated, &proof, &evaluations)).await.map_err(Dropped::Signing)
}

async fn generate(parts: &WindowParts, group: GroupIndex, admitted: Admitted) -> Result<Generated, Dropped> {
    let plan = &parts.plan;
    let seed = seed::environment_seed(&plan.hotkey, &plan.window_hash, group);
    let task = parts.environment.task(seed).map_err(Dropped::Task)?;
    let prompt: Arc<[TokenId]> =
        grail_environments::prompt_ids(&task, plan.thinking, &parts.tokenizer, &parts.template)
            .map_err(Dropped::Prompt)?
            .into();
    let max_new = plan.sampling.max_new();
    if prompt.len() + max_new as usize > parts.max_model_len {
        return Err(Dropped::TooLong { prompt: prompt.len(), max_new: max_new as usize, limit: parts.max_model_len });
    }
    let Admitted { samples, group: counted } = admitted;
    let draws = RolloutIndex::all().zip(samples).map(|(rollout, sample)| {
        let prompt = prompt.clone();
        async move {
            let drawn = draw(parts, (group, rollout), &prompt, max_new).await;
            drop(sample);
            drawn
        }
    });
    let completions = try_join_all(draws).await?;
    drop(counted);
    let job = ProveJob {
        group,
        weights: plan.weights,
        randomness: plan.randomness.to_bytes().to_vec(),
        eos_token: parts.eos_token,
        prompt: prompt.to_vec(),
        completions,
    };
    Ok(Generated { task, job: Arc::new(job) })
}

/// Draws a completion that can be used. One that cannot is drawn again, under another name: what a server draws may follow from the
/// name. One sample of sixteen must not cost the others, which are drawn already.
async fn draw(
    parts: &WindowParts,
    (group, rollout): (GroupIndex, RolloutIndex),
    prompt: &Arc<[TokenId]>,
    max_new: u32,
) -> Result<Vec<TokenId>, Dropped> {
    let name = format!("w{}-g{group}-r{rollout}", parts.plan.window);
    let mut again = 0;
    loop {
        let rid = if again == 0 { name.clone() } else { format!("{name}-t{again}") };
        let sampling = sampling_params(&parts.plan, max_new);
        let reason = match parts.generator.sample(Sample { rid, prompt: prompt.clone(), sampling }).await {
            Ok(completion) if completion.len() < CHALLENGE_K => Dropped::TooShort { rollout, tokens: completion.len() },
            Ok(completion) => return Ok(completion),
            Err(error) if error.may_be_drawn_again() => error.into(),
            Err(error) => return Err(error.into()),
        };
        if again == MOST_DRAWN_AGAIN {
            return Err(reason);
        }
        again += 1;
        tracing::debug!(%group, %rollout, reason = with_causes(&reason), "A sample is drawn again.");
        tokio::time::sleep(PAUSE_BEFORE_AGAIN * again).await;
    }
}

/// How often a sample is drawn again.
const MOST_DRAWN_AGAIN: u32 = 2;
/// What a server that has too much to do is given, growing.
const PAUSE_BEFORE_AGAIN: Duration = Duration::from_millis(100);

/// The checkpoint's policy in the server's words: 0 switches top-k off there too, and a top-p of 0 means the single most
/// likely token, which the server only takes as a tiny number.
fn sampling_params(plan: &WindowPlan, max_new: u32) -> SamplingParams {
    let policy = &plan.sampling;
    SamplingParams {
        max_new_tokens: max_new,
        temperature: policy.temperature,
        top_p: policy.top_p.max(1e-6),
        top_k: if policy.top_k == 0 { -1 } else { i64::from(policy.top_k) },
        min_p: 0.0,
        repetition_penalty: policy.repetition_penalty,
        stop_token_ids: Vec::new(),
        ignore_eos: false,
        skip_special_tokens: false,
        n: 1,
        sampling_seed: None,
    }
}

async fn prove(parts: &WindowParts, generated: &Generated) -> Result<Proof, Dropped> {
    let proved = parts.prover.prove(generated.job.clone()).await;
    if let Err(ProofError::Poisonous { deaths }) = &proved {
        keep_poisonous(parts, &generated.job, *deaths).await;
    }
    Ok(proved?)
}

/// Keeps what killed workers for inspection: `grail-proof-worker profile --recorded` gives it to a worker again.
async fn keep_poisonous(parts: &WindowParts, job: &Arc<ProveJob>, deaths: u32) {
    let path = parts.poisonous_dir.join(format!("window-{}-group-{}.groups", parts.plan.window, job.group));
    let (kept, job, model) = (path.clone(), job.clone(), parts.plan.model_name.clone());
    let write = move || {
        std::fs::create_dir_all(kept.parent().unwrap_or(&kept)).map_err(|source| RecordError::Io {
            action: "create the folder of",
            path: kept.clone(),
            source,
        })?;
        let (mut writer, held) = RecordWriter::open(&kept, &model)?;
        if held.is_empty() { writer.append(&job) } else { Ok(()) }
    };
    match parts.offload.run(write).await {
        Ok(Ok(())) => tracing::error!(deaths, kept = %path.display(), "A group kills workers; its inputs are kept."),
        Ok(Err(error)) => tracing::error!(deaths, error = with_causes(&error), "A poisonous group cannot be kept."),
        Err(error) => tracing::error!(deaths, %error, "A poisonous group cannot be kept."),
    }
}

async fn evaluate(parts: &WindowParts, generated: &Generated) -> Result<Vec<Evaluation>, Dropped> {
    let texts = RolloutIndex::all()
        .zip(&generated.job.completions)
        .map(|(rollout, completion)| {
            parts.tokenizer.decode(completion).map_err(|source| Dropped::Decode { rollout, source })
        })
        .collect::<Result<Vec<String>, _>>()?;
    Ok(parts.environment.evaluate_group(&generated.task, &texts, parts.plan.thinking).await?)
}

/// What a validator would refuse must be noticed here, where it costs one group, not the window.
fn check_proof(parts: &WindowParts, generated: &Generated, proof: &Proof) -> Result<(), Dropped> {
    if proof.group.weights != parts.plan.weights {
        return Err(Dropped::OtherWeights { proof: proof.group.weights, plan: parts.plan.weights });
    }
    let max_new = parts.plan.sampling.max_new();
    for ((rollout, completion), member) in
        RolloutIndex::all().zip(generated.job.completions.iter()).zip(&proof.group.members)
    {
        if let Some(logprob) = member.logprobs.iter().find(|logprob| !logprob.is_finite()) {
            return Err(Dropped::NotFinite { rollout, logprob: *logprob });
        }
        let end = CompletionEnd {
            completion_length: u32::try_from(completion.len()).unwrap_or(u32::MAX),
            max_new_tokens: max_new,
            last_token: completion.last().copied(),
            eos_token: Some(parts.eos_token),
            eos_probability: Some(member.eos_probability),
        };
        if !end.is_valid() || ends_too_near(&end, parts.plan.dtype) {
            let (tokens, probability) = (completion.len(), member.eos_probability);
            return Err(Dropped::BadEnd { rollout, tokens, max_new, probability });
        }
    }
    Ok(())
}

/// Whether a validator may see an end in EOS on the other side of the bound: its forward pass rounds elsewhere, and one logit of
/// bfloat16 moves a probability by 6 % (between 8 and 16) or 13 % (up to 32).
fn ends_too_near(end: &CompletionEnd, dtype: &str) -> bool {
    let is_full = end.completion_length == end.max_new_tokens;
    let is_near = |probability| f64::from(probability) < MIN_EOS_PROBABILITY * EOS_MARGIN_BF16;
    dtype == "bfloat16" && !is_full && end.eos_probability.is_some_and(is_near)
}

/// A file that is refused costs fourteen windows, a group one of three hundred.
const EOS_MARGIN_BF16: f64 = 1.15;

fn sign(
    parts: &WindowParts,
    group: GroupIndex,
    block: BlockNumber,
    generated: &Generated,
    proof: &Proof,
    evaluations: &[Evaluation],
) -> SpooledGroup {
    let plan = &parts.plan;
    let rewards: Vec<f64> = evaluations.iter().map(|evaluation| evaluation.reward).collect();
    let advantages = advantage::advantages(&rewards);
    let randomness = plan.randomness.to_bytes();
    let rollouts = RolloutIndex::all()
        .map(|rollout| {
            let place = usize::from(rollout.get());
            let (completion, member) = (&generated.job.completions[place], &proof.group.members[place]);
            let tokens = [&generated.job.prompt[..], completion].concat();
            let sketches = [&proof.group.prompt_sketches[..], &member.sketches].concat();
            let (tokens, commitments) = (hash::token_hash(&tokens), binding::commitments_hash(&sketches));
            let message = CommitBinding::new(&tokens, &randomness, &plan.model_name, &commitments).digest();
            let challenge = nonce::challenge_text(&plan.window_hash, Nonce::new(group, rollout));
            SpooledRollout {
                completion: bulk::tokens_to_bytes(completion),
                sketches: bulk::u32_to_bytes(&member.sketches),
                logprobs: bulk::f32_to_bytes(&member.logprobs),
                eos_probability: member.eos_probability,
                reward: evaluations[place].reward,
                success: evaluations[place].success,
                advantage: advantages[place],
                commit_signature: parts.signer.sign(&message).0.to_vec(),
                row_signature: parts.signer.sign(challenge.as_bytes()).0.to_vec(),
            }
        })
        .collect();
    SpooledGroup {
        group,
        seed: seed::environment_seed(&plan.hotkey, &plan.window_hash, group),
        task: generated.task.id.clone(),
        block,
        slot: proof.slot.0,
        prompt: bulk::tokens_to_bytes(&generated.job.prompt),
        prompt_sketches: bulk::u32_to_bytes(&proof.group.prompt_sketches),
        rollouts,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_near_the_bound_is_refused_where_a_validator_may_see_it_beyond() {
        let end = |probability, completion_length| CompletionEnd {
            completion_length,
            max_new_tokens: 64,
            last_token: Some(TokenId(2)),
            eos_token: Some(TokenId(2)),
            eos_probability: Some(probability),
        };
        for (probability, dtype, is_refused) in [
            (0.021, "bfloat16", true),
            (0.0229, "bfloat16", true),
            (0.0232, "bfloat16", false),
            (0.021, "float32", false),
        ] {
            assert!(end(probability, 40).is_valid(), "by itself it is an end");
            assert_eq!(ends_too_near(&end(probability, 40), dtype), is_refused, "{probability} in {dtype}");
        }
        assert!(!ends_too_near(&end(0.0, 64), "bfloat16"), "the full length is an end whatever the token");
    }
}
