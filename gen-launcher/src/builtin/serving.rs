//! What a loaded server does, apart from HTTP: samples, pauses, weight updates, checksums.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use grail_ipc::generate_api::{UpdateWeightsRequest, UpdateWeightsResponse};
use grail_process::fault::{Act, Armed, Point};
use grail_process::with_causes;
use grail_protocol::ids::TokenId;
use grail_text::Tokenizer;
use tokio::sync::oneshot;

use super::backend::DecodeBackend;
use super::clock::unix_seconds;
use super::door::{Alone, Door, Inside};
use super::draw::DrawStream;
use super::engine::{EngineGone, EngineHandle};
use super::limits::{LengthError, Limits};
use super::params::{ParamsError, ParsedBody, Prompt, SampleRequest};
use super::sampler::Sampling;
use super::scheduler::{AbortTarget, Finished, Job};
use grail_gen_launcher::folder::{CheckpointFolder, Difference, FolderError};

/// How often a pause aborts again what has come in meanwhile.
const ABORT_AGAIN: Duration = Duration::from_millis(20);
/// How often a flush with a deadline tries again.
const FLUSH_AGAIN: Duration = Duration::from_millis(10);
/// How often a health check looks for progress of other requests.
const PROGRESS_POLL: Duration = Duration::from_millis(50);

/// A folder and the model made of it.
#[derive(Debug)]
pub struct Loaded {
    pub folder: CheckpointFolder,
    pub backend: Box<dyn DecodeBackend>,
}

/// Makes a model of a folder, for a start or for an update. Runs on a thread that may block.
pub type Loader = dyn Fn(&Path) -> Result<Loaded, Box<dyn std::error::Error + Send + Sync>> + Send + Sync;

/// A request that gets no sample.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    #[error(transparent)]
    Params(#[from] ParamsError),
    #[error(transparent)]
    Length(#[from] LengthError),
    #[error("Duplicate request ID detected: {0}")]
    DuplicateName(String),
    #[error("text prompts need a tokenizer: the server runs with --skip-tokenizer-init")]
    NoTokenizer,
    #[error("the prompt cannot be encoded: {0}")]
    Text(String),
    #[error(transparent)]
    Gone(#[from] EngineGone),
}

/// One sample with what an answer tells about it.
#[derive(Debug, Clone)]
pub struct Answer {
    pub rid: String,
    pub prompt_tokens: usize,
    /// What was asked, shortened to what fits.
    pub max_new_tokens: usize,
    pub return_logprob: bool,
    pub weight_version: String,
    pub text: Option<String>,
    pub finished: Finished,
    /// Unix seconds.
    pub received: f64,
    pub dispatched: f64,
    pub ended: f64,
    pub latency: Duration,
}

/// SHA-256 by tensor.
pub type Checksums = Arc<BTreeMap<String, String>>;

/// The weights in use.
#[derive(Debug, Clone)]
pub struct Current {
    pub model_path: String,
    /// The model path after an update, as SGLang has it.
    pub served_name: String,
    pub weight_version: String,
    pub folder: Arc<CheckpointFolder>,
    checksums: Arc<OnceLock<Checksums>>,
}

impl Current {
    /// Weights that were just loaded.
    #[must_use]
    pub fn new(folder: CheckpointFolder, served_name: Option<String>, weight_version: String) -> Self {
        let model_path = folder.path().display().to_string();
        Self {
            served_name: served_name.unwrap_or_else(|| model_path.clone()),
            model_path,
            weight_version,
            folder: Arc::new(folder),
            checksums: Arc::default(),
        }
    }
}

/// What stays the same for the life of a server.
#[derive(Debug)]
pub struct Fixed {
    pub limits: Limits,
    pub max_running: usize,
    pub tokenizer: Option<Tokenizer>,
    pub tokenizer_path: PathBuf,
    /// End tokens of configuration and tokenizer.
    pub eos_tokens: BTreeSet<TokenId>,
    pub random_seed: u64,
}

/// A server whose model is loaded.
pub struct Serving {
    fixed: Fixed,
    engine: EngineHandle,
    door: Door,
    current: RwLock<Current>,
    loader: Arc<Loader>,
    /// One update at a time.
    updates: tokio::sync::Mutex<()>,
    names: Mutex<HashSet<String>>,
    made_up_names: AtomicU64,
    faults: Arc<Armed>,
}

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serving").field("fixed", &self.fixed).field("door", &self.door).finish_non_exhaustive()
    }
}

