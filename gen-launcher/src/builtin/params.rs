//! Bodies of `/generate` as clients write them: defaults, ranges and texts of errors as SGLang 0.5.16 has them.

use std::collections::BTreeSet;

use grail_protocol::ids::TokenId;
use serde::Deserialize;
use serde_json::Value;

use super::sampler::Sampling;

/// Completion length of a request that says nothing.
pub const DEFAULT_MAX_NEW_TOKENS: i64 = 128;
/// Below this temperature a request is greedy.
const GREEDY_TEMPERATURE: f64 = 1e-6;

/// A body that is refused with status 400.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParamsError {
    /// The body has another shape; answered in the shape of a failed validation.
    #[error("{0}")]
    Body(String),
    /// A value is out of range or asks for something that this server does not do.
    #[error("{0}")]
    Value(String),
}

fn value_error<T>(text: impl Into<String>) -> Result<T, ParamsError> {
    Err(ParamsError::Value(text.into()))
}

/// One body of `/generate`.
#[derive(Debug, Clone, PartialEq)]
pub struct ParsedBody {
    /// In the order of the answer.
    pub samples: Vec<SampleRequest>,
    /// The answer is a list.
    pub is_batch: bool,
}

/// One sample that is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleRequest {
    /// `None` = the server makes one up.
    pub rid: Option<String>,
    pub prompt: Prompt,
    pub params: SampleParams,
    pub return_logprob: bool,
}

/// A prompt as the client gave it.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    Ids(Vec<i64>),
    Text(String),
}

/// Checked sampling parameters of one sample.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleParams {
    /// `None` = as many as fit.
    pub max_new_tokens: Option<usize>,
    pub min_new_tokens: usize,
    pub sampling: Sampling,
    pub stop_token_ids: BTreeSet<TokenId>,
    pub ignore_eos: bool,
    pub sampling_seed: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct RawBody {
    #[serde(default)]
    text: Value,
    #[serde(default)]
    input_ids: Value,
    #[serde(default)]
    input_embeds: Value,
    #[serde(default)]
    rid: Value,
    #[serde(default)]
    sampling_params: Value,
    #[serde(default)]
    return_logprob: Value,
    #[serde(default)]
    stream: Option<bool>,
}

impl ParsedBody {
    /// Reads a body.
    ///
    /// # Errors
    /// [`ParamsError`]
    pub fn parse(body: &[u8]) -> Result<Self, ParamsError> {
        let raw: RawBody = serde_json::from_slice(body).map_err(|error| ParamsError::Body(error.to_string()))?;
        if raw.stream == Some(true) {
            return value_error("stream is not supported by the builtin server: leave it out or send false");
        }
        if !raw.input_embeds.is_null() {
            return value_error("input_embeds is not supported by the builtin server: send input_ids");
        }
        let (prompts, is_batch) = prompts(raw.text, raw.input_ids)?;
        let rids = rids(&raw.rid, prompts.len(), is_batch)?;
        let params = per_sample("sampling_params", &raw.sampling_params, prompts.len())?;
        let logprobs = per_sample("return_logprob", &raw.return_logprob, prompts.len())?;
        let mut samples = Vec::with_capacity(prompts.len());
        let mut copies_asked = None;
        for (((prompt, rid), params), logprob) in prompts.into_iter().zip(rids).zip(params).zip(logprobs) {
            let (params, copies) = SampleParams::parse(&params)?;
            if *copies_asked.get_or_insert(copies) != copies {
                return value_error("The parallel_sample_num should be the same for all samples in sample params.");
            }
            let return_logprob = logprob.as_bool().unwrap_or(false);
            let sample = SampleRequest { rid, prompt, params, return_logprob };
            if copies == 1 {
                samples.push(sample);
            } else {
                // Copies run under names of the server's own.
                samples.extend((0..copies).map(|_| SampleRequest { rid: None, ..sample.clone() }));
            }
        }
        let is_batch = is_batch || copies_asked.is_some_and(|copies| copies > 1);
        Ok(Self { samples, is_batch })
    }
}

