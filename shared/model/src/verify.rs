//! What a verifier recomputes of whole rollouts, each with its own beacon and sampling parameters.

use grail_protocol::ids::TokenId;
use grail_protocol::sketch::SketchCoeffs;

use crate::error::ProveError;
use crate::evaluate::{Rollout, Sampling, evaluate};
use crate::prove::ProofModel;

/// One rollout to recompute.
#[derive(Debug, Clone)]
pub struct VerifyInput<'a> {
    /// Prompt and completion.
    pub tokens: &'a [TokenId],
    /// Tokens of the prompt; the completion must not be empty.
    pub prompt_length: usize,
    /// From the row's own beacon.
    pub coefficients: &'a SketchCoeffs,
    pub temperature: f64,
    pub repetition_penalty: f64,
    pub eos_token: TokenId,
}

/// What was recomputed.
#[derive(Debug, Clone, PartialEq)]
pub struct VerifyOutput {
    /// By position, the prompt's included.
    pub sketches: Vec<u32>,
    /// By completion token: log-softmax of the raw logits. `−∞` for a first token without a prompt, which no row predicts.
    pub logprobs: Vec<f32>,
    /// Probability of the EOS token in the logits row `len − 2`, rounded to the model's dtype; 0 if there is no such row.
    pub eos_probability: f32,
    /// By completion token: its probability after repetition penalty over all tokens before it and after temperature.
    pub chosen_probabilities: Vec<f32>,
}

impl ProofModel {
    /// Recomputes rollouts in the order given; rollouts with an equal prompt that stand side by side share its rows, as when
    /// they were proved.
    ///
    /// # Errors
    /// As [`ProofModel::prove`]; also [`ProveError::BadRequest`] for a prompt longer than the tokens, and for a temperature or
    /// repetition penalty that is not positive.
    pub fn verify(&self, inputs: &[VerifyInput<'_>]) -> Result<Vec<VerifyOutput>, ProveError> {
        let rollouts =
            inputs.iter().enumerate().map(|(member, input)| rollout(member, input)).collect::<Result<Vec<_>, _>>()?;
        let mut outputs = Vec::with_capacity(inputs.len());
        for result in evaluate(self.model(), &rollouts)? {
            let own_inputs = inputs.get(result.first..).unwrap_or_default();
            for (rollout, input) in result.rollouts.into_iter().zip(own_inputs) {
                let rollout = rollout?;
                let mut sketches = result.buckets.sketches(rollout.prompt_rows, input.coefficients);
                sketches.extend(result.buckets.sketches(rollout.completion_rows, input.coefficients));
                outputs.push(VerifyOutput {
                    sketches,
                    logprobs: rollout.logprobs,
                    eos_probability: rollout.eos_probability,
                    chosen_probabilities: rollout.chosen_probabilities,
                });
            }
        }
        Ok(outputs)
    }
}

fn rollout<'a>(member: usize, input: &VerifyInput<'a>) -> Result<Rollout<'a>, ProveError> {
    let (prompt, completion) =
        input.tokens.split_at_checked(input.prompt_length).ok_or_else(|| ProveError::BadRequest {
            detail: format!(
                "member {member}: a prompt of {} tokens in a rollout of {}",
                input.prompt_length,
                input.tokens.len()
            ),
        })?;
    let sampling = Some(Sampling { temperature: input.temperature, repetition_penalty: input.repetition_penalty });
    Ok(Rollout { prompt, completion, eos_token: input.eos_token, sampling })
}