impl Serving {
    /// A server over a running engine.
    #[must_use]
    pub fn new(fixed: Fixed, engine: EngineHandle, current: Current, loader: Arc<Loader>) -> Self {
        Self {
            fixed,
            engine,
            door: Door::default(),
            current: RwLock::new(current),
            loader,
            updates: tokio::sync::Mutex::default(),
            names: Mutex::default(),
            made_up_names: AtomicU64::new(0),
            faults: Arc::default(),
        }
    }

    /// The same, doing wrong what `faults` say.
    #[must_use]
    pub fn with_faults(self, faults: Arc<Armed>) -> Self {
        Self { faults, ..self }
    }

    /// What stays the same.
    #[must_use]
    pub const fn fixed(&self) -> &Fixed {
        &self.fixed
    }

    /// The decode thread.
    #[must_use]
    pub const fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// The weights in use.
    #[must_use]
    pub fn current(&self) -> Current {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Requests that are not answered yet, also those that wait at the door.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Generates what one body asks for; whether the answer is a list is told beside it. If the future is dropped, its
    /// samples are aborted.
    ///
    /// # Errors
    /// [`Refusal`]; then none of the samples runs.
    pub async fn generate(self: &Arc<Self>, body: &[u8]) -> Result<(Vec<Answer>, bool), Refusal> {
        let received = (unix_seconds(), Instant::now());
        let ParsedBody { samples, is_batch } = ParsedBody::parse(body)?;
        let samples = samples.into_iter().map(|sample| self.admit(sample)).collect::<Result<Vec<_>, Refusal>>()?;
        let inside = self.door.enter().await;
        let weight_version = self.current().weight_version;
        let mut waiting = Vec::with_capacity(samples.len());
        for Admitted { name, job, answer, return_logprob } in samples {
            let (prompt_tokens, max_new_tokens) = (job.prompt.len(), job.max_new_tokens);
            self.engine.submit(job)?;
            waiting.push((name, answer, prompt_tokens, max_new_tokens, return_logprob));
        }
        let dispatched = unix_seconds();
        let mut answers = Vec::with_capacity(waiting.len());
        for (mut name, answer, prompt_tokens, max_new_tokens, return_logprob) in waiting {
            let mut finished = answer.await.map_err(|_| EngineGone)?;
            match (self.faults.reach(Point::Sampled), finished.output.first_mut()) {
                (Some(Act::Garbage), Some(token)) => *token = TokenId(u32::MAX),
                (Some(act), _) => act.befall_process(),
                (None, _) => {}
            }
            name.is_answered = true;
            answers.push(Answer {
                rid: name.rid.clone(),
                prompt_tokens,
                max_new_tokens,
                return_logprob,
                weight_version: weight_version.clone(),
                text: self.text(&finished),
                finished,
                received: received.0,
                dispatched,
                ended: unix_seconds(),
                latency: received.1.elapsed(),
            });
        }
        drop(inside);
        Ok((answers, is_batch))
    }

    fn admit(self: &Arc<Self>, sample: SampleRequest) -> Result<Admitted, Refusal> {
        let Fixed { limits, tokenizer, eos_tokens, random_seed, .. } = &self.fixed;
        let prompt = match sample.prompt {
            Prompt::Ids(ids) => limits.prompt(&ids)?,
            Prompt::Text(text) => {
                let tokenizer = tokenizer.as_ref().ok_or(Refusal::NoTokenizer)?;
                let tokens = tokenizer.encode(&text).map_err(|error| Refusal::Text(error.to_string()))?;
                limits.prompt(&tokens.iter().map(|token| i64::from(token.0)).collect::<Vec<_>>())?
            }
        };
        let params = sample.params;
        let max_new_tokens = limits.budget(prompt.len(), params.max_new_tokens)?;
        let name = self.name(sample.rid)?;
        let stop_ids = if params.ignore_eos {
            BTreeSet::new()
        } else {
            params.stop_token_ids.union(eos_tokens).copied().collect()
        };
        let (reply, answer) = oneshot::channel();
        let job = Job {
            draws: match params.sampling_seed {
                Some(seed) => DrawStream::of_seed(seed),
                None => DrawStream::of_request(*random_seed, &name.rid),
            },
            rid: name.rid.clone(),
            prompt,
            max_new_tokens,
            min_new_tokens: params.min_new_tokens,
            sampling: params.sampling,
            stop_ids: Arc::new(stop_ids),
            poison_replacement: eos_tokens.first().copied().unwrap_or(TokenId(0)),
            return_logprob: sample.return_logprob,
            reply,
        };
        Ok(Admitted { name, job, answer, return_logprob: sample.return_logprob })
    }

    /// Reserves a name, or makes one up.
    fn name(self: &Arc<Self>, rid: Option<String>) -> Result<Name, Refusal> {
        let rid = rid.unwrap_or_else(|| {
            let number = self.made_up_names.fetch_add(1, Ordering::Relaxed);
            format!("{:016x}{number:016x}", self.fixed.random_seed)
        });
        let is_new = self.names.lock().unwrap_or_else(PoisonError::into_inner).insert(rid.clone());
        if is_new {
            Ok(Name { serving: Arc::clone(self), rid, is_answered: false })
        } else {
            Err(Refusal::DuplicateName(rid))
        }
    }

    /// For people: without the token that ended it, and empty where bytes form no text yet.
    fn text(&self, finished: &Finished) -> Option<String> {
        let tokenizer = self.fixed.tokenizer.as_ref()?;
        let end = match finished.finish {
            super::scheduler::Finish::Stop(_) => finished.output.len() - 1,
            _ => finished.output.len(),
        };
        let text = tokenizer.decode(&finished.output[..end]);
        Some(text.unwrap_or_else(|error| {
            tracing::warn!(%error, "A sample cannot be turned into text.");
            String::new()
        }))
    }

    /// Whether the server makes progress: a sample of one token ends, or others get tokens meanwhile.
    pub async fn is_healthy(self: &Arc<Self>, limit: Duration) -> bool {
        let before = self.engine.load().generated_tokens;
        let probe = async {
            let _inside: Inside = self.door.enter().await;
            let (reply, answer) = oneshot::channel();
            let number = self.made_up_names.fetch_add(1, Ordering::Relaxed);
            let job = Job {
                rid: format!("HEALTH_CHECK_{number}"),
                prompt: vec![TokenId(0)],
                max_new_tokens: 1,
                min_new_tokens: 0,
                sampling: Sampling { top_k: 1, ..Sampling::default() },
                stop_ids: Arc::default(),
                poison_replacement: TokenId(0),
                draws: DrawStream::of_seed(0),
                return_logprob: false,
                reply,
            };
            self.engine.submit(job).is_ok() && answer.await.is_ok()
        };
        let progress = async {
            while self.engine.load().generated_tokens == before {
                tokio::time::sleep(PROGRESS_POLL).await;
            }
            true
        };
        let either = async {
            tokio::select! {
                is_answered = probe => is_answered,
                has_progressed = progress => has_progressed,
            }
        };
        tokio::time::timeout(limit, either).await.unwrap_or(false)
    }

    /// Aborts requests by prefix, or all of them.
    ///
    /// # Errors
    /// [`EngineGone`]
    pub fn abort(&self, target: AbortTarget) -> Result<(), EngineGone> {
        self.engine.abort(target)
    }

    /// Lets nobody in any more, aborts those inside and waits until they have their answers.
    ///
    /// # Errors
    /// [`EngineGone`]
    pub async fn pause(&self) -> Result<(), EngineGone> {
        self.door.close();
        self.abort_until_alone().await.map(drop)
    }

    async fn abort_until_alone(&self) -> Result<Alone, EngineGone> {
        let mut alone = std::pin::pin!(self.door.alone());
        loop {
            // Again and again: a request that has just come in reaches the scheduler later.
            self.engine.abort(AbortTarget::All)?;
            tokio::select! {
                alone = &mut alone => return Ok(alone),
                () = tokio::time::sleep(ABORT_AGAIN) => {}
            }
        }
    }

    /// Ends a pause.
    pub fn proceed(&self) {
        self.door.open();
    }

    /// Forgets cached prompts once nothing runs; false if that did not come within `limit`.
    ///
    /// # Errors
    /// [`EngineGone`]
    pub async fn flush(&self, limit: Duration) -> Result<bool, EngineGone> {
        let deadline = Instant::now() + limit;
        loop {
            if self.engine.flush().await? {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            tokio::time::sleep(FLUSH_AGAIN).await;
        }
    }

    /// Loads other weights beside the present ones and swaps them between two steps, when no request is inside. On failure
    /// the present ones stay.
    pub async fn update_weights(self: Arc<Self>, request: UpdateWeightsRequest) -> UpdateWeightsResponse {
        let _one_at_a_time = self.updates.lock().await;
        let (success, message) = match self.try_update(&request).await {
            Ok(()) => {
                let label = request.weight_version.map(|label| format!(" Weight version updated to {label}."));
                (true, format!("Succeeded to update model weights.{}", label.unwrap_or_default()))
            }
            Err(error) => {
                tracing::warn!(folder = request.model_path, error, "Weights not updated; the present ones stay.");
                (false, format!("Failed to update weights: {error}"))
            }
        };
        UpdateWeightsResponse { success, message, num_paused_requests: 0 }
    }

    async fn try_update(&self, request: &UpdateWeightsRequest) -> Result<(), String> {
        let loader = Arc::clone(&self.loader);
        let folder = PathBuf::from(&request.model_path);
        let loaded = tokio::task::spawn_blocking(move || loader(&folder)).await;
        let Loaded { folder, backend } = match loaded {
            Ok(Ok(loaded)) => loaded,
            Ok(Err(error)) => return Err(with_causes(&*error)),
            Err(panic) => return Err(format!("loading panicked: {panic}")),
        };
        let present = self.current();
        match present.folder.difference(&folder) {
            Ok(Some(difference @ Difference::Shape { .. })) => return Err(difference.to_string()),
            Ok(Some(difference)) => tracing::warn!(%difference, "The new folder differs in what is not read again."),
            Ok(None) => {}
            Err(error) => return Err(with_causes(&error)),
        }
        if backend.vocab_size() != self.fixed.limits.vocab_size {
            let found = backend.vocab_size();
            return Err(format!("the vocabulary has {found} tokens, not {}", self.fixed.limits.vocab_size));
        }
        let is_stale = match self.faults.reach(Point::Update) {
            Some(Act::Stale) => true,
            Some(act) => {
                act.befall_process();
                false
            }
            None => false,
        };
        // During a pause nobody is inside; waiting for the lock could only wait for a request that waits for us.
        let _alone = match (self.door.is_paused(), request.abort_all_requests) {
            (true, _) => None,
            (false, true) => Some(self.abort_until_alone().await.map_err(|error| error.to_string())?),
            (false, false) => Some(self.door.alone().await),
        };
        if !is_stale && !self.engine.replace(backend).await.map_err(|error| error.to_string())? {
            return Err("requests are still running".to_owned());
        }
        let label = request.weight_version.clone().unwrap_or(present.weight_version);
        let current = Current::new(folder, Some(request.model_path.clone()), label);
        let current = Current { model_path: request.model_path.clone(), ..current };
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = current;
        Ok(())
    }

    /// SHA-256 of every tensor of the weights in use, computed once a folder.
    ///
    /// # Errors
    /// [`FolderError`]
    pub async fn checksums(&self) -> Result<Checksums, FolderError> {
        let current = self.current();
        let compute = move || {
            if let Some(checksums) = current.checksums.get() {
                return Ok(Arc::clone(checksums));
            }
            let computed = Arc::new(current.folder.checksums()?);
            Ok(Arc::clone(current.checksums.get_or_init(|| computed)))
        };
        let joined = tokio::task::spawn_blocking(compute).await;
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }
}

struct Admitted {
    name: Name,
    job: Job,
    answer: oneshot::Receiver<Finished>,
    return_logprob: bool,
}

/// A name in use. When its request goes away unanswered, its sample is aborted.
struct Name {
    serving: Arc<Serving>,
    rid: String,
    is_answered: bool,
}

impl Drop for Name {
    fn drop(&mut self) {
        self.serving.names.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.rid);
        if !self.is_answered && self.serving.engine.abort(AbortTarget::Exactly(std::mem::take(&mut self.rid))).is_err()
        {
            tracing::debug!("The scheduler has ended before its requests.");
        }
    }
}