fn prompts(text: Value, input_ids: Value) -> Result<(Vec<Prompt>, bool), ParamsError> {
    let ids = |value: Value| -> Result<Prompt, ParamsError> {
        serde_json::from_value(value).map(Prompt::Ids).map_err(|error| ParamsError::Body(format!("input_ids: {error}")))
    };
    match (text, input_ids) {
        (Value::Null, Value::Null) => value_error("Either text, input_ids or input_embeds should be provided."),
        (Value::Null, Value::Array(items)) if items.first().is_some_and(Value::is_array) => {
            Ok((items.into_iter().map(ids).collect::<Result<_, _>>()?, true))
        }
        (Value::Null, one) => Ok((vec![ids(one)?], false)),
        (Value::String(text), Value::Null) => Ok((vec![Prompt::Text(text)], false)),
        (Value::Array(items), Value::Null) if !items.is_empty() => {
            let texts: Result<Vec<String>, _> = items.into_iter().map(serde_json::from_value).collect();
            let texts = texts.map_err(|error| ParamsError::Body(format!("text: {error}")))?;
            Ok((texts.into_iter().map(Prompt::Text).collect(), true))
        }
        (_, Value::Null) => Err(ParamsError::Body("text: a string or a list of strings is expected".to_owned())),
        _ => value_error("Either text, input_ids or input_embeds should be provided."),
    }
}

fn rids(rid: &Value, count: usize, is_batch: bool) -> Result<Vec<Option<String>>, ParamsError> {
    let rids: Vec<Option<String>> = match rid {
        Value::Null => vec![None; count],
        Value::String(rid) if is_batch => (0..count).map(|index| Some(format!("{rid}_{index}"))).collect(),
        Value::String(rid) => vec![Some(rid.clone())],
        Value::Array(items) if items.len() == count && is_batch => items
            .iter()
            .map(|item| item.as_str().map(|rid| Some(rid.to_owned())))
            .collect::<Option<_>>()
            .ok_or_else(|| ParamsError::Body("rid: a list of strings is expected".to_owned()))?,
        Value::Array(_) => {
            return value_error("The specified rids length mismatch with the batch_size for batch processing.");
        }
        _ => return Err(ParamsError::Body("rid: a string or a list of strings is expected".to_owned())),
    };
    let mut seen = BTreeSet::new();
    match rids.iter().flatten().find(|rid| !seen.insert(*rid)) {
        Some(rid) => value_error(format!("Duplicate request IDs detected within the request: {rid}")),
        None => Ok(rids),
    }
}

/// One value for all samples, or one each.
fn per_sample(name: &str, value: &Value, count: usize) -> Result<Vec<Value>, ParamsError> {
    match value {
        Value::Array(items) if items.len() == count => Ok(items.clone()),
        Value::Array(items) => {
            let given = items.len();
            value_error(format!("The length of {name} ({given}) should be equal to the batch size ({count})."))
        }
        one => Ok(vec![one.clone(); count]),
    }
}

/// Names that SGLang knows and that change the result, but that this server does not do.
const UNSUPPORTED: [&str; 8] =
    ["stop", "stop_regex", "json_schema", "regex", "ebnf", "structural_tag", "logit_bias", "custom_params"];
