//! What a checkpoint prescribes for mining with it: environment, sampling parameters and thinking mode.
//!
//! Nothing is ever substituted: whatever is missing, of another type or out of range means that the window is skipped, as
//! miners and validators of the reference do.

use grail_protocol::constants::MAX_NEW_TOKENS_PROTOCOL_CAP;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::python;

/// Keys that `generation_params` must have.
const GENERATION_KEYS: [&str; 5] = ["max_tokens", "temperature", "top_p", "top_k", "repetition_penalty"];
/// Splits of a dataset that a checkpoint may name.
const SPLITS: [&str; 4] = ["train", "test", "validation", "val"];

/// Why no window is mined with a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyDefect {
    #[error("the metadata lacks {key}")]
    Missing { key: &'static str },
    #[error("{key} is {value}, which is no {expected}")]
    Type { key: &'static str, value: String, expected: &'static str },
    #[error("{key} is {value}, allowed is {allowed}")]
    Range { key: &'static str, value: String, allowed: &'static str },
}

/// Everything of the metadata that decides how a window is mined.
#[derive(Debug, Clone, PartialEq)]
pub struct MiningPolicy {
    /// Name of the environment, not empty; whether this build has it is the environment crate's matter.
    pub env_id: String,
    pub env_params: EnvironmentParams,
    pub generation: GenerationParams,
    pub thinking_mode: ThinkingModeName,
}

impl MiningPolicy {
    /// Reads the policy from a metadata document.
    ///
    /// # Errors
    /// The first defect found: missing keys before values out of range.
    pub fn from_document(document: &Map<String, Value>) -> Result<Self, PolicyDefect> {
        let env_id = match present(document, "env_id")? {
            Value::String(id) if !id.is_empty() => id.clone(),
            Value::String(_) => return Err(PolicyDefect::Missing { key: "env_id" }),
            other => return Err(wrong_type("env_id", other, "text")),
        };
        let thinking_mode = ThinkingModeName::from_json(present(document, "thinking_mode")?)?;
        let generation = GenerationParams::from_json(present(document, "generation_params")?)?;
        let env_params = EnvironmentParams::from_json(document.get("env_params"))?;
        Ok(Self { env_id, env_params, generation, thinking_mode })
    }
}

/// How the system prompt and the chat template are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ThinkingModeName {
    Native,
    Instructed,
}

impl ThinkingModeName {
    /// The mode as metadata spells it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Instructed => "instructed",
        }
    }

    fn from_json(value: &Value) -> Result<Self, PolicyDefect> {
        match value.as_str() {
            Some("native") => Ok(Self::Native),
            Some("instructed") => Ok(Self::Instructed),
            Some("") => Err(PolicyDefect::Missing { key: "thinking_mode" }),
            _ => Err(PolicyDefect::Range {
                key: "thinking_mode",
                value: value.to_string(),
                allowed: "\"native\" or \"instructed\", in lower case",
            }),
        }
    }
}

/// Parameters of the environment: the published object and what mining reads of it.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct EnvironmentParams {
    /// Split of the dataset; `None` leaves it to the environment.
    pub split: Option<String>,
    /// The whole object as published, for context files.
    pub document: Map<String, Value>,
}

impl EnvironmentParams {
    /// Reads the value of `env_params`; absent and `null` are the empty object.
    ///
    /// # Errors
    /// [`PolicyDefect`] if it is no object or its split is none of the four.
    pub fn from_json(value: Option<&Value>) -> Result<Self, PolicyDefect> {
        let document = match value {
            None | Some(Value::Null) => return Ok(Self::default()),
            Some(Value::Object(document)) => document.clone(),
            Some(other) => return Err(wrong_type("env_params", other, "object")),
        };
        let split = match document.get("split") {
            None | Some(Value::Null) => None,
            Some(Value::String(split)) if SPLITS.contains(&split.as_str()) => Some(split.clone()),
            Some(other) => {
                return Err(PolicyDefect::Range {
                    key: "env_params.split",
                    value: other.to_string(),
                    allowed: "train, test, validation or val",
                });
            }
        };
        Ok(Self { split, document })
    }
}

/// Sampling parameters as published, inside their ranges.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value")]
pub struct GenerationParams {
    /// Longest completion that the trainer wants, in tokens; see [`Self::max_new`].
    pub max_tokens: u64,
    pub temperature: f64,
    pub top_p: f64,
    /// 0 switches the limit off; see [`Self::top_k_limit`].
    pub top_k: u32,
    pub repetition_penalty: f64,
}

impl GenerationParams {
    /// Longest completion of a rollout, in tokens: a row of another length must end in EOS.
    #[must_use]
    pub fn max_new(&self) -> u32 {
        u32::try_from(self.max_tokens)
            .map_or(MAX_NEW_TOKENS_PROTOCOL_CAP, |tokens| tokens.min(MAX_NEW_TOKENS_PROTOCOL_CAP))
    }

    /// How many tokens a draw is limited to; `None`: no limit, the field is left out of requests.
    #[must_use]
    pub fn top_k_limit(&self) -> Option<u32> {
        (self.top_k > 0).then_some(self.top_k)
    }

