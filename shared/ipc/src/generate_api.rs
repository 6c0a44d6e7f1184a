//! The part of SGLang's HTTP interface that GRAIL uses: bodies of requests and answers, and the rules by which an answer
//! of `/generate` is believed.
//!
//! Only data and checks: nothing here opens a connection. Field names and shapes are those of SGLang 0.5.16; fields that
//! are not used are ignored.

use std::fmt;

use grail_protocol::ids::TokenId;
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest answer that a client reads, in bytes.
pub const MAX_RESPONSE_BYTES: usize = 1 << 20;

/// How many tokens of a context a server keeps for itself: `prompt + max_new_tokens + 2 <= context_length` must hold, or the
/// completion comes back shortened without a word.
pub const CONTEXT_RESERVE_TOKENS: u32 = 2;

/// Body of `POST /generate` for one sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// Name of the request, chosen by the client and unique on the server.
    pub rid: String,
    pub input_ids: Vec<TokenId>,
    pub sampling_params: SamplingParams,
    pub return_logprob: bool,
    pub stream: bool,
}

/// How the tokens of one sample are drawn. Every field is sent: servers fill what is missing from the checkpoint or from
/// their own defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    pub max_new_tokens: u32,
    /// Below 1e-6 the most likely token is taken.
    pub temperature: f64,
    /// In `(0, 1]`.
    pub top_p: f64,
    /// −1 = the whole vocabulary; 0 is refused.
    pub top_k: i64,
    pub min_p: f64,
    /// In `(0, 2]`; 1 = none. Applies to generated tokens only.
    pub repetition_penalty: f64,
    pub stop_token_ids: Vec<TokenId>,
    pub ignore_eos: bool,
    pub skip_special_tokens: bool,
    pub n: u32,
    /// Makes the draw a function of weights, prompt, parameters and this number, where the server honours it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sampling_seed: Option<u64>,
}

impl SamplingParams {
    /// The most likely token at every position, `max_new_tokens` of them whether or not the text ends: a canary.
    #[must_use]
    pub const fn greedy(max_new_tokens: u32) -> Self {
        Self {
            max_new_tokens,
            temperature: 0.0,
            top_p: 1.0,
            top_k: -1,
            min_p: 0.0,
            repetition_penalty: 1.0,
            stop_token_ids: Vec::new(),
            ignore_eos: true,
            skip_special_tokens: false,
            n: 1,
            sampling_seed: None,
        }
    }
}

/// Answer of `/generate` for one sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerateResponse {
    /// Absent when the server has no tokenizer.
    #[serde(default)]
    pub text: Option<String>,
    /// As the server wrote them; nothing is known of their range before [`validate_response`].
    pub output_ids: Vec<i64>,
    pub meta_info: MetaInfo,
}

/// What the server says about one sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetaInfo {
    /// The request's `rid`.
    pub id: String,
    pub finish_reason: FinishReason,
    pub completion_tokens: u64,
    pub weight_version: String,
    /// Absent when the request was aborted before it ran.
    #[serde(default)]
    pub prompt_tokens: Option<u64>,
    /// Prompt tokens whose keys and values were there already.
    #[serde(default)]
    pub cached_tokens: u64,
    #[serde(default)]
    pub num_retractions: u64,
    /// Seconds from arrival to completion at the server.
    #[serde(default)]
    pub e2e_latency: Option<f64>,
    /// One entry a token, if logprobs were asked for.
    #[serde(default)]
    pub output_token_logprobs: Option<Vec<TokenLogprob>>,
}

/// `[logprob, token, text or null]`: after penalties and temperature, before top-k and top-p.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob(pub f32, pub i64, pub Option<String>);

/// Why a sample ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token was drawn; it is the last of the output.
    Stop { matched: Matched },
    /// As many tokens as allowed were drawn.
    Length { length: u64 },
    /// Somebody ended it: the answer is a 200 all the same, with what there was.
    Abort {
        #[serde(default)]
        message: Option<String>,
        #[serde(default)]
        status_code: Option<u16>,
        #[serde(default)]
        err_type: Option<String>,
    },
}

/// What a stop matched: a token id, or a text (a stop string, or `NaN happened`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Matched {
    Token(i64),
    Text(String),
}

impl Serialize for Matched {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Token(id) => serializer.serialize_i64(*id),
            Self::Text(text) => serializer.serialize_str(text),
        }
    }
}