/// Names that concern only the text of an answer or its transport.
const WITHOUT_EFFECT: [&str; 4] =
    ["skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "stream_interval"];

#[derive(Debug, Default)]
struct RawParams {
    max_new_tokens: Option<Option<i64>>,
    min_new_tokens: Option<i64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    min_p: Option<f64>,
    frequency_penalty: Option<f64>,
    presence_penalty: Option<f64>,
    repetition_penalty: Option<f64>,
    stop_token_ids: Option<Vec<Option<i64>>>,
    ignore_eos: Option<bool>,
    sampling_seed: Option<u64>,
    n: Option<i64>,
}

impl RawParams {
    fn read(value: &Value) -> Result<Self, ParamsError> {
        let mut raw = Self::default();
        let object = match value {
            Value::Null => return Ok(raw),
            Value::Object(object) => object,
            other => return Err(ParamsError::Body(format!("sampling_params: an object is expected, not {other}"))),
        };
        for (name, value) in object {
            let value = value.clone();
            match name.as_str() {
                "max_new_tokens" => raw.max_new_tokens = Some(field(name, value)?),
                "min_new_tokens" => raw.min_new_tokens = field(name, value)?,
                "temperature" => raw.temperature = field(name, value)?,
                "top_p" => raw.top_p = field(name, value)?,
                "top_k" => raw.top_k = field(name, value)?,
                "min_p" => raw.min_p = field(name, value)?,
                "frequency_penalty" => raw.frequency_penalty = field(name, value)?,
                "presence_penalty" => raw.presence_penalty = field(name, value)?,
                "repetition_penalty" => raw.repetition_penalty = field(name, value)?,
                "stop_token_ids" => raw.stop_token_ids = field(name, value)?,
                "ignore_eos" => raw.ignore_eos = field(name, value)?,
                "sampling_seed" => raw.sampling_seed = field(name, value)?,
                "n" => raw.n = field(name, value)?,
                known if WITHOUT_EFFECT.contains(&known) => {}
                known if UNSUPPORTED.contains(&known) => {
                    if !is_neutral(&value) {
                        return value_error(format!("{known} is not supported by the builtin server: leave it out"));
                    }
                }
                unknown => return value_error(format!("Unexpected keyword argument '{unknown}'")),
            }
        }
        Ok(raw)
    }
}

fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

fn field<T: serde::de::DeserializeOwned>(name: &str, value: Value) -> Result<T, ParamsError> {
    serde_json::from_value(value).map_err(|error| ParamsError::Value(format!("sampling_params.{name}: {error}")))
}

impl SampleParams {
    /// Defaults, special cases and ranges; beside the parameters the number of copies (`n`).
    fn parse(value: &Value) -> Result<(Self, usize), ParamsError> {
        let raw = RawParams::read(value)?;
        let mut temperature = raw.temperature.unwrap_or(1.0);
        let mut top_k = raw.top_k.unwrap_or(-1);
        if (0.0..GREEDY_TEMPERATURE).contains(&temperature) {
            temperature = 1.0;
            top_k = 1;
        }
        let top_p = raw.top_p.unwrap_or(1.0);
        let min_p = raw.min_p.unwrap_or(0.0);
        let repetition_penalty = raw.repetition_penalty.unwrap_or(1.0);
        if !temperature.is_finite() || temperature < 0.0 {
            return value_error(format!("temperature must be a non-negative finite number, got {temperature:?}."));
        }
        if !(0.0 < top_p && top_p <= 1.0) {
            return value_error(format!("top_p must be in (0, 1], got {top_p:?}."));
        }
        if !(0.0..=1.0).contains(&min_p) {
            return value_error(format!("min_p must be in [0, 1], got {min_p:?}."));
        }
        if top_k != -1 && top_k < 1 {
            return value_error(format!("top_k must be -1 (disable) or at least 1, got {top_k}."));
        }
        let frequency_penalty = within_two("frequency_penalty", raw.frequency_penalty)?;
        let presence_penalty = within_two("presence_penalty", raw.presence_penalty)?;
        if !(0.0 < repetition_penalty && repetition_penalty <= 2.0) {
            return value_error(format!(
                "repetition_penalty must be in (0, 2] (1.0 = no penalty), got {repetition_penalty:?}."
            ));
        }
        let (max_new_tokens, min_new_tokens) = lengths(&raw)?;
        let copies = raw.n.unwrap_or(1);
        let Some(copies) = usize::try_from(copies).ok().filter(|copies| (1..=4096).contains(copies)) else {
            return value_error(format!("n must be in [1, 4096], got {copies}."));
        };
        let stop_token_ids = raw.stop_token_ids.unwrap_or_default().into_iter().flatten();
        #[expect(clippy::cast_possible_truncation, reason = "logits are single precision")]
        let sampling = Sampling {
            temperature: temperature as f32,
            top_k: usize::try_from(top_k).unwrap_or(usize::MAX),
            top_p,
            min_p,
            repetition_penalty: repetition_penalty as f32,
            frequency_penalty: frequency_penalty as f32,
            presence_penalty: presence_penalty as f32,
        };
        let params = Self {
            max_new_tokens,
            min_new_tokens,
            sampling,
            // Ids outside 32 bits can never be drawn.
            stop_token_ids: stop_token_ids.filter_map(|id| u32::try_from(id).ok()).map(TokenId).collect(),
            ignore_eos: raw.ignore_eos.unwrap_or(false),
            sampling_seed: raw.sampling_seed,
        };
        Ok((params, copies))
    }
}

fn within_two(name: &str, value: Option<f64>) -> Result<f64, ParamsError> {
    let value = value.unwrap_or(0.0);
    if (-2.0..=2.0).contains(&value) {
        Ok(value)
    } else {
        value_error(format!("{name} must be in [-2, 2], got {value:?}."))
    }
}

fn lengths(raw: &RawParams) -> Result<(Option<usize>, usize), ParamsError> {
    let most = raw.max_new_tokens.unwrap_or(Some(DEFAULT_MAX_NEW_TOKENS));
    let least = raw.min_new_tokens.unwrap_or(0);
    let Ok(min_new_tokens) = usize::try_from(least) else {
        return value_error(format!("min_new_tokens must be in [0, max_new_tokens], got {least}."));
    };
    let Some(most) = most else { return Ok((None, min_new_tokens)) };
    let Ok(max_new_tokens) = usize::try_from(most) else {
        return value_error(format!("max_new_tokens must be at least 0, got {most}."));
    };
    if min_new_tokens > max_new_tokens {
        return value_error(format!("min_new_tokens must be in [0, max_new_tokens({most})], got {least}."));
    }
    Ok((Some(max_new_tokens), min_new_tokens))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(body: &Value) -> Result<ParsedBody, ParamsError> {
        ParsedBody::parse(body.to_string().as_bytes())
    }

    fn one(params: &Value) -> Result<SampleParams, ParamsError> {
        parse(&json!({"input_ids": [1], "sampling_params": params})).map(|body| body.samples[0].params.clone())
    }

    #[test]
    fn defaults_are_those_of_the_server() {
        for params in [json!({}), json!(null), json!({"temperature": null, "top_k": null, "n": null})] {
            let params = one(&params).unwrap();
            assert_eq!(params.max_new_tokens, Some(128));
            assert_eq!(params.sampling, Sampling::default());
            assert!(!params.ignore_eos && params.stop_token_ids.is_empty() && params.sampling_seed.is_none());
        }
        assert_eq!(one(&json!({"max_new_tokens": null})).unwrap().max_new_tokens, None);
    }

    #[test]
    fn a_tiny_temperature_is_greedy() {
        for temperature in [0.0, 9e-7] {
            let sampling = one(&json!({"temperature": temperature, "top_k": 20})).unwrap().sampling;
            assert_eq!((sampling.temperature, sampling.top_k), (1.0, 1));
        }
        assert_eq!(one(&json!({"temperature": 1e-6, "top_k": 20})).unwrap().sampling.top_k, 20);
    }

    #[test]
    fn values_out_of_range_are_refused_with_the_servers_words() {
        let cases = [
            (json!({"top_k": 0}), "top_k must be -1 (disable) or at least 1, got 0."),
            (json!({"top_k": -2}), "top_k must be -1 (disable) or at least 1, got -2."),
            (json!({"top_p": 0.0}), "top_p must be in (0, 1], got 0.0."),
            (json!({"top_p": 0}), "top_p must be in (0, 1], got 0.0."),
            (json!({"top_p": 1.5}), "top_p must be in (0, 1], got 1.5."),
            (json!({"min_p": -0.1}), "min_p must be in [0, 1], got -0.1."),
            (json!({"temperature": -1.0}), "temperature must be a non-negative finite number, got -1.0."),
            (json!({"repetition_penalty": 0.0}), "repetition_penalty must be in (0, 2] (1.0 = no penalty), got 0.0."),
            (json!({"repetition_penalty": 2.5}), "repetition_penalty must be in (0, 2] (1.0 = no penalty), got 2.5."),
            (json!({"frequency_penalty": 3}), "frequency_penalty must be in [-2, 2], got 3.0."),
            (json!({"presence_penalty": -2.1}), "presence_penalty must be in [-2, 2], got -2.1."),
            (json!({"max_new_tokens": -1}), "max_new_tokens must be at least 0, got -1."),
            (json!({"min_new_tokens": -1}), "min_new_tokens must be in [0, max_new_tokens], got -1."),
            (
                json!({"min_new_tokens": 5, "max_new_tokens": 4}),
                "min_new_tokens must be in [0, max_new_tokens(4)], got 5.",
            ),
            (json!({"n": 0}), "n must be in [1, 4096], got 0."),
            (json!({"topk": 1}), "Unexpected keyword argument 'topk'"),
            (json!({"stop": ["a"]}), "stop is not supported by the builtin server: leave it out"),
        ];
        for (params, text) in cases {
            assert_eq!(one(&params), Err(ParamsError::Value(text.to_owned())), "{params}");
        }
        assert!(matches!(one(&json!({"top_k": "many"})), Err(ParamsError::Value(text)) if text.contains("top_k")));
        assert!(one(&json!({"stop": [], "skip_special_tokens": false})).is_ok());
    }

    #[test]
    fn batches_take_lists_or_one_value_for_all() {
        let body = parse(&json!({
            "input_ids": [[1], [2, 3]], "rid": "r", "return_logprob": [true, false],
            "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 2}],
        }))
        .unwrap();
        assert!(body.is_batch);
        let rids: Vec<_> = body.samples.iter().map(|sample| sample.rid.as_deref()).collect();
        assert_eq!(rids, [Some("r_0"), Some("r_1")]);
        let lengths: Vec<_> = body.samples.iter().map(|sample| sample.params.max_new_tokens).collect();
        assert_eq!(lengths, [Some(1), Some(2)]);
        let logprobs: Vec<_> = body.samples.iter().map(|sample| sample.return_logprob).collect();
        assert_eq!(logprobs, [true, false]);
        assert_eq!(body.samples[1].prompt, Prompt::Ids(vec![2, 3]));
        let single = parse(&json!({"input_ids": [[5]]})).unwrap();
        assert!(single.is_batch && single.samples.len() == 1);
    }

    #[test]
    fn copies_get_names_of_their_own() {
        let body = parse(&json!({"input_ids": [1], "rid": "r", "sampling_params": {"n": 3}})).unwrap();
        assert!(body.is_batch && body.samples.len() == 3);
        assert!(body.samples.iter().all(|sample| sample.rid.is_none()));
    }

    #[test]
    fn impossible_bodies_are_refused() {
        let cases = [
            json!({}),
            json!({"input_ids": [1], "text": "a"}),
            json!({"input_ids": [1], "stream": true}),
            json!({"input_ids": ["a"]}),
            json!({"input_ids": [1.5]}),
            json!({"input_ids": [[1], [2]], "rid": ["a"]}),
            json!({"input_ids": [[1], [2]], "rid": ["a", "a"]}),
            json!({"input_ids": [1], "rid": 7}),
            json!({"input_ids": [[1], [2]], "sampling_params": [{}]}),
            json!({"input_ids": [[1], [2]], "sampling_params": [{"n": 1}, {"n": 2}]}),
            json!({"input_ids": [1], "sampling_params": 3}),
        ];
        for body in cases {
            assert!(parse(&body).is_err(), "{body}");
        }
        assert!(matches!(ParsedBody::parse(b"{"), Err(ParamsError::Body(_))));
    }
}
