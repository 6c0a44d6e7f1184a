//! The full Qwen tokenizers against the reference's own output. Their files are too large to ship: `make tokenizers` fetches
//! them, and without them these tests say that they skip.

use std::collections::BTreeMap;
use std::path::PathBuf;

use grail_golden::{json, json_lines, ran};
use grail_protocol::ids::TokenId;
use grail_text::{ChatTemplate, Message, RenderOptions, Tokenizer, render_prompt_ids};
use serde::Deserialize;
use serde::de::IgnoredAny;

/// Folder of the tokenizer `name`; `None`, with a printed reason, where it was not fetched.
fn folder(name: &str) -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let general = || variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let cache = variable("GRAIL_BUILD_CACHE_DIR").or_else(|| Some(general()?.join("grail-supervisor")));
    let root = cache.map(|cache| cache.join("tokenizers")).filter(|root| root.join(".complete").is_file());
    if root.is_none() {
        println!("SKIPPED: the tokenizer {name} was not fetched; run `make tokenizers`");
    }
    Some(root?.join(name))
}

fn ids(numbers: &[u32]) -> Vec<TokenId> {
    numbers.iter().copied().map(TokenId).collect()
}

fn options(mode: &str) -> RenderOptions {
    RenderOptions { enable_thinking: (mode == "native").then_some(true) }
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
    /// The small tokenizer has tests of its own.
    #[serde(rename = "ids_mini")]
    _ids_mini: IgnoredAny,
    ids_qwen3: Option<Vec<u32>>,
}

#[test]
fn prompts_encode_as_by_the_reference() {
    const FILE: &str = "environments/prompts/rendered_prompts.jsonl";
    let Some(folder) = folder("qwen3") else { return };
    let tokenizer = Tokenizer::from_dir(&folder).unwrap();
    let templates: BTreeMap<String, ChatTemplate> =
        json::<BTreeMap<String, String>>("environments/prompts/chat_templates.json")
            .into_iter()
            .map(|(name, source)| (name, ChatTemplate::new(&source, tokenizer.special_tokens()).unwrap()))
            .collect();
    let own = ChatTemplate::from_dir(&folder).unwrap();
    let rows: Vec<RenderedPrompt> = json_lines(FILE);
    let mut cases = 0;
    for row in &rows {
        let Some(expected) = &row.ids_qwen3 else { continue };
        let case = format!("{} seed {} {} {}", row.env_id, row.seed, row.thinking_mode, row.template);
        let options = options(&row.thinking_mode);
        let prompt = render_prompt_ids(&tokenizer, &templates[&row.template], &row.messages, options).unwrap();
        assert_eq!(prompt, ids(expected), "{case}");
        assert_eq!(tokenizer.decode(&prompt).unwrap(), row.text, "{case}");
        if row.template == "qwen3" {
            assert_eq!(own.render(&row.messages, options).unwrap(), row.text, "{case}: the package's own template");
        }
        cases += 1;
    }
    ran(FILE, cases, 198);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EdgeCase {
    thinking_mode: String,
    template: String,
    #[serde(rename = "messages_in")]
    _messages_in: IgnoredAny,
    messages_prepared: Vec<Message>,
    text: String,
    #[serde(rename = "ids_mini")]
    _ids_mini: IgnoredAny,
    #[serde(rename = "decoded_mini")]
    _decoded_mini: IgnoredAny,
    ids_qwen3: Vec<u32>,
    decoded_qwen3: String,
    #[serde(rename = "ids_qwen2.5")]
    ids_qwen2_5: Vec<u32>,
    #[serde(rename = "decoded_qwen2.5")]
    decoded_qwen2_5: String,
}

#[test]
fn edge_cases_encode_and_decode_as_by_the_reference() {
    const FILE: &str = "environments/prompts/template_edge_cases.jsonl";
    let rows: Vec<EdgeCase> = json_lines(FILE);
    for name in ["qwen3", "qwen2.5"] {
        let Some(folder) = folder(name) else { return };
        let (tokenizer, own) = (Tokenizer::from_dir(&folder).unwrap(), ChatTemplate::from_dir(&folder).unwrap());
        for row in &rows {
            let case = format!("{name} {} {} {:?}", row.thinking_mode, row.template, row.text);
            let (expected, decoded) = match name {
                "qwen3" => (&row.ids_qwen3, &row.decoded_qwen3),
                _ => (&row.ids_qwen2_5, &row.decoded_qwen2_5),
            };
            let encoded = tokenizer.encode(&row.text).unwrap();
            assert_eq!(encoded, ids(expected), "{case}");
            let decoded = if decoded == "=text" { &row.text } else { decoded };
            assert_eq!(tokenizer.decode(&encoded).unwrap(), *decoded, "{case}");
            if row.template == name {
                let text = own.render(&row.messages_prepared, options(&row.thinking_mode)).unwrap();
                assert_eq!(text, row.text, "{case}: the package's own template");
            }
        }
    }
    ran(FILE, rows.len(), 104);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DecodeCase {
    tokenizer: String,
    ids: Vec<u32>,
    text: String,
}

#[test]
fn ids_decode_as_by_the_reference() {
    const FILE: &str = "environments/prompts/decode_cases.json";
    let Some(folder) = folder("qwen3") else { return };
    let tokenizer = Tokenizer::from_dir(&folder).unwrap();
    let cases: Vec<DecodeCase> = json(FILE);
    let full: Vec<_> = cases.iter().filter(|case| case.tokenizer == "qwen3").collect();
    for case in &full {
        assert_eq!(tokenizer.decode(&ids(&case.ids)).unwrap(), case.text, "{:?}", case.ids);
    }
    ran(FILE, full.len(), 18);
}
