//! The groups of a profile.

use std::path::{Path, PathBuf};

use grail_ipc::jobs::ProveJob;
use grail_ipc::record;
use grail_protocol::constants::ROLLOUTS_PER_PROBLEM;
use grail_protocol::ids::{GroupIndex, TokenId, WeightsHash};

use super::lengths::{Lengths, Random};
use crate::error::WorkerError;

/// How many synthetic groups, of which lengths.
#[derive(Debug, Clone)]
pub(crate) struct Synthetic {
    pub groups: u32,
    pub prompt: Lengths,
    pub completion: Lengths,
    /// Longer lengths are cut to this.
    pub most_tokens: u32,
    /// Length of one completion of the first group, whatever was drawn.
    pub longest: Option<u32>,
    pub seed: u64,
}

/// Where groups come from.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    Synthetic(Synthetic),
    Recorded(PathBuf),
}

/// Groups and what a reader must know of them.
#[derive(Debug)]
pub(crate) struct Groups {
    pub jobs: Vec<ProveJob>,
    /// In words.
    pub described: String,
}

impl Groups {
    /// By group: tokens of the prompt, then of each completion.
    pub(crate) fn lengths(&self) -> Vec<Vec<usize>> {
        let of = |job: &ProveJob| std::iter::once(&job.prompt).chain(&job.completions).map(Vec::len).collect();
        self.jobs.iter().map(of).collect()
    }
}

impl Source {
    /// The groups, for a model of `vocab_size` tokens that has the hash `weights`: a recording is proved with whatever is
    /// loaded.
    ///
    /// # Errors
    /// [`WorkerError::Record`], and [`WorkerError::NoGroups`] for a recording without any.
    pub(crate) fn groups(&self, vocab_size: usize, weights: WeightsHash) -> Result<Groups, WorkerError> {
        match self {
            Self::Synthetic(synthetic) => Ok(synthetic.groups(vocab_size, weights)),
            Self::Recorded(path) => recorded(path, weights),
        }
    }
}

impl Synthetic {
    fn groups(&self, vocab_size: usize, weights: WeightsHash) -> Groups {
        let mut random = Random::new(self.seed);
        let jobs = (0..self.groups)
            .map(|group| {
                let prompt = self.tokens(self.prompt, vocab_size, &mut random);
                let mut completions: Vec<Vec<TokenId>> =
                    (0..ROLLOUTS_PER_PROBLEM).map(|_| self.tokens(self.completion, vocab_size, &mut random)).collect();
                if let (0, Some(longest), Some(first)) = (group, self.longest, completions.first_mut()) {
                    *first = drawn(longest, vocab_size, &mut random);
                }
                ProveJob {
                    group: GroupIndex(group.into()),
                    weights,
                    randomness: vec![7; 32],
                    eos_token: TokenId(0),
                    prompt,
                    completions,
                }
            })
            .collect();
        let longest = self.longest.map(|longest| format!(" with one of {longest}")).unwrap_or_default();
        let described = format!(
            "synthetic, prompt {}, completion {}{longest}, at most {} tokens each, seed {}",
            self.prompt, self.completion, self.most_tokens, self.seed
        );
        Groups { jobs, described }
    }

    fn tokens(&self, lengths: Lengths, vocab_size: usize, random: &mut Random) -> Vec<TokenId> {
        drawn(lengths.draw(random, self.most_tokens), vocab_size, random)
    }
}

fn drawn(length: u32, vocab_size: usize, random: &mut Random) -> Vec<TokenId> {
    let vocab_size = u64::try_from(vocab_size).unwrap_or(u64::MAX);
    (0..length).map(|_| TokenId(u32::try_from(random.below(vocab_size)).unwrap_or_default())).collect()
}

fn recorded(path: &Path, weights: WeightsHash) -> Result<Groups, WorkerError> {
    let recording = record::read(path)?;
    if recording.groups.is_empty() {
        return Err(WorkerError::NoGroups { path: path.to_owned() });
    }
    if recording.torn_bytes > 0 {
        tracing::warn!(path = %path.display(), torn_bytes = recording.torn_bytes, "The recording ends in a torn record.");
    }
    let described = format!("recorded with {} in {}", recording.model, path.display());
    let jobs = recording.groups.into_iter().map(|job| ProveJob { weights, ..job }).collect();
    Ok(Groups { jobs, described })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_groups_inside_vocabulary_and_limit() {
        let synthetic = Synthetic {
            groups: 3,
            prompt: "uniform:1-9".parse().unwrap(),
            completion: "lognormal:20,1".parse().unwrap(),
            most_tokens: 30,
            longest: None,
            seed: 5,
        };
        let source = Source::Synthetic(synthetic.clone());
        let groups = source.groups(50, WeightsHash(1)).unwrap();
        assert_eq!(groups.jobs.len(), 3);
        assert_eq!(source.groups(50, WeightsHash(1)).unwrap().jobs, groups.jobs);
        let other = Source::Synthetic(Synthetic { seed: 6, ..synthetic.clone() });
        assert_ne!(other.groups(50, WeightsHash(1)).unwrap().jobs, groups.jobs);
        let outlier = Source::Synthetic(Synthetic { longest: Some(70), ..synthetic });
        let lengths = outlier.groups(50, WeightsHash(1)).unwrap().lengths();
        assert_eq!((lengths[0][1], lengths[1][1] <= 30, lengths[0].len()), (70, true, 17));
        for job in &groups.jobs {
            assert_eq!(job.completions.len(), 16);
            for tokens in job.completions.iter().chain([&job.prompt]) {
                assert!((1..=30).contains(&tokens.len()) && tokens.iter().all(|token| token.0 < 50));
            }
        }
    }
}
