//! The endpoints.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use grail_ipc::generate_api::{AbortRequest, ErrorBody, UpdateWeightsRequest};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::answers;
use super::args::ServerArgs;
use super::engine::EngineGone;
use super::params::ParamsError;
use super::scheduler::AbortTarget;
use super::serving::{Refusal, Serving};

/// Longest body that is read: a batch of a thousand long prompts.
const MAX_BODY_BYTES: usize = 64 << 20;
/// How long a health check waits for any progress.
const HEALTH_LIMIT: Duration = Duration::from_secs(20);

/// Where a server is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Starting,
    Serving,
    /// After SIGTERM: what has begun is finished, new requests are still taken, health says no.
    Draining,
}

/// State of all handlers.
#[derive(Debug)]
pub struct App {
    pub args: ServerArgs,
    pub phase: watch::Sender<Phase>,
    /// Set once the model is loaded.
    pub serving: OnceLock<Arc<Serving>>,
}

impl App {
    /// A server that has nothing loaded yet.
    #[must_use]
    pub fn new(args: ServerArgs) -> Self {
        Self { args, phase: watch::Sender::new(Phase::Starting), serving: OnceLock::new() }
    }

    /// What serves, if the model is loaded.
    fn serving(&self) -> Result<&Arc<Serving>, Failure> {
        self.serving.get().ok_or(Failure::Starting)
    }
}

/// Why a request has no proper answer.
#[derive(Debug)]
enum Failure {
    Starting,
    Refused(Refusal),
    BadBody(String),
    BadValue(String),
    Internal(String),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Params(ParamsError::Body(text)) => Self::BadBody(text),
            Refusal::Gone(error) => Self::from(error),
            other => Self::Refused(other),
        }
    }
}

impl From<EngineGone> for Failure {
    fn from(error: EngineGone) -> Self {
        Self::Internal(error.to_string())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        match self {
            Self::Starting => native(StatusCode::SERVICE_UNAVAILABLE, "the model is still being loaded".to_owned()),
            Self::Refused(refusal) => native(StatusCode::BAD_REQUEST, refusal.to_string()),
            Self::BadValue(text) => native(StatusCode::BAD_REQUEST, text),
            Self::BadBody(message) => {
                let body =
                    json!({"object": "error", "message": message, "type": "BadRequest", "param": null, "code": 400});
                (StatusCode::BAD_REQUEST, axum::Json(body)).into_response()
            }
            Self::Internal(error) => {
                tracing::error!(error, "A request failed inside.");
                (StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error").into_response()
            }
        }
    }
}

fn native(status: StatusCode, message: String) -> Response {
    tracing::info!(status = status.as_u16(), message, "Request refused.");
    (status, axum::Json(ErrorBody::native(message))).into_response()
}

type Answered<T> = Result<T, Failure>;
type Shared = State<Arc<App>>;

/// All endpoints.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/health_generate", get(health))
        .route("/ping", any(ping))
        .route("/model_info", get(model_info))
        .route("/get_model_info", get(model_info))
        .route("/server_info", get(server_info))
        .route("/get_server_info", get(server_info))
        .route("/v1/models", get(models))
        .route("/v1/loads", get(loads))
        .route("/get_load", get(old_load))
        .route("/generate", post(generate).put(generate))
        .route("/abort_request", post(abort_request))
        .route("/pause_generation", post(pause_generation))
        .route("/continue_generation", post(continue_generation))
        .route("/flush_cache", get(flush_cache).post(flush_cache))
        .route("/update_weights_from_disk", post(update_weights))
        .route("/weights_checker", post(weights_checker))
        .fallback(not_found)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(app)
}

async fn not_found() -> Response {
    (StatusCode::NOT_FOUND, axum::Json(json!({"detail": "Not Found"}))).into_response()
}

async fn ping() -> StatusCode {
    StatusCode::OK
}

