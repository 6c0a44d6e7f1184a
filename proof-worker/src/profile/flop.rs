//! Useful floating-point operations of a proof: what the result needs, however it is computed.

use grail_ipc::jobs::ProveJob;
use grail_model::ModelConfig;

/// Operations that proving `job` needs, a multiplication and an addition as two: all projections of each token with the prompt
/// once, the causal half of attention, and the output matrix on the completions' rows.
#[must_use]
pub(crate) fn useful_flop(config: &ModelConfig, job: &ProveJob) -> f64 {
    let hidden = config.hidden_size as f64;
    let (query, kv) = (config.query_size() as f64, config.kv_size() as f64);
    let weights_of_layer =
        hidden * (query + 2.0 * kv) + query * hidden + 3.0 * hidden * config.intermediate_size as f64;
    let (tokens, rows) = (job.tokens() as f64, job.completion_tokens() as f64);
    let prompt = job.prompt.len() as f64;
    // Pairs of a query and a key that it sees.
    let among = |length: f64| length * (length + 1.0) / 2.0;
    let pairs = among(prompt)
        + job.completions.iter().map(|own| own.len() as f64 * prompt + among(own.len() as f64)).sum::<f64>();
    let layers = config.layers as f64;
    // Scores and weighted values: two products for each pair.
    2.0 * layers * weights_of_layer * tokens
        + 4.0 * layers * query * pairs
        + 2.0 * hidden * config.vocab_size as f64 * rows
}

#[cfg(test)]
mod tests {
    use grail_protocol::ids::{GroupIndex, TokenId, WeightsHash};

    use super::super::shape::Shape;
    use super::*;

    fn job(prompt: usize, completions: &[usize]) -> ProveJob {
        ProveJob {
            group: GroupIndex(0),
            weights: WeightsHash(0),
            randomness: vec![],
            eos_token: TokenId(0),
            prompt: vec![TokenId(0); prompt],
            completions: completions.iter().map(|length| vec![TokenId(0); *length]).collect(),
        }
    }

    #[test]
    fn a_pass_without_attention_takes_two_operations_for_each_weight_and_token() {
        let config = Shape::Qwen2OneAndAHalf.config();
        // 28 layers of (1536·(1536+512) + 1536·1536 + 3·1536·8960) weights, 2 tokens; 3 pairs; the head on one row.
        let layer = 1_536.0 * 2_048.0 + 1_536.0 * 1_536.0 + 3.0 * 1_536.0 * 8_960.0;
        let expected = 2.0 * 28.0 * layer * 2.0 + 4.0 * 28.0 * 1_536.0 * 3.0 + 2.0 * 1_536.0 * 151_936.0;
        assert_eq!(useful_flop(&config, &job(1, &[1])), expected);
    }

    #[test]
    fn a_shared_prompt_counts_once_but_is_attended_to_by_all() {
        let config = Shape::Qwen2Half.config();
        let (one, two) = (useful_flop(&config, &job(100, &[50])), useful_flop(&config, &job(100, &[50, 50])));
        let prompt_alone = one * 2.0 - two;
        let without_rows = useful_flop(&config, &job(100, &[]));
        assert!((prompt_alone - without_rows).abs() < 1e-6 * one, "{prompt_alone} and {without_rows}");
    }
}
