//! The tokenizer and the templates against the reference's own output.

use std::collections::BTreeMap;

use grail_golden::{json, json_lines, path, ran};
use grail_protocol::ids::TokenId;
use grail_text::{ChatTemplate, Message, RenderOptions, Tokenizer, render_prompt_ids};
use serde::Deserialize;
use serde::de::IgnoredAny;

const TOKENIZER: &str = "environments/tokenizer";

fn mini() -> Tokenizer {
    Tokenizer::from_dir(&path(TOKENIZER)).expect("the tokenizer loads")
}

fn ids(numbers: &[u32]) -> Vec<TokenId> {
    numbers.iter().copied().map(TokenId).collect()
}

/// The four templates by name, with the special tokens of the small tokenizer.
fn templates() -> BTreeMap<String, ChatTemplate> {
    let special = mini().special_tokens().clone();
    json::<BTreeMap<String, String>>("environments/prompts/chat_templates.json")
        .into_iter()
        .map(|(name, source)| (name, ChatTemplate::new(&source, &special).expect("the template parses")))
        .collect()
}

/// `enable_thinking` of the mode: the reference passes it in native mode only.
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
    ids_mini: Vec<u32>,
    /// Ids of the full Qwen3 tokenizer, whose file is too large to ship; on some rows only.
    #[serde(default, rename = "ids_qwen3")]
    _ids_qwen3: Option<IgnoredAny>,
}

#[test]
fn prompts_render_and_encode_as_the_reference() {
    const FILE: &str = "environments/prompts/rendered_prompts.jsonl";
    let (tokenizer, templates) = (mini(), templates());
    let rows: Vec<RenderedPrompt> = json_lines(FILE);
    for row in &rows {
        let case = format!("{} seed {} {} {}", row.env_id, row.seed, row.thinking_mode, row.template);
        let template = &templates[&row.template];
        let options = options(&row.thinking_mode);
        assert_eq!(template.render(&row.messages, options).unwrap(), row.text, "{case}");
        let prompt = render_prompt_ids(&tokenizer, template, &row.messages, options).unwrap();
        assert_eq!(prompt, ids(&row.ids_mini), "{case}");
    }
    ran(FILE, rows.len(), 264);
    ran("environments/prompts/chat_templates.json", templates.len(), 4);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EdgeCase {
    thinking_mode: String,
    template: String,
    /// What the environment asked; adding the system prompt is the environments' work and tested there.
    messages_in: Vec<Message>,
    messages_prepared: Vec<Message>,
    text: String,
    ids_mini: Vec<u32>,
    decoded_mini: String,
    /// The full Qwen tokenizers are too large to ship: their columns are of no use here.
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
fn edge_cases_render_encode_and_decode_as_the_reference() {
    const FILE: &str = "environments/prompts/template_edge_cases.jsonl";
    let (tokenizer, templates) = (mini(), templates());
    let rows: Vec<EdgeCase> = json_lines(FILE);
    for row in &rows {
        let case = format!("{:?} {} {}", row.messages_in, row.thinking_mode, row.template);
        let text = templates[&row.template].render(&row.messages_prepared, options(&row.thinking_mode)).unwrap();
        assert_eq!(text, row.text, "{case}");
        let encoded = tokenizer.encode(&text).unwrap();
        assert_eq!(encoded, ids(&row.ids_mini), "{case}");
        let expected = if row.decoded_mini == "=text" { &row.text } else { &row.decoded_mini };
        assert_eq!(tokenizer.decode(&encoded).unwrap(), *expected, "{case}");
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
fn ids_decode_as_the_reference() {
    const FILE: &str = "environments/prompts/decode_cases.json";
    let tokenizer = mini();
    let cases: Vec<DecodeCase> = json(FILE);
    // The other rows are of the full Qwen3 tokenizer, whose file is too large to ship.
    let (ours, full): (Vec<_>, Vec<_>) = cases.into_iter().partition(|case| case.tokenizer == "mini");
    assert!(full.iter().all(|case| case.tokenizer == "qwen3"));
    for case in &ours {
        assert_eq!(tokenizer.decode(&ids(&case.ids)).unwrap(), case.text, "{:?}", case.ids);
    }
    ran(FILE, ours.len(), 21);
}

#[test]
fn shipped_tokenizers_name_their_special_tokens() {
    let tokenizer = mini();
    assert_eq!(tokenizer.eos_token_id(), tokenizer.token_id("<|im_end|>"));
    assert_eq!(tokenizer.pad_token_id(), Some(TokenId(6256)));
    assert_eq!(tokenizer.token_id("<|im_end|>"), Some(TokenId(6258)));
    assert_eq!(tokenizer.vocab_size(), 6256 + 26);
    assert_eq!(tokenizer.special_tokens().content("bos_token"), None);
    assert_eq!(tokenizer.special_tokens().additional().count(), 13);

    let mut checkpoints = 0;
    for entry in std::fs::read_dir(path("models")).unwrap() {
        let folder = entry.unwrap().path();
        if !folder.is_dir() {
            continue;
        }
        let tokenizer = Tokenizer::from_dir(&folder).unwrap();
        let counts = (tokenizer.eos_token_id(), tokenizer.pad_token_id(), tokenizer.vocab_size());
        assert_eq!(counts, (Some(TokenId(414)), Some(TokenId(412)), 415), "{}", folder.display());
        let template = ChatTemplate::from_dir(&folder).unwrap();
        let text = template.render(&[Message::user("hi")], RenderOptions::default()).unwrap();
        assert_eq!(text, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
        let prompt = tokenizer.encode(&text).unwrap();
        assert_eq!((prompt[0], tokenizer.decode(&prompt).unwrap()), (TokenId(413), text));
        checkpoints += 1;
    }
    assert_eq!(checkpoints, 7);
    // The template of a checkpoint without a template file is that of its configuration.
    let stock = ChatTemplate::from_dir(&path(TOKENIZER)).unwrap();
    let text = stock.render(&[Message::user("hi")], RenderOptions { enable_thinking: Some(false) }).unwrap();
    assert!(text.ends_with("<|im_start|>assistant\n<think>\n\n</think>\n\n"), "{text}");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        ran(&format!("{TOKENIZER}/{file}"), 1, 1);
        ran(&format!("models/tokenizer/{file}"), checkpoints, 7);
    }
    for file in ["special_tokens_map.json", "chat_template.jinja"] {
        ran(&format!("models/tokenizer/{file}"), checkpoints, 7);
    }
}
