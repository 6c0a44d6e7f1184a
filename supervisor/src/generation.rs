//! Samples from the generation server, one HTTP request each, accepted only when a validator would accept them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use grail_ipc::generate_api::{
    AbortRequest, BadResponse, Expected, GenerateRequest, GenerateResponse, MAX_RESPONSE_BYTES, SamplingParams,
    validate_response,
};
use grail_protocol::ids::TokenId;
use tokio::sync::Semaphore;

/// Tries of one sample; only failures of the transport are tried again.
const TRIES: u32 = 3;
/// SGLang closes idle connections after 5 s; a pooled one must be given up before.
const POOL_IDLE: Duration = Duration::from_secs(3);

/// One completion to draw.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Unique name of the request; also what aborts it.
    pub rid: String,
    pub prompt: Arc<[TokenId]>,
    pub sampling: SamplingParams,
}

/// A continuation with what the server says of its tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Probe {
    pub tokens: Vec<TokenId>,
    /// One a token, natural logarithm, at temperature 1.
    pub logprobs: Vec<f32>,
}

/// A sample that could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerationError {
    #[error("generation server answered {status} to {rid}: {detail}")]
    Status { rid: String, status: u16, detail: String },
    #[error("request {rid} to the generation server failed {tries} times")]
    Transport { rid: String, tries: u32, source: reqwest::Error },
    #[error("generation server is not running")]
    NotRunning,
    #[error("answer to {rid} is not acceptable")]
    Unacceptable { rid: String, source: BadResponse },
    #[error("answer to {rid} cannot be read: {detail}")]
    Unreadable { rid: String, detail: String },
    #[error("answer to {rid} broke off")]
    BrokenOff { rid: String, source: reqwest::Error },
}

impl GenerationError {
    /// Whether the same server may well give another answer that can be used.
    #[must_use]
    pub const fn may_be_drawn_again(&self) -> bool {
        match self {
            Self::Unacceptable { .. } | Self::Unreadable { .. } => true,
            Self::Status { status, .. } => *status >= 500 || *status == 429,
            Self::Transport { .. } | Self::BrokenOff { .. } | Self::NotRunning => false,
        }
    }

    /// Whether the connection failed, so that the same sample may be had from another server.
    #[must_use]
    pub const fn is_of_transport(&self) -> bool {
        matches!(self, Self::Transport { .. } | Self::BrokenOff { .. })
    }
}

/// Source of completions.
pub trait Generator: Send + Sync + fmt::Debug {
    /// Draws one completion; the ids include the EOS token that ended it.
    fn sample(&self, sample: Sample) -> BoxFuture<'_, Result<Vec<TokenId>, GenerationError>>;

    /// Ends all requests that the server still works on.
    fn abort_all(&self) -> BoxFuture<'_, ()>;
}

/// What the server must answer, apart from the request itself.
#[derive(Debug, Clone)]
pub struct ServerFacts {
    pub url: String,
    pub weight_version: String,
    pub vocab_size: usize,
    pub eos_token: TokenId,
}

/// Client of `/generate`.
#[derive(Debug)]
pub struct HttpGenerator {
    client: reqwest::Client,
    facts: ServerFacts,
    in_flight: Semaphore,
}

impl HttpGenerator {
    /// A client with at most `max_concurrent` requests in flight, each given up after `timeout`.
    ///
    /// # Errors
    /// If the HTTP client cannot be built.
    pub fn new(facts: ServerFacts, max_concurrent: usize, timeout: Duration) -> reqwest::Result<Self> {
        let client = reqwest::Client::builder()
            .no_proxy()
            // Plain HTTP on the loopback interface: a host without certificates must not stop it.
            .tls_certs_only([])
            .timeout(timeout)
            .connect_timeout(Duration::from_secs(5))
            .pool_idle_timeout(POOL_IDLE)
            .build()?;
        Ok(Self { client, facts, in_flight: Semaphore::new(max_concurrent.max(1)) })
    }