    /// Reads the value of `generation_params` with Python's conversions: `"2_048"`, `50.9` and `true` are numbers.
    ///
    /// # Errors
    /// [`PolicyDefect`]: a missing key, a value that does not convert, or one out of range.
    pub fn from_json(value: &Value) -> Result<Self, PolicyDefect> {
        let Some(params) = value.as_object() else {
            return Err(wrong_type("generation_params", value, "object"));
        };
        if params.is_empty() {
            return Err(PolicyDefect::Missing { key: "generation_params" });
        }
        if let Some(key) = GENERATION_KEYS.into_iter().find(|key| !params.contains_key(*key)) {
            return Err(PolicyDefect::Missing { key });
        }
        let max_tokens = integer(params, "max_tokens", 1, i128::from(u64::MAX), "1 or more")?;
        let top_k = integer(params, "top_k", 0, 1000, "0 to 1000")?;
        Ok(Self {
            max_tokens: u64::try_from(max_tokens).unwrap_or(u64::MAX),
            temperature: number(params, "temperature", 0.01, 2.0, "0.01 to 2.0")?,
            top_p: number(params, "top_p", 0.0, 1.0, "0.0 to 1.0")?,
            top_k: u32::try_from(top_k).unwrap_or(u32::MAX),
            repetition_penalty: number(params, "repetition_penalty", 1.0, 2.0, "1.0 to 2.0")?,
        })
    }
}

impl TryFrom<Value> for GenerationParams {
    type Error = PolicyDefect;
    fn try_from(value: Value) -> Result<Self, Self::Error> {
        Self::from_json(&value)
    }
}

fn present<'a>(document: &'a Map<String, Value>, key: &'static str) -> Result<&'a Value, PolicyDefect> {
    document.get(key).filter(|value| !value.is_null()).ok_or(PolicyDefect::Missing { key })
}

fn wrong_type(key: &'static str, value: &Value, expected: &'static str) -> PolicyDefect {
    PolicyDefect::Type { key, value: value.to_string(), expected }
}

fn integer(
    params: &Map<String, Value>,
    key: &'static str,
    least: i128,
    most: i128,
    allowed: &'static str,
) -> Result<i128, PolicyDefect> {
    let value = present_number(params, key)?;
    let number = python::int(value).ok_or_else(|| wrong_type(key, value, "integer"))?;
    // `max_tokens` has no upper bound of its own; beyond u64 it means the same as u64's largest.
    let bounded = if key == "max_tokens" { number.min(most) } else { number };
    if (least..=most).contains(&bounded) { Ok(bounded) } else { Err(out_of_range(key, value, allowed)) }
}

fn number(
    params: &Map<String, Value>,
    key: &'static str,
    least: f64,
    most: f64,
    allowed: &'static str,
) -> Result<f64, PolicyDefect> {
    let value = present_number(params, key)?;
    let number = python::float(value).ok_or_else(|| wrong_type(key, value, "number"))?;
    // NaN lies in no range.
    if (least..=most).contains(&number) { Ok(number) } else { Err(out_of_range(key, value, allowed)) }
}

fn present_number<'a>(params: &'a Map<String, Value>, key: &'static str) -> Result<&'a Value, PolicyDefect> {
    params.get(key).ok_or(PolicyDefect::Missing { key })
}

fn out_of_range(key: &'static str, value: &Value, allowed: &'static str) -> PolicyDefect {
    PolicyDefect::Range { key, value: value.to_string(), allowed }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn params(key: &str, value: Value) -> Result<GenerationParams, PolicyDefect> {
        let mut all =
            json!({"max_tokens": 64, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0});
        all[key] = value;
        GenerationParams::from_json(&all)
    }

    #[test]
    fn an_enormous_budget_is_cut_to_the_protocol_cap() {
        for value in [json!(1e30), json!("9".repeat(50)), json!(u64::MAX), json!(8193)] {
            assert_eq!(params("max_tokens", value).unwrap().max_new(), 8192);
        }
        assert_eq!(params("max_tokens", json!(48)).unwrap().max_new(), 48);
    }

    #[test]
    fn an_infinite_number_is_out_of_every_range() {
        for key in ["temperature", "top_p", "repetition_penalty"] {
            let defect = params(key, json!("inf")).unwrap_err();
            assert!(matches!(defect, PolicyDefect::Range { .. }), "{defect}");
        }
    }

    #[test]
    fn errors_name_key_value_and_range() {
        let text = params("temperature", json!(3)).unwrap_err().to_string();
        assert_eq!(text, "temperature is 3, allowed is 0.01 to 2.0");
        let text = params("top_k", json!("x")).unwrap_err().to_string();
        assert_eq!(text, "top_k is \"x\", which is no integer");
    }

    #[test]
    fn serde_goes_through_the_same_checks() {
        let good = params("top_k", json!(7)).unwrap();
        let text = serde_json::to_string(&good).unwrap();
        assert_eq!(serde_json::from_str::<GenerationParams>(&text).unwrap(), good);
        assert!(serde_json::from_str::<GenerationParams>(&text.replace('7', "-7")).is_err());
    }

    #[test]
    fn splits_are_the_four_or_none() {
        let split = |value: Value| EnvironmentParams::from_json(Some(&value));
        assert_eq!(split(json!({"split": "val"})).unwrap().split.as_deref(), Some("val"));
        assert_eq!(split(json!({"gpu_eval": false})).unwrap().split, None);
        assert!(split(json!({"split": "Train"})).is_err());
        assert!(split(json!(["split"])).is_err());
    }
}
