//! Completions of whole groups, drawn from a checkpoint as a generation server draws them.

use std::sync::Arc;

use grail_model::Model;
use grail_model::generate::Decoder;
use grail_protocol::constants::ROLLOUTS_PER_PROBLEM;
use grail_protocol::ids::TokenId;
use serde::Serialize;

use crate::rng::Rng;

/// How completions are drawn: the `generation_params` of the checkpoints' metadata.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct GenerationParams {
    pub max_tokens: usize,
    pub temperature: f64,
    pub top_p: f64,
    /// Positive.
    pub top_k: usize,
    /// Only 1 is drawn from.
    pub repetition_penalty: f64,
}

/// The demo's parameters. With `top_p` below what the trained smoothing leaves to a certain token, nothing is ever drawn
/// from the evenly spread rest.
pub const GENERATION: GenerationParams =
    GenerationParams { max_tokens: 192, temperature: 1.0, top_p: 0.95, top_k: 50, repetition_penalty: 1.0 };

/// One group of completions for each prompt.
///
/// # Errors
/// If the model cannot decode.
pub fn groups(
    model: &Arc<Model>,
    prompts: &[Vec<TokenId>],
    eos: TokenId,
    seed: u64,
) -> anyhow::Result<Vec<Vec<Vec<TokenId>>>> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or_default();
    let mut decoder = Decoder::new(Arc::clone(model), ROLLOUTS_PER_PROBLEM, longest + GENERATION.max_tokens)?;
    let mut rng = Rng::new(seed, 4);
    prompts.iter().map(|prompt| group(&mut decoder, prompt, eos, &mut rng)).collect()
}

fn group(decoder: &mut Decoder, prompt: &[TokenId], eos: TokenId, rng: &mut Rng) -> anyhow::Result<Vec<Vec<TokenId>>> {
    let slots = decoder.slots();
    (0..slots).for_each(|slot| decoder.release(slot));
    let first = decoder.prefill(0, prompt)?;
    for slot in 1..slots {
        decoder.copy_prefix(0, slot, prompt.len())?;
    }
    let mut completions: Vec<Vec<TokenId>> = (0..slots).map(|_| vec![draw(&first, rng)]).collect();
    loop {
        let open: Vec<(usize, TokenId)> = completions
            .iter()
            .enumerate()
            .filter(|(_, tokens)| tokens.len() < GENERATION.max_tokens)
            .filter_map(|(slot, tokens)| tokens.last().filter(|last| **last != eos).map(|last| (slot, *last)))
            .collect();
        if open.is_empty() {
            return Ok(completions);
        }
        let rows = decoder.step(&open)?;
        for ((slot, _), logits) in open.iter().zip(rows.iter()) {
            completions[*slot].push(draw(logits, rng));
        }
    }
}

/// A token by temperature, then top-k and top-p on the same distribution.
fn draw(logits: &[f32], rng: &mut Rng) -> TokenId {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> =
        logits.iter().map(|logit| (f64::from(logit - largest) / GENERATION.temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    let most = GENERATION.top_k.min(order.len());
    let by_weight = |a: &usize, b: &usize| weights[*b].total_cmp(&weights[*a]).then_with(|| a.cmp(b));
    if most < order.len() {
        order.select_nth_unstable_by(most, by_weight);
        order.truncate(most);
    }
    order.sort_unstable_by(by_weight);
    let mut kept = 0.0;
    let mut before = 0.0;
    order.retain(|token| {
        let is_kept = before <= GENERATION.top_p * total;
        before += weights[*token];
        kept += if is_kept { weights[*token] } else { 0.0 };
        is_kept
    });
    let mut left = rng.unit() * kept;
    let drawn = order.iter().copied().find(|token| {
        left -= weights[*token];
        left < 0.0
    });
    let token = drawn.or(order.last().copied()).unwrap_or_default();
    TokenId(u32::try_from(token).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_softmax_and_leave_the_tail_out() {
        let probabilities = [0.5_f32, 0.3, 0.16, 0.03, 0.01];
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        let mut rng = Rng::new(1, 0);
        let mut hits = [0_u32; 5];
        for _ in 0..10_000 {
            hits[draw(&logits, &mut rng).0 as usize] += 1;
        }
        // Before the fourth lies 0.96 > 0.95. Six standard deviations of the first are 300.
        assert_eq!(hits[3..], [0, 0]);
        assert!(hits[0].abs_diff(5_208) < 300 && hits[1].abs_diff(3_125) < 280, "{hits:?}");
    }
}