impl<'de> Deserialize<'de> for Matched {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = Matched;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a token id or a text")
            }
            fn visit_i64<E: de::Error>(self, id: i64) -> Result<Matched, E> {
                Ok(Matched::Token(id))
            }
            fn visit_u64<E: de::Error>(self, id: u64) -> Result<Matched, E> {
                i64::try_from(id).map(Matched::Token).map_err(E::custom)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Matched, E> {
                Ok(Matched::Text(text.to_owned()))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// Body of an error answer; SGLang has two shapes, and sometimes plain text or nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorMessage>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Inner object of the native shape `{"error":{"message":…}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorMessage {
    pub message: String,
}

impl ErrorBody {
    /// The native shape.
    #[must_use]
    pub fn native(message: impl Into<String>) -> Self {
        Self { error: Some(ErrorMessage { message: message.into() }), message: None }
    }

    /// What went wrong, in either shape.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        self.error.as_ref().map(|error| error.message.as_str()).or(self.message.as_deref())
    }
}

/// Body of `POST /abort_request`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AbortRequest {
    /// Prefix of the names to abort; ignored when empty, unless `abort_all` is set.
    #[serde(default)]
    pub rid: String,
    #[serde(default)]
    pub abort_all: bool,
}

/// Body of `POST /update_weights_from_disk`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateWeightsRequest {
    pub model_path: String,
    /// Label that answers carry from then on; unchanged when absent.
    #[serde(default)]
    pub weight_version: Option<String>,
    /// Abort what runs instead of waiting for it.
    #[serde(default)]
    pub abort_all_requests: bool,
}

/// Answer of `/update_weights_from_disk`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateWeightsResponse {
    pub success: bool,
    pub message: String,
    pub num_paused_requests: u64,
}

/// Answer of `/model_info`; after an update path and label are the new ones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelInfo {
    pub model_path: String,
    pub tokenizer_path: String,
    pub is_generation: bool,
    pub weight_version: String,
    #[serde(default)]
    pub model_type: Option<String>,
    #[serde(default)]
    pub architectures: Vec<String>,
}

/// What was asked, as far as the answer must agree with it.
#[derive(Debug, Clone)]
pub struct Expected<'a> {
    pub rid: &'a str,
    pub prompt_tokens: usize,
    pub max_new_tokens: usize,
    /// Ids are `0..vocab_size`.
    pub vocab_size: usize,
    /// The tokenizer's EOS: the only stop that a validator accepts.
    pub eos_token: TokenId,
    /// Label of the weights that must have generated.
    pub weight_version: &'a str,
}

/// How a sample that is worth proving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The last token is the tokenizer's EOS.
    Eos,
    /// Exactly as many tokens as allowed.
    Length,
}

/// A sample that passed [`validate_response`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    pub tokens: Vec<TokenId>,
    pub ending: Ending,
    pub cached_tokens: u64,
}

/// What to think of a server whose answer was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// Nobody: the sample was aborted.
    Aborted,
    /// The sample cannot be used, and that happens on a sound server (another stop id of the checkpoint).
    Sample,
    /// The server broke its contract; three in a row or 2 % of 200 mean a restart.
    Server,
    /// Weights or hardware are bad.
    Poison,
}

/// Why an answer of `/generate` is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadResponse {
    #[error("the answer is for request {found:?}, not {expected:?}")]
    WrongRequest { expected: String, found: String },
    #[error("generated by weights {found:?}, not {expected:?}")]
    WrongWeights { expected: String, found: String },
    #[error("the server counted {found:?} prompt tokens, {expected} were sent")]
    WrongPrompt { expected: usize, found: Option<u64> },
    #[error("aborted after {tokens} tokens: {message}")]
    Aborted { tokens: usize, message: String },
    #[error("the logits were not finite after {tokens} tokens")]
    Poison { tokens: usize },
    #[error("{given} ids were given, {counted} counted")]
    WrongCount { given: usize, counted: u64 },
    #[error("{given} tokens were given, {allowed} allowed")]
    TooLong { given: usize, allowed: usize },
    #[error("token {id} at position {position} is outside the vocabulary of {vocab_size}")]
    OutOfVocabulary { position: usize, id: i64, vocab_size: usize },
    #[error("{behind} tokens follow an EOS at position {position}")]
    AfterEos { position: usize, behind: usize },
    #[error("the length was given as reason after {given} tokens (said: {said}), {asked} were asked")]
    ShortLength { given: usize, said: u64, asked: usize },
    #[error("stopped at {last:?}, the tokenizer's EOS is {eos}")]
    OtherStop { last: Option<i64>, eos: TokenId },
    #[error("stopped by text {0:?}, no stop text was sent")]
    StopText(String),
}

