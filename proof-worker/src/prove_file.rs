//! `prove`: groups from a file, proofs as JSON lines.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use grail_ipc::jobs::{GroupProof, ProveJob};
use grail_protocol::binding::commitments_hash;
use grail_protocol::hash::token_hash;
use grail_protocol::ids::{GroupIndex, TokenId, WeightsHash};
use serde::{Deserialize, Serialize};

use crate::cli::ProveArguments;
use crate::error::WorkerError;
use crate::prover::{Loader, Prover};
use crate::torch::TorchLoader;

/// Number of the output's layout.
pub const SCHEMA: u32 = 1;

/// Hexadecimal digits of a window's randomness.
const RANDOMNESS_DIGITS: usize = 64;

/// One line of the input.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputLine {
    pub prompt: Vec<TokenId>,
    pub completions: Vec<Vec<TokenId>>,
    /// 64 hexadecimal digits.
    pub randomness: String,
    pub eos_token: TokenId,
}

/// One line of the output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputLine {
    pub schema: u32,
    /// Number of the input line, from 1.
    pub line: usize,
    pub weights_hash: WeightsHash,
    pub completions: Vec<OutputCompletion>,
}

/// Proof of one completion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputCompletion {
    /// Of all positions, the prompt's included.
    pub sketches: Vec<u32>,
    /// Of the completion tokens.
    pub logprobs: Vec<f32>,
    pub eos_probability: f32,
    pub token_hash: String,
    pub commitments_hash: String,
}

/// Runs `prove` to its end.
///
/// # Errors
/// [`WorkerError`].
pub fn run(arguments: &ProveArguments) -> Result<(), WorkerError> {
    // Before the model, which takes a while.
    let input = open(&arguments.input)?;
    let prover = TorchLoader::new(&arguments.model)?.load(&arguments.model.folder)?;
    match prove_lines(&*prover, input, &arguments.input, io::stdout().lock()) {
        // Whoever read the proofs has seen enough.
        Err(WorkerError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

fn open(path: &Path) -> Result<Box<dyn BufRead>, WorkerError> {
    if path == Path::new("-") {
        return Ok(Box::new(io::stdin().lock()));
    }
    let file = File::open(path).map_err(|source| WorkerError::Input { path: path.to_owned(), source })?;
    Ok(Box::new(BufReader::new(file)))
}

/// Proves every line of `input` and writes one line each.
///
/// # Errors
/// [`WorkerError::Line`] with the number of the first line that is wrong, [`WorkerError::Input`], [`WorkerError::Output`].
pub fn prove_lines(
    prover: &dyn Prover,
    input: impl BufRead,
    path: &Path,
    mut output: impl Write,
) -> Result<(), WorkerError> {
    for (index, text) in input.lines().enumerate() {
        let line = index + 1;
        let text = text.map_err(|source| WorkerError::Input { path: PathBuf::from(path), source })?;
        if text.trim().is_empty() {
            continue;
        }
        let wrong = |detail: String| WorkerError::Line { line, detail };
        let job = parse(&text, line, prover.weights()).map_err(wrong)?;
        let proof = prover.prove(&job).map_err(|error| wrong(error.to_string()))?;
        let mut answer =
            serde_json::to_string(&answer(line, &job, &proof)).map_err(|error| wrong(error.to_string()))?;
        answer.push('\n');
        output.write_all(answer.as_bytes()).and_then(|()| output.flush()).map_err(WorkerError::Output)?;
    }
    Ok(())
}

fn parse(text: &str, line: usize, weights: WeightsHash) -> Result<ProveJob, String> {
    let input: InputLine = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if input.prompt.is_empty() {
        return Err("prompt is empty".to_owned());
    }
    if input.completions.is_empty() {
        return Err("completions is empty".to_owned());
    }
    if let Some(empty) = input.completions.iter().position(Vec::is_empty) {
        return Err(format!("completions[{empty}] is empty"));
    }
    if input.randomness.len() != RANDOMNESS_DIGITS {
        return Err(format!("randomness {:?} does not have {RANDOMNESS_DIGITS} hexadecimal digits", input.randomness));
    }
    let randomness =
        hex::decode(&input.randomness).map_err(|error| format!("randomness {:?}: {error}", input.randomness))?;
    Ok(ProveJob {
        group: GroupIndex(i64::try_from(line).unwrap_or(i64::MAX)),
        weights,
        randomness,
        eos_token: input.eos_token,
        prompt: input.prompt,
        completions: input.completions,
    })
}

fn answer(line: usize, job: &ProveJob, proof: &GroupProof) -> OutputLine {
    let completions = job
        .completions
        .iter()
        .zip(&proof.members)
        .map(|(completion, member)| {
            let tokens = [job.prompt.as_slice(), completion].concat();
            let sketches = [proof.prompt_sketches.as_slice(), &member.sketches].concat();
            OutputCompletion {
                commitments_hash: hex::encode(commitments_hash(&sketches)),
                sketches,
                logprobs: member.logprobs.clone(),
                eos_probability: member.eos_probability,
                token_hash: hex::encode(token_hash(&tokens)),
            }
        })
        .collect();
    OutputLine { schema: SCHEMA, line, weights_hash: proof.weights, completions }
}