async fn health(State(app): Shared) -> StatusCode {
    let is_serving = *app.phase.borrow() == Phase::Serving;
    match app.serving.get() {
        Some(serving) if is_serving && serving.is_healthy(HEALTH_LIMIT).await => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

async fn model_info(State(app): Shared) -> Answered<axum::Json<Value>> {
    let serving = app.serving()?;
    Ok(axum::Json(answers::model_info(serving.fixed(), &serving.current())))
}

async fn server_info(State(app): Shared) -> Answered<axum::Json<Value>> {
    let serving = app.serving()?;
    Ok(axum::Json(answers::server_info(&app.args, serving.fixed(), &serving.current())))
}

async fn models(State(app): Shared) -> Answered<axum::Json<Value>> {
    let serving = app.serving()?;
    Ok(axum::Json(answers::models(serving.fixed(), &serving.current())))
}

async fn loads(State(app): Shared) -> Answered<axum::Json<Value>> {
    let serving = app.serving()?;
    let engine = serving.engine();
    let body = answers::loads(serving.fixed(), &serving.current(), engine.load(), engine.tokens_per_second());
    Ok(axum::Json(body))
}

async fn old_load(State(app): Shared) -> Answered<axum::Json<Value>> {
    Ok(axum::Json(answers::old_load(app.serving()?.engine().load())))
}

async fn generate(State(app): Shared, body: Bytes) -> Answered<axum::Json<Value>> {
    let (answers, is_batch) = app.serving()?.generate(&body).await?;
    let mut samples = answers.iter().map(answers::sample);
    let body = if is_batch { samples.collect() } else { samples.next().unwrap_or_default() };
    Ok(axum::Json(body))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Answered<T> {
    serde_json::from_slice(body).map_err(|error| Failure::BadBody(error.to_string()))
}

/// An absent body is an empty object.
fn parse_or_default<T: DeserializeOwned>(body: &[u8]) -> Answered<T> {
    parse(if body.is_empty() { b"{}" } else { body })
}

async fn abort_request(State(app): Shared, body: Bytes) -> Answered<StatusCode> {
    let AbortRequest { rid, abort_all } = parse_or_default(&body)?;
    let target = match (abort_all, rid.is_empty()) {
        (true, _) => AbortTarget::All,
        (false, false) => AbortTarget::Prefix(rid),
        // Nothing is named: nothing happens.
        (false, true) => return Ok(StatusCode::OK),
    };
    app.serving()?.abort(target)?;
    Ok(StatusCode::OK)
}

#[derive(Debug, Deserialize)]
struct PauseRequest {
    #[serde(default)]
    mode: Option<String>,
}

async fn pause_generation(State(app): Shared, body: Bytes) -> Answered<axum::Json<Value>> {
    let PauseRequest { mode } = parse_or_default(&body)?;
    match mode.as_deref().unwrap_or("abort") {
        "abort" => {}
        mode @ ("retract" | "in_place") => {
            // Both continue samples of the old weights with the new ones.
            return Err(Failure::BadValue(format!(
                "pause mode {mode} is not supported by the builtin server: use abort"
            )));
        }
        mode => return Err(Failure::BadBody(format!("mode: {mode:?} is none of abort, retract, in_place"))),
    }
    let serving = Arc::clone(app.serving()?);
    // A task of its own: a client that gives up must not leave a pause half done.
    detached(async move { serving.pause().await }).await??;
    Ok(axum::Json(json!({"message": "Generation paused successfully.", "status": "ok"})))
}

async fn continue_generation(State(app): Shared) -> Answered<axum::Json<Value>> {
    app.serving()?.proceed();
    Ok(axum::Json(json!({"message": "Generation continued successfully.", "status": "ok"})))
}

#[derive(Debug, Deserialize)]
struct FlushQuery {
    #[serde(default)]
    timeout: Option<f64>,
}

async fn flush_cache(State(app): Shared, Query(query): Query<FlushQuery>) -> Answered<(StatusCode, &'static str)> {
    let seconds = query.timeout.unwrap_or(0.0);
    let limit = Duration::try_from_secs_f64(seconds)
        .map_err(|error| Failure::BadValue(format!("timeout must be a number of seconds, got {seconds}: {error}")))?;
    if app.serving()?.flush(limit).await? {
        Ok((
            StatusCode::OK,
            "Cache flushed.\nPlease check backend logs for more details. (When there are running or waiting requests, the \
             operation will not be performed.)\n",
        ))
    } else {
        Ok((StatusCode::BAD_REQUEST, "Flush cache failed: there are running or waiting requests.\n"))
    }
}

async fn update_weights(State(app): Shared, body: Bytes) -> Answered<Response> {
    let request: UpdateWeightsRequest = parse(&body)?;
    let serving = Arc::clone(app.serving()?);
    // As in SGLang, a client that gives up does not stop the update.
    let updated = detached(serving.update_weights(request)).await?;
    let status = if updated.success { StatusCode::OK } else { StatusCode::BAD_REQUEST };
    Ok((status, axum::Json(updated)).into_response())
}

#[derive(Debug, Deserialize)]
struct CheckRequest {
    action: String,
}

async fn weights_checker(State(app): Shared, body: Bytes) -> Answered<Response> {
    let CheckRequest { action } = parse(&body)?;
    if action != "checksum" {
        let message = format!("action {action:?} is not supported by the builtin server: use checksum");
        let body = json!({"success": false, "message": message});
        return Ok((StatusCode::BAD_REQUEST, axum::Json(body)).into_response());
    }
    let checksums = app.serving()?.checksums().await.map_err(|error| Failure::Internal(error.to_string()))?;
    Ok(axum::Json(answers::checksums(&checksums)).into_response())
}

async fn detached<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Answered<T> {
    tokio::spawn(work).await.map_err(|error| Failure::Internal(error.to_string()))
}