impl BadResponse {
    /// Whose fault it is.
    #[must_use]
    pub const fn blame(&self) -> Blame {
        match self {
            Self::Aborted { .. } => Blame::Aborted,
            Self::Poison { .. } => Blame::Poison,
            Self::OtherStop { .. } => Blame::Sample,
            _ => Blame::Server,
        }
    }
}

/// The rules of an answer with status 200: the right request on the right weights, as many ids as counted and allowed, all
/// of them in the vocabulary, nothing behind an EOS, and an ending that a validator accepts.
///
/// # Errors
/// The first rule that is broken. An abort and poisoned logits come before the rules about counts, which they break too.
pub fn validate_response(expected: &Expected<'_>, response: &GenerateResponse) -> Result<Completion, BadResponse> {
    let meta = &response.meta_info;
    let given = response.output_ids.len();
    if meta.id != expected.rid {
        return Err(BadResponse::WrongRequest { expected: expected.rid.to_owned(), found: meta.id.clone() });
    }
    match &meta.finish_reason {
        FinishReason::Abort { message, .. } => {
            let message = message.clone().unwrap_or_default();
            return Err(BadResponse::Aborted { tokens: given, message });
        }
        FinishReason::Stop { matched: Matched::Text(text) } if text == "NaN happened" => {
            return Err(BadResponse::Poison { tokens: given });
        }
        FinishReason::Stop { .. } | FinishReason::Length { .. } => {}
    }
    if meta.weight_version != expected.weight_version {
        let expected = expected.weight_version.to_owned();
        return Err(BadResponse::WrongWeights { expected, found: meta.weight_version.clone() });
    }
    if meta.prompt_tokens != u64::try_from(expected.prompt_tokens).ok() {
        return Err(BadResponse::WrongPrompt { expected: expected.prompt_tokens, found: meta.prompt_tokens });
    }
    let tokens = checked_tokens(expected, response)?;
    let ending = ending(expected, response)?;
    Ok(Completion { tokens, ending, cached_tokens: meta.cached_tokens })
}

fn checked_tokens(expected: &Expected<'_>, response: &GenerateResponse) -> Result<Vec<TokenId>, BadResponse> {
    let given = response.output_ids.len();
    let counted = response.meta_info.completion_tokens;
    if u64::try_from(given) != Ok(counted) {
        return Err(BadResponse::WrongCount { given, counted });
    }
    if given > expected.max_new_tokens {
        return Err(BadResponse::TooLong { given, allowed: expected.max_new_tokens });
    }
    let tokens = response
        .output_ids
        .iter()
        .enumerate()
        .map(|(position, &id)| match u32::try_from(id) {
            Ok(token) if usize::try_from(token).is_ok_and(|token| token < expected.vocab_size) => Ok(TokenId(token)),
            _ => Err(BadResponse::OutOfVocabulary { position, id, vocab_size: expected.vocab_size }),
        })
        .collect::<Result<Vec<_>, _>>()?;
    match tokens.iter().position(|token| *token == expected.eos_token) {
        Some(position) if position + 1 < given => Err(BadResponse::AfterEos { position, behind: given - position - 1 }),
        _ => Ok(tokens),
    }
}

