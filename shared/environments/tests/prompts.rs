//! Prompts against the reference, from seed to ids.

use std::collections::BTreeMap;
use std::sync::Arc;

use grail_environments::datasets::embedded;
use grail_environments::{
    Environment, EnvironmentId, NoEvaluator, Split, ThinkingMode, mbpp, messages, prompt_ids, with_system_prompt,
};
use grail_golden::{json, json_lines, path, ran};
use grail_protocol::ids::{EnvironmentSeed, TokenId};
use grail_text::{ChatTemplate, Message, Tokenizer};
use serde::Deserialize;
use serde::de::IgnoredAny;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ModeText {
    thinking_open: String,
    thinking_close: String,
    solution_open: String,
    solution_close: String,
    system_prompt: String,
    /// Whether the trainer installs its own template before it publishes a checkpoint.
    use_custom_template: bool,
    enable_thinking: bool,
}

#[test]
fn mode_texts_are_the_references_bytes() {
    const FILE: &str = "environments/prompts/thinking_modes.json";
    let texts: BTreeMap<String, ModeText> = json(FILE);
    for (name, expected) in &texts {
        let mode: ThinkingMode = name.parse().unwrap();
        assert_eq!((mode.to_string(), serde_json::to_string(&mode).unwrap()), (name.clone(), format!("\"{name}\"")));
        let tags = mode.tags();
        assert_eq!(tags.thinking_open, expected.thinking_open);
        assert_eq!(tags.thinking_close, expected.thinking_close);
        assert_eq!(tags.solution_open, expected.solution_open);
        assert_eq!(tags.solution_close, expected.solution_close);
        assert_eq!(mode.system_prompt(), expected.system_prompt);
        assert_eq!(mode.enable_thinking(), expected.enable_thinking.then_some(true));
        assert_eq!(mode == ThinkingMode::Instructed, expected.use_custom_template);
    }
    assert!("Native".parse::<ThinkingMode>().is_err());
    ran(FILE, texts.len(), 2);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RenderedPrompt {
    env_id: String,
    seed: u64,
    thinking_mode: String,
    template: String,
    messages: Vec<Message>,
    text: String,
    ids_mini: Vec<u32>,
    /// Ids of the full Qwen3 tokenizer, whose file is too large to ship; on some rows only.
    #[serde(default, rename = "ids_qwen3")]
    _ids_qwen3: Option<IgnoredAny>,
}

#[test]
fn prompts_follow_from_seed_and_mode() {
    const FILE: &str = "environments/prompts/rendered_prompts.jsonl";
    let tokenizer = Tokenizer::from_dir(&path("environments/tokenizer")).unwrap();
    let templates: BTreeMap<String, ChatTemplate> =
        json::<BTreeMap<String, String>>("environments/prompts/chat_templates.json")
            .into_iter()
            .map(|(name, source)| (name, ChatTemplate::new(&source, tokenizer.special_tokens()).unwrap()))
            .collect();
    let environments: BTreeMap<&str, Arc<dyn Environment>> = EnvironmentId::ALL
        .into_iter()
        .map(|id| (id.as_str(), embedded(id, Split::resolve(id, None).unwrap(), Arc::new(NoEvaluator)).unwrap()))
        .collect();
    let rows: Vec<RenderedPrompt> = json_lines(FILE);
    for row in &rows {
        let case = format!("{} seed {} {} {}", row.env_id, row.seed, row.thinking_mode, row.template);
        let mode: ThinkingMode = row.thinking_mode.parse().unwrap();
        let task = environments[row.env_id.as_str()].task(EnvironmentSeed(row.seed)).unwrap();
        assert_eq!(messages(&task, mode), row.messages, "{case}");
        let ids = prompt_ids(&task, mode, &tokenizer, &templates[&row.template]).unwrap();
        let expected: Vec<TokenId> = row.ids_mini.iter().copied().map(TokenId).collect();
        assert_eq!(ids, expected, "{case}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), row.text, "{case}");
    }
    ran(FILE, rows.len(), 264);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MbppQuestion {
    code: String,
    /// Empty where no line defines a function.
    signature: String,
    #[serde(rename = "question_for_text_T")]
    question: String,
}

#[test]
fn questions_of_mbpp_end_in_the_signature() {
    const FILE: &str = "environments/prompts/mbpp_question.json";
    let cases: Vec<MbppQuestion> = json(FILE);
    for case in &cases {
        let question = mbpp::question("T", &case.code);
        assert_eq!(question, case.question, "{:?}", case.code);
        let signature = question.strip_prefix("T\n\n").and_then(|rest| rest.strip_suffix("\n    pass"));
        assert_eq!(signature.unwrap_or_default(), case.signature, "{:?}", case.code);
    }
    ran(FILE, cases.len(), 14);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EdgeCase {
    thinking_mode: String,
    messages_in: Vec<Message>,
    messages_prepared: Vec<Message>,
    /// Rendering and encoding of these rows is tested with the text crate.
    #[serde(default, rename = "template")]
    _template: Option<IgnoredAny>,
    #[serde(default, rename = "text")]
    _text: Option<IgnoredAny>,
    #[serde(default, rename = "ids_mini")]
    _ids_mini: Option<IgnoredAny>,
    #[serde(default, rename = "decoded_mini")]
    _decoded_mini: Option<IgnoredAny>,
    #[serde(default, rename = "ids_qwen3")]
    _ids_qwen3: Option<IgnoredAny>,
    #[serde(default, rename = "decoded_qwen3")]
    _decoded_qwen3: Option<IgnoredAny>,
    #[serde(default, rename = "ids_qwen2.5")]
    _ids_qwen2_5: Option<IgnoredAny>,
    #[serde(default, rename = "decoded_qwen2.5")]
    _decoded_qwen2_5: Option<IgnoredAny>,
}

#[test]
fn the_system_prompt_comes_first_once() {
    const FILE: &str = "environments/prompts/template_edge_cases.jsonl";
    let rows: Vec<EdgeCase> = json_lines(FILE);
    for row in &rows {
        let mode: ThinkingMode = row.thinking_mode.parse().unwrap();
        assert_eq!(with_system_prompt(row.messages_in.clone(), mode), row.messages_prepared);
    }
    ran(FILE, rows.len(), 104);
}
