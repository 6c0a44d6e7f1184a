//! Which tasks the model learns, and which tasks a demo window has.

use std::sync::Arc;

use anyhow::{Context as _, bail};
use grail_environments::gsm8k::Gsm8k;
use grail_environments::{Environment as _, Payload, Split, Task, ThinkingMode, prompt_ids};
use grail_protocol::ids::{BlockHash, BlockNumber, GroupIndex, Hotkey, TokenId, WindowStart};
use grail_protocol::keys::{DEMO_HOTKEY_URI, Keypair};
use grail_protocol::seed::environment_seed;
use grail_text::{ChatTemplate, Tokenizer};
use sha2::{Digest as _, Sha256};

use crate::synthesis::Worked;

/// What completions of one task are made from.
#[derive(Debug, Clone)]
pub struct Source {
    pub question: String,
    pub worked: Worked,
    /// The environment's own record.
    pub task: Task,
}

impl Source {
    fn new(task: Task) -> anyhow::Result<Self> {
        let Payload::Gsm8k { answer } = &task.payload else { bail!("{} is no task of gsm8k", task.id) };
        let worked = Worked::from_solution(answer).with_context(|| format!("read the solution of {}", task.id))?;
        Ok(Self { question: task.question.clone(), worked, task })
    }
}

/// All tasks of the split `train`, in the order of its rows.
///
/// # Errors
/// If the data that is part of the program is damaged.
pub fn split_sources() -> anyhow::Result<Vec<Source>> {
    let environment = environment()?;
    (0..environment.task_count())
        .map(|row| Source::new(environment.task_by_id(Some(&format!("{}_{row}", Split::Train)))?))
        .collect()
}

/// The tasks of the first `groups` groups of a window on the local chain of `chain_seed`, mined with the demo hotkey.
///
/// # Errors
/// As [`split_sources`].
pub fn window_sources(chain_seed: &str, window: WindowStart, groups: usize) -> anyhow::Result<Vec<Source>> {
    let environment = environment()?;
    let hotkey: Hotkey = Keypair::from_uri(DEMO_HOTKEY_URI)?.hotkey().clone();
    let hash = local_block_hash(chain_seed, window.block());
    (0_i64..)
        .take(groups)
        .map(|group| Source::new(environment.task(environment_seed(&hotkey, &hash, GroupIndex(group)))?))
        .collect()
}

/// The environment of the demo.
///
/// # Errors
/// As [`split_sources`].
pub fn environment() -> anyhow::Result<Arc<Gsm8k>> {
    Ok(Arc::new(Gsm8k::embedded(Split::Train)?))
}

/// Hash of a block of the simulated chain that `grail-supervisor mine --local` runs.
#[must_use]
pub fn local_block_hash(chain_seed: &str, block: BlockNumber) -> BlockHash {
    let digest = Sha256::digest(format!("grail-local-chain|{chain_seed}|{block}"));
    BlockHash(format!("0x{}", hex::encode(digest)))
}

/// Prompt ids of every source, as miners and validators make them.
///
/// # Errors
/// If the template or the tokenizer fails.
pub fn prompts(
    sources: &[Source],
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
) -> anyhow::Result<Vec<Vec<TokenId>>> {
    sources.iter().map(|source| Ok(prompt_ids(&source.task, ThinkingMode::Instructed, tokenizer, template)?)).collect()
}

#[cfg(test)]
mod tests {
    use grail_environments::gsm8k::gold_answer;

    use super::*;

    fn window(block: u64) -> WindowStart {
        WindowStart::containing(BlockNumber(block))
    }

    /// Written down by hand from `sha256("grail-local-chain|grail-demo|3000")`.
    #[test]
    fn the_hash_of_a_local_block_is_fixed() {
        assert_eq!(
            local_block_hash("grail-demo", BlockNumber(3_000)).0,
            "0x548a202ed04d7de5984cf8b94e8925542198f5c88740529a64e470ae8b4cb68e"
        );
    }

    #[test]
    fn a_window_has_the_tasks_that_the_protocol_gives_the_demo_hotkey() {
        let hotkey = Keypair::from_uri("//grail-supervisor//demo").unwrap().hotkey().clone();
        let hash = local_block_hash("grail-demo", BlockNumber(3_030));
        let environment = environment().unwrap();
        let sources = window_sources("grail-demo", window(3_030), 32).unwrap();
        assert_eq!(sources.len(), 32);
        for (group, source) in (0_i64..).zip(&sources) {
            let digest = Sha256::digest(format!("seed|{}:{}:{group}", hotkey.0, hash.0));
            let seed = u64::from(u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]));
            let row = usize::try_from((seed * environment.task_count() as u64) >> 32).unwrap();
            assert_eq!(source.task.row, row, "group {group}");
        }
    }

    #[test]
    fn every_task_has_an_answer_that_the_environment_knows() {
        let sources = split_sources().unwrap();
        assert_eq!(sources.len(), 7_223);
        let mut unmatchable = 0;
        for source in &sources {
            let Payload::Gsm8k { answer } = &source.task.payload else {
                panic!("{} is no task of gsm8k", source.task.id)
            };
            let gold = gold_answer(answer);
            unmatchable += usize::from(gold.contains(','));
            assert_eq!(gold.replace(',', ""), source.worked.answer, "{}", source.task.id);
        }
        // Thousands separators stay in the environment's gold answer, so no completion can match it.
        assert!(unmatchable < sources.len() / 50, "{unmatchable}");
    }
}
