//! What the launcher says to its server. Every call has a deadline; nothing is tried twice here.

use std::time::Duration;

use grail_ipc::generate_api::{
    AbortRequest, BadResponse, ErrorBody, Expected, FinishReason, GenerateRequest, GenerateResponse, ModelInfo,
    SamplingParams, UpdateWeightsRequest, UpdateWeightsResponse, validate_response,
};
use grail_protocol::ids::TokenId;
use reqwest::{Method, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Idle connections are closed before the server closes them: SGLang does after 5 s.
const POOL_IDLE: Duration = Duration::from_secs(3);
/// Limit of calls that are answered at once.
const QUICK: Duration = Duration::from_secs(5);
/// Limit of a pause: those who run get one more token, those who hold the lock go.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);
/// How long the server itself waits for idleness in a flush.
const FLUSH_WAIT: Duration = Duration::from_secs(5);
/// Limit of one token after the first start.
const CANARY_LIMIT: Duration = Duration::from_secs(30);
/// Limit of an error text in messages.
const ERROR_CHARS: usize = 400;

/// A call that did not do what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    #[error("{call}: no answer")]
    NoAnswer {
        call: &'static str,
        #[source]
        source: reqwest::Error,
    },
    #[error("{call}: status {status}: {text}")]
    Status { call: &'static str, status: u16, text: String },
    #[error("{call}: the answer has another shape: {detail}")]
    Shape { call: &'static str, detail: String },
    #[error("update_weights_from_disk: {0}")]
    NotUpdated(String),
    #[error("model_info: the server has {found}, not {expected}")]
    OtherWeights { expected: String, found: String },
    #[error("server_info: {found:?} answers on the port, not {expected:?}")]
    OtherServer { expected: String, found: String },
    #[error("canary: {0}")]
    Canary(#[from] BadResponse),
}

/// Client of one server.
#[derive(Debug, Clone)]
pub struct ServerClient {
    http: reqwest::Client,
    url: String,
}

impl ServerClient {
    /// A client of the server at `url`, for instance `http://127.0.0.1:31000`.
    ///
    /// # Errors
    /// The HTTP library cannot be set up.
    pub fn new(url: String) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
            // A proxy from the environment must not see loopback traffic.
            .no_proxy()
            // Plain HTTP: a host without certificates must not stop it.
            .tls_certs_only([])
            .http1_only()
            .pool_idle_timeout(POOL_IDLE)
            .connect_timeout(QUICK)
            .build()?;
        Ok(Self { http, url })
    }

    /// Where the server is.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Whether the server says that it generates.
    ///
    /// # Errors
    /// [`CallError`]; a status other than 200 is one.
    pub async fn health_generate(&self) -> Result<(), CallError> {
        self.call("health_generate", Method::GET, "/health_generate", QUICK, None::<&()>).await.map(drop)
    }

    /// Whether anybody answers: a question that needs no generating, so that a long prefill does not count as a hang.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn is_there(&self) -> Result<(), CallError> {
        self.json::<ModelInfo>("model_info", "/model_info").await.map(drop)
    }

    /// That the server on the port is the one that was started, by its unguessable name.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn expect_served_name(&self, expected: &str) -> Result<(), CallError> {
        #[derive(Deserialize)]
        struct ServerInfo {
            served_model_name: String,
        }
        let ServerInfo { served_model_name: found } = self.json("server_info", "/server_info").await?;
        if found == expected { Ok(()) } else { Err(CallError::OtherServer { expected: expected.to_owned(), found }) }
    }

    /// That the server has the weights of this folder under this label.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn expect_weights(&self, folder: &str, label: &str) -> Result<(), CallError> {
        let info: ModelInfo = self.json("model_info", "/model_info").await?;
        if info.model_path == folder && info.weight_version == label {
            return Ok(());
        }
        let found = format!("{} as {:?}", info.model_path, info.weight_version);
        Err(CallError::OtherWeights { expected: format!("{folder} as {label:?}"), found })
    }

    /// One real token, greedily, judged as strictly as any sample.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn canary(&self, rid: &str, label: &str, vocab_size: usize) -> Result<(), CallError> {
        let prompt = vec![TokenId(0); 4];
        let request = GenerateRequest {
            rid: rid.to_owned(),
            input_ids: prompt.clone(),
            sampling_params: SamplingParams::greedy(1),
            return_logprob: true,
            stream: false,
        };
        let body = self.call("canary", Method::POST, "/generate", CANARY_LIMIT, Some(&request)).await?;
        let response: GenerateResponse = parse("canary", &body)?;
        let is_length = matches!(response.meta_info.finish_reason, FinishReason::Length { .. });
        let logprob =
            response.meta_info.output_token_logprobs.as_ref().and_then(|all| all.first()).map(|entry| entry.0);
        let expected = Expected {
            rid,
            prompt_tokens: prompt.len(),
            max_new_tokens: 1,
            vocab_size,
            // With `ignore_eos` no id ends the sample; one outside the vocabulary never matches.
            eos_token: TokenId(u32::MAX),
            weight_version: label,
        };
        validate_response(&expected, &response)?;
        match logprob {
            Some(logprob) if is_length && logprob.is_finite() => Ok(()),
            other => Err(CallError::Shape { call: "canary", detail: format!("logprob {other:?}") }),
        }
    }

    /// Aborts all that runs.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn abort_all(&self) -> Result<(), CallError> {
        let request = AbortRequest { rid: String::new(), abort_all: true };
        self.call("abort_request", Method::POST, "/abort_request", QUICK, Some(&request)).await.map(drop)
    }

    /// Aborts what runs and lets nothing in.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn pause(&self) -> Result<(), CallError> {
        #[derive(Serialize)]
        struct Pause {
            mode: &'static str,
        }
        let request = Pause { mode: "abort" };
        self.call("pause_generation", Method::POST, "/pause_generation", PAUSE_LIMIT, Some(&request)).await.map(drop)
    }

    /// Proves that the scheduler is idle.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn flush(&self) -> Result<(), CallError> {
        let path = format!("/flush_cache?timeout={}", FLUSH_WAIT.as_secs());
        self.call("flush_cache", Method::POST, &path, FLUSH_WAIT + QUICK, None::<&()>).await.map(drop)
    }

    /// Has the server load a folder.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn update_weights(&self, folder: &str, label: &str, limit: Duration) -> Result<(), CallError> {
        let call = "update_weights_from_disk";
        let request = UpdateWeightsRequest {
            model_path: folder.to_owned(),
            weight_version: Some(label.to_owned()),
            abort_all_requests: false,
        };
        let body = self.call(call, Method::POST, "/update_weights_from_disk", limit, Some(&request)).await?;
        let response: UpdateWeightsResponse = parse(call, &body)?;
        if response.success { Ok(()) } else { Err(CallError::NotUpdated(response.message)) }
    }

    /// Lets requests in again.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn proceed(&self) -> Result<(), CallError> {
        #[derive(Serialize)]
        struct Continue {
            torch_empty_cache: bool,
        }
        let request = Continue { torch_empty_cache: false };
        let path = "/continue_generation";
        self.call("continue_generation", Method::POST, path, QUICK, Some(&request)).await.map(drop)
    }

    async fn json<T: DeserializeOwned>(&self, call: &'static str, path: &str) -> Result<T, CallError> {
        let body = self.call(call, Method::GET, path, QUICK, None::<&()>).await?;
        parse(call, &body)
    }

    async fn call<B: Serialize>(
        &self,
        call: &'static str,
        method: Method,
        path: &str,
        limit: Duration,
        body: Option<&B>,
    ) -> Result<Vec<u8>, CallError> {
        let no_answer = |source| CallError::NoAnswer { call, source };
        let mut request = self.http.request(method, format!("{}{path}", self.url)).timeout(limit);
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.map_err(no_answer)?;
        let status = response.status();
        let body = response.bytes().await.map_err(no_answer)?;
        if status == StatusCode::OK {
            return Ok(body.to_vec());
        }
        Err(CallError::Status { call, status: status.as_u16(), text: error_text(&body) })
    }
}

fn parse<T: DeserializeOwned>(call: &'static str, body: &[u8]) -> Result<T, CallError> {
    serde_json::from_slice(body).map_err(|error| CallError::Shape { call, detail: error.to_string() })
}

/// The message in an error body of any shape, shortened.
fn error_text(body: &[u8]) -> String {
    let known: Option<ErrorBody> = serde_json::from_slice(body).ok();
    let text = known.as_ref().and_then(ErrorBody::text).map_or_else(|| String::from_utf8_lossy(body), Into::into);
    text.chars().take(ERROR_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_bodies_of_all_shapes_give_their_text() {
        assert_eq!(error_text(br#"{"error":{"message":"top_k"}}"#), "top_k");
        assert_eq!(error_text(br#"{"object":"error","message":"bad","code":400}"#), "bad");
        assert_eq!(error_text(br#"{"success":false,"message":"no folder","num_paused_requests":0}"#), "no folder");
        assert_eq!(error_text(b"Internal Server Error"), "Internal Server Error");
        assert_eq!(error_text(b""), "");
        assert_eq!(error_text(&[b'x'; 1000]).len(), ERROR_CHARS);
    }
}