fn ending(expected: &Expected<'_>, response: &GenerateResponse) -> Result<Ending, BadResponse> {
    let given = response.output_ids.len();
    match &response.meta_info.finish_reason {
        FinishReason::Length { length } => {
            if given == expected.max_new_tokens && u64::try_from(given) == Ok(*length) {
                Ok(Ending::Length)
            } else {
                Err(BadResponse::ShortLength { given, said: *length, asked: expected.max_new_tokens })
            }
        }
        FinishReason::Stop { matched: Matched::Text(text) } => Err(BadResponse::StopText(text.clone())),
        FinishReason::Stop { matched: Matched::Token(matched) } => {
            let last = response.output_ids.last().copied();
            let eos = i64::from(expected.eos_token.0);
            if last == Some(eos) && *matched == eos {
                Ok(Ending::Eos)
            } else {
                Err(BadResponse::OtherStop { last, eos: expected.eos_token })
            }
        }
        FinishReason::Abort { .. } => unreachable!("an abort is refused before the tokens are looked at"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const FILE: &str = "generation/sglang-0.5.16-responses.json";
    /// Vocabulary of the recorded checkpoint.
    const VOCAB: usize = 259;

    fn expected<'a>() -> Expected<'a> {
        Expected {
            rid: "r",
            prompt_tokens: 4,
            max_new_tokens: 3,
            vocab_size: 10,
            eos_token: TokenId(9),
            weight_version: "ckpt0",
        }
    }

    fn response(ids: &[i64], finish_reason: FinishReason) -> GenerateResponse {
        GenerateResponse {
            text: None,
            output_ids: ids.to_vec(),
            meta_info: MetaInfo {
                id: "r".to_owned(),
                finish_reason,
                completion_tokens: ids.len() as u64,
                weight_version: "ckpt0".to_owned(),
                prompt_tokens: Some(4),
                cached_tokens: 3,
                num_retractions: 0,
                e2e_latency: None,
                output_token_logprobs: None,
            },
        }
    }

    const fn length(length: u64) -> FinishReason {
        FinishReason::Length { length }
    }

    const fn stop(id: i64) -> FinishReason {
        FinishReason::Stop { matched: Matched::Token(id) }
    }

    #[test]
    fn sound_endings_are_believed() {
        let cases = [
            (vec![1, 2, 3], length(3), Ending::Length),
            (vec![1, 2, 9], length(3), Ending::Length),
            (vec![1, 9], stop(9), Ending::Eos),
            (vec![9], stop(9), Ending::Eos),
        ];
        for (ids, reason, ending) in cases {
            let completion = validate_response(&expected(), &response(&ids, reason)).unwrap();
            assert_eq!(completion.ending, ending);
            assert_eq!(completion.cached_tokens, 3);
            let tokens: Vec<i64> = completion.tokens.iter().map(|token| i64::from(token.0)).collect();
            assert_eq!(tokens, ids);
        }
    }

    #[test]
    fn each_broken_rule_has_its_name() {
        let nan = FinishReason::Stop { matched: Matched::Text("NaN happened".to_owned()) };
        let text = FinishReason::Stop { matched: Matched::Text("</s>".to_owned()) };
        let abort = FinishReason::Abort { message: Some("Aborted".to_owned()), status_code: None, err_type: None };
        let cases = [
            (vec![1, 2], length(2), BadResponse::ShortLength { given: 2, said: 2, asked: 3 }, Blame::Server),
            (vec![1, 2, 3], length(2), BadResponse::ShortLength { given: 3, said: 2, asked: 3 }, Blame::Server),
            (vec![1, 2, 3, 4], length(4), BadResponse::TooLong { given: 4, allowed: 3 }, Blame::Server),
            (vec![1, 8], stop(8), BadResponse::OtherStop { last: Some(8), eos: TokenId(9) }, Blame::Sample),
            (vec![1, 2], stop(9), BadResponse::OtherStop { last: Some(2), eos: TokenId(9) }, Blame::Sample),
            (vec![], stop(9), BadResponse::OtherStop { last: None, eos: TokenId(9) }, Blame::Sample),
            (vec![9, 1, 9], length(3), BadResponse::AfterEos { position: 0, behind: 2 }, Blame::Server),
            (vec![9, 9], stop(9), BadResponse::AfterEos { position: 0, behind: 1 }, Blame::Server),
            (
                vec![1, 10, 3],
                length(3),
                BadResponse::OutOfVocabulary { position: 1, id: 10, vocab_size: 10 },
                Blame::Server,
            ),
            (
                vec![-1, 2, 3],
                length(3),
                BadResponse::OutOfVocabulary { position: 0, id: -1, vocab_size: 10 },
                Blame::Server,
            ),
            (vec![1, 9], nan, BadResponse::Poison { tokens: 2 }, Blame::Poison),
            (vec![1, 9], text, BadResponse::StopText("</s>".to_owned()), Blame::Server),
            (vec![1], abort, BadResponse::Aborted { tokens: 1, message: "Aborted".to_owned() }, Blame::Aborted),
        ];
        for (ids, reason, error, blame) in cases {
            let refused = validate_response(&expected(), &response(&ids, reason)).unwrap_err();
            assert_eq!(refused, error);
            assert_eq!(refused.blame(), blame);
        }
    }

    #[test]
    fn an_answer_must_be_to_this_question() {
        let good = response(&[1, 2, 3], length(3));
        let mut other = good.clone();
        other.meta_info.id = "q".to_owned();
        assert!(matches!(validate_response(&expected(), &other), Err(BadResponse::WrongRequest { .. })));
        let mut other = good.clone();
        other.meta_info.weight_version = "ckpt1".to_owned();
        assert!(matches!(validate_response(&expected(), &other), Err(BadResponse::WrongWeights { .. })));
        for prompt_tokens in [Some(5), None] {
            let mut other = good.clone();
            other.meta_info.prompt_tokens = prompt_tokens;
            assert!(matches!(validate_response(&expected(), &other), Err(BadResponse::WrongPrompt { .. })));
        }
        let mut other = good;
        other.meta_info.completion_tokens = 2;
        assert_eq!(validate_response(&expected(), &other), Err(BadResponse::WrongCount { given: 3, counted: 2 }));
    }

    #[derive(Debug, Deserialize)]
    struct Recorded {
        #[serde(default)]
        body: Option<serde_json::Value>,
    }

    /// The samples that a real server gave: what was asked is in the descriptions of the file.
    #[test]
    fn recorded_samples_are_judged_by_the_rules() {
        let recorded: BTreeMap<String, Recorded> = grail_golden::json(FILE);
        let asked = [
            ("generate", 80, 24, "ckpt0", None),
            ("generate2", 80, 24, "ckpt0", None),
            ("gen_logprob", 80, 4, "ckpt0", None),
            ("clamp_exact", 4000, 104, "ckpt0", Some(BadResponse::ShortLength { given: 102, said: 102, asked: 104 })),
            ("after", 80, 24, "ckpt1", None),
            ("after_missing", 80, 4, "ckpt1", None),
        ];
        let mut ran = 0;
        for (name, prompt_tokens, max_new_tokens, weight_version, error) in asked {
            let body = recorded[name].body.clone().unwrap();
            let response: GenerateResponse = serde_json::from_value(body).unwrap();
            let rid = response.meta_info.id.clone();
            let expected = Expected {
                rid: &rid,
                prompt_tokens,
                max_new_tokens,
                vocab_size: VOCAB,
                // No recorded sample ended by a stop token.
                eos_token: TokenId(258),
                weight_version,
            };
            let judged = validate_response(&expected, &response);
            match error {
                Some(error) => assert_eq!(judged, Err(error), "{name}"),
                None => assert_eq!(judged.unwrap().ending, Ending::Length, "{name}"),
            }
            if let Some(logprobs) = &response.meta_info.output_token_logprobs {
                let ids: Vec<i64> = logprobs.iter().map(|entry| entry.1).collect();
                assert_eq!(ids, response.output_ids, "{name}");
                assert!(logprobs.iter().all(|entry| entry.0 < 0.0 && entry.2.is_none()), "{name}");
            }
            ran += 1;
        }
        grail_golden::ran(FILE, ran, asked_of(&recorded, "output_ids"));
    }

    /// Entries of the file whose body has this key.
    fn asked_of(recorded: &BTreeMap<String, Recorded>, key: &str) -> usize {
        recorded.values().filter(|entry| entry.body.as_ref().is_some_and(|body| body.get(key).is_some())).count()
    }

    #[test]
    fn recorded_refusals_and_reports_have_the_known_shapes() {
        let recorded: BTreeMap<String, Recorded> = grail_golden::json(FILE);
        let body = |name: &str| recorded[name].body.clone().unwrap();
        for (name, start) in [
            ("clamp_105", "Requested token count exceeds the model's maximum context length of 4104 tokens."),
            ("bad_topk0", "top_k must be -1 (disable) or at least 1, got 0."),
            ("bad_topp0", "top_p must be in (0, 1], got 0.0."),
        ] {
            let error: ErrorBody = serde_json::from_value(body(name)).unwrap();
            assert!(error.text().unwrap().starts_with(start), "{name}: {error:?}");
        }
        let http: ErrorBody =
            serde_json::from_str(r#"{"object":"error","message":"no","type":"BadRequest","code":400}"#).unwrap();
        assert_eq!(http.text(), Some("no"));
        for (name, success) in [("update", true), ("update_missing", false)] {
            let update: UpdateWeightsResponse = serde_json::from_value(body(name)).unwrap();
            assert_eq!((update.success, update.num_paused_requests), (success, 0), "{name}");
        }
        for (name, path, label) in [("model_info", "<ckpt0>", "ckpt0"), ("model_info_after", "<ckpt1>", "ckpt1")] {
            let info: ModelInfo = serde_json::from_value(body(name)).unwrap();
            assert_eq!((info.model_path.as_str(), info.weight_version.as_str()), (path, label));
            assert_eq!((info.tokenizer_path.as_str(), info.is_generation), ("<ckpt0>", true));
        }
        grail_golden::ran(FILE, 7, 7);
    }
}