    /// Address of the server.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.facts.url
    }

    async fn draw(&self, sample: Sample) -> Result<Vec<TokenId>, GenerationError> {
        // The semaphore is never closed, so acquiring fails only if it is dropped with `self`.
        let _permit = self.in_flight.acquire().await.map_err(|_| GenerationError::NotRunning)?;
        let request = GenerateRequest {
            rid: sample.rid.clone(),
            input_ids: sample.prompt.to_vec(),
            sampling_params: sample.sampling.clone(),
            return_logprob: false,
            stream: false,
        };
        let response = self.post(&request).await?;
        let expected = Expected {
            rid: &request.rid,
            prompt_tokens: request.input_ids.len(),
            max_new_tokens: sample.sampling.max_new_tokens as usize,
            vocab_size: self.facts.vocab_size,
            eos_token: self.facts.eos_token,
            weight_version: &self.facts.weight_version,
        };
        match validate_response(&expected, &response) {
            Ok(completion) => Ok(completion.tokens),
            Err(source) => Err(GenerationError::Unacceptable { rid: request.rid, source }),
        }
    }

    /// The continuation of `prompt`, of the full length that `sampling` allows, with logprobs. Neither limited nor judged like a
    /// sample: it is a question about the server.
    ///
    /// # Errors
    /// [`GenerationError`].
    pub async fn probe(
        &self,
        rid: String,
        prompt: &[TokenId],
        sampling: SamplingParams,
    ) -> Result<Probe, GenerationError> {
        let length = sampling.max_new_tokens as usize;
        let request = GenerateRequest {
            rid: rid.clone(),
            input_ids: prompt.to_vec(),
            sampling_params: sampling,
            return_logprob: true,
            stream: false,
        };
        let response = self.post(&request).await?;
        let said = &response.meta_info.weight_version;
        if *said != self.facts.weight_version {
            let (expected, found) = (self.facts.weight_version.clone(), said.clone());
            return Err(GenerationError::Unacceptable { rid, source: BadResponse::WrongWeights { expected, found } });
        }
        let unreadable = |detail: &str| GenerationError::Unreadable { rid: rid.clone(), detail: detail.to_owned() };
        let given = response.meta_info.output_token_logprobs.ok_or_else(|| unreadable("it has no logprobs"))?;
        if given.len() != length || given.iter().map(|entry| entry.1).ne(response.output_ids) {
            return Err(unreadable("tokens and logprobs do not belong together"));
        }
        let token = |id: i64| u32::try_from(id).ok().filter(|id| (*id as usize) < self.facts.vocab_size).map(TokenId);
        let tokens: Option<Vec<TokenId>> = given.iter().map(|entry| token(entry.1)).collect();
        let tokens = tokens.ok_or_else(|| unreadable("a token is outside of the vocabulary"))?;
        Ok(Probe { tokens, logprobs: given.iter().map(|entry| entry.0).collect() })
    }

    async fn post(&self, request: &GenerateRequest) -> Result<GenerateResponse, GenerationError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let answer = self.client.post(format!("{}/generate", self.facts.url)).json(request).send().await;
            match answer {
                Ok(answer) if answer.status().is_success() => return read_bounded(answer, &request.rid).await,
                Ok(answer) => {
                    let status = answer.status().as_u16();
                    let detail = answer.text().await.unwrap_or_default().chars().take(300).collect();
                    return Err(GenerationError::Status { rid: request.rid.clone(), status, detail });
                }
                // Only what never reached the server: a request that was read must not be drawn twice under one name.
                Err(error) if tries < TRIES && error.is_connect() => {
                    tokio::time::sleep(Duration::from_millis(200) * tries).await;
                }
                Err(source) => {
                    return Err(GenerationError::Transport { rid: request.rid.clone(), tries, source });
                }
            }
        }
    }
}

/// The body of an answer, no longer than any honest one.
async fn read_bounded(mut answer: reqwest::Response, rid: &str) -> Result<GenerateResponse, GenerationError> {
    let unreadable = |detail: String| GenerationError::Unreadable { rid: rid.to_owned(), detail };
    let mut body = Vec::new();
    let broken_off = |source| GenerationError::BrokenOff { rid: rid.to_owned(), source };
    while let Some(chunk) = answer.chunk().await.map_err(broken_off)? {
        if body.len() + chunk.len() > MAX_RESPONSE_BYTES {
            return Err(unreadable(format!("it is longer than {MAX_RESPONSE_BYTES} bytes")));
        }
        body.extend_from_slice(&chunk);
    }
    serde_json::from_slice(&body).map_err(|error| unreadable(error.to_string()))
}

impl Generator for HttpGenerator {
    fn sample(&self, sample: Sample) -> BoxFuture<'_, Result<Vec<TokenId>, GenerationError>> {
        self.draw(sample).boxed()
    }

    fn abort_all(&self) -> BoxFuture<'_, ()> {
        async move {
            let answer = self
                .client
                .post(format!("{}/abort_request", self.facts.url))
                .timeout(Duration::from_secs(5))
                .json(&AbortRequest { rid: String::new(), abort_all: true })
                .send()
                .await;
            if let Err(error) = answer {
                tracing::warn!(%error, "The generation server did not take the abort.");
            }
        }
        .boxed()
    }
}
