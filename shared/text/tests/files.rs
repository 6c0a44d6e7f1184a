//! Checkpoint folders: what is read from which file, and the errors of broken ones.

use std::path::Path;

use grail_golden::path;
use grail_protocol::ids::TokenId;
use grail_text::{ChatTemplate, LoadError, Message, RenderOptions, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A copy of the models' tokenizer folder with other fields in `tokenizer_config.json`; a null removes.
fn folder(changes: Value) -> TempDir {
    let target = TempDir::new().expect("a folder can be made");
    let source = path("models/tokenizer");
    for file in ["tokenizer.json", "special_tokens_map.json", "chat_template.jinja"] {
        std::fs::copy(source.join(file), target.path().join(file)).expect("the file can be copied");
    }
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(source.join("tokenizer_config.json")).expect("readable")).expect("JSON");
    for (key, value) in changes.as_object().expect("changes are an object") {
        match value {
            Value::Null => config.as_object_mut().expect("an object").remove(key).map_or((), drop),
            value => config[key] = value.clone(),
        }
    }
    write(target.path(), "tokenizer_config.json", &config.to_string());
    target
}

fn write(folder: &Path, file: &str, text: &str) {
    std::fs::write(folder.join(file), text).expect("the file can be written");
}

fn tokenizer(changes: Value) -> Tokenizer {
    Tokenizer::from_dir(folder(changes).path()).expect("the tokenizer loads")
}

fn rendered(folder: &TempDir) -> Result<String, LoadError> {
    let template = ChatTemplate::from_dir(folder.path())?;
    Ok(template.render(&[Message::user("q")], RenderOptions::default()).expect("the template renders"))
}

#[test]
fn special_tokens_are_texts_or_objects() {
    let as_object = json!({"__type": "AddedToken", "content": "<|im_start|>", "lstrip": false});
    let changed = tokenizer(json!({"eos_token": as_object, "pad_token": null}));
    assert_eq!(changed.eos_token_id(), Some(TokenId(413)));
    assert_eq!(changed.pad_token_id(), Some(TokenId(413)), "without a pad token the end token pads");
}

#[test]
fn the_older_list_of_special_tokens_counts_only_without_added_tokens() {
    let newer = folder(json!({}));
    write(newer.path(), "special_tokens_map.json", r#"{"eos_token": "<|im_start|>"}"#);
    assert_eq!(Tokenizer::from_dir(newer.path()).unwrap().eos_token_id(), Some(TokenId(414)));

    let older = folder(json!({"added_tokens_decoder": null}));
    write(older.path(), "special_tokens_map.json", r#"{"eos_token": {"content": "<|im_start|>", "lstrip": false}}"#);
    assert_eq!(Tokenizer::from_dir(older.path()).unwrap().eos_token_id(), Some(TokenId(413)));
    std::fs::remove_file(older.path().join("special_tokens_map.json")).unwrap();
    assert_eq!(Tokenizer::from_dir(older.path()).unwrap().eos_token_id(), Some(TokenId(414)));
}

#[test]
fn tokens_that_only_the_configuration_knows_get_new_ids() {
    let added = tokenizer(json!({"mask_token": "<mask>", "additional_special_tokens": ["<x>", "<|im_end|>"]}));
    assert_eq!(added.vocab_size(), 417);
    assert_eq!(added.encode("a<mask><x>").unwrap()[1..], [TokenId(415), TokenId(416)]);
    let split = tokenizer(json!({"split_special_tokens": true}));
    assert!(split.encode("<|im_end|>").unwrap().len() > 1);
}

#[test]
fn class_defaults_and_the_llama_start_token() {
    let qwen = tokenizer(json!({"tokenizer_class": "Qwen2Tokenizer", "eos_token": null}));
    assert_eq!(qwen.eos_token_id(), Some(TokenId(412)), "absent: the class's default");
    let plain = tokenizer(json!({"eos_token": null, "pad_token": null}));
    assert_eq!((plain.eos_token_id(), plain.pad_token_id()), (None, None));

    let llama = json!({"tokenizer_class": "LlamaTokenizer", "bos_token": "<|im_start|>", "unk_token": "<|endoftext|>"});
    let ids = tokenizer(llama.clone()).encode("a").unwrap();
    assert_eq!((ids[0], ids.len()), (TokenId(413), 2));
    let mut both = llama.clone();
    both["add_bos_token"] = json!(false);
    both["add_eos_token"] = json!(true);
    let ids = tokenizer(both).encode("a").unwrap();
    assert_eq!((ids[1], ids.len()), (TokenId(414), 2));
    let mut prefixed = llama;
    prefixed["add_prefix_space"] = json!(true);
    assert!(
        matches!(Tokenizer::from_dir(folder(prefixed).path()), Err(LoadError::Field { key, .. }) if key == "add_prefix_space")
    );
}

#[test]
fn clean_up_follows_the_configuration() {
    for (setting, expected) in [(json!(true), "a, b"), (json!(false), "a , b"), (Value::Null, "a , b")] {
        let tokenizer = tokenizer(json!({"clean_up_tokenization_spaces": setting}));
        let ids = tokenizer.encode("a , b").unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), expected);
    }
}

#[test]
fn truncation_padding_and_prefix_space_of_the_file_do_not_count() {
    let folder = folder(json!({}));
    let file = folder.path().join("tokenizer.json");
    let mut content: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    content["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    content["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 412, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    content["pre_tokenizer"] =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    write(folder.path(), "tokenizer.json", &content.to_string());
    let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
    let ids = tokenizer.encode("a1b2c").unwrap();
    assert_eq!((ids.len(), tokenizer.decode(&ids).unwrap()), (5, "a1b2c".to_owned()));
}

#[test]
fn the_template_file_wins_then_the_configuration() {
    let both = folder(json!({"chat_template": "config"}));
    assert!(rendered(&both).unwrap().starts_with("<|im_start|>"));
    std::fs::remove_file(both.path().join("chat_template.jinja")).unwrap();
    assert_eq!(rendered(&both).unwrap(), "config");

    let only = |template: Value| {
        let folder = folder(json!({"chat_template": template}));
        std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
        folder
    };
    let named = json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ eos_token }}"}]);
    assert_eq!(rendered(&only(named)).unwrap(), "<|im_end|>");
    assert_eq!(rendered(&only(json!({"default": "d"}))).unwrap(), "d");
    let missing = rendered(&only(json!([{"name": "rag", "template": "t"}])));
    assert!(matches!(missing, Err(LoadError::NoDefaultTemplate { names, .. }) if names == ["rag"]));
    assert!(matches!(rendered(&only(json!(7))), Err(LoadError::Field { key, .. }) if key == "chat_template"));
    assert!(matches!(rendered(&only(Value::Null)), Err(LoadError::NoTemplate { .. })));

    let hidden = only(json!("config"));
    std::fs::create_dir(hidden.path().join("additional_chat_templates")).unwrap();
    assert_eq!(rendered(&hidden).unwrap(), "config");
    write(hidden.path(), "additional_chat_templates/rag.jinja", "r");
    assert!(matches!(rendered(&hidden), Err(LoadError::NoDefaultTemplate { .. })));
    write(hidden.path(), "additional_chat_templates/default.jinja", "d");
    assert_eq!(rendered(&hidden).unwrap(), "d");
}

#[test]
fn errors_name_file_value_and_remedy() {
    let message = |folder: &TempDir| {
        let error =
            Tokenizer::from_dir(folder.path()).map(drop).and_then(|()| ChatTemplate::from_dir(folder.path()).map(drop));
        error.unwrap_err().to_string().replace(&folder.path().display().to_string(), "DIR")
    };
    let broken = |file: &str, text: &str| {
        let folder = folder(json!({}));
        write(folder.path(), file, text);
        message(&folder)
    };
    let empty = TempDir::new().unwrap();
    let cases = [
        (message(&empty), ["DIR/tokenizer_config.json", "No such file", "must hold the tokenizer files"]),
        (
            broken("tokenizer_config.json", "{\"a\": "),
            ["DIR/tokenizer_config.json", "EOF", "fetch the checkpoint again"],
        ),
        (
            broken("tokenizer_config.json", "[]"),
            ["DIR/tokenizer_config.json", "expected a map", "fetch the checkpoint again"],
        ),
        (
            broken("tokenizer.json", "{}"),
            ["DIR/tokenizer.json", "describes no tokenizer", "fetch the checkpoint again"],
        ),
        (broken("tokenizer.json", "\u{0}"), ["DIR/tokenizer.json", "expected value", "fetch the checkpoint again"]),
        (
            broken("chat_template.jinja", "{% if %}"),
            ["DIR/chat_template.jinja", "syntax error", "fetch the checkpoint again"],
        ),
        (
            message(&folder(json!({"eos_token": 7}))),
            ["DIR/tokenizer_config.json", "`eos_token` is 7", "correct the file"],
        ),
        (
            message(&folder(json!({"clean_up_tokenization_spaces": "yes"}))),
            ["`clean_up_tokenization_spaces`", "\"yes\"", "true or false"],
        ),
        (
            message(&folder(json!({"tokenizer_class": "BertTokenizer"}))),
            ["DIR/tokenizer_config.json", "\"BertTokenizer\"", "Qwen2Tokenizer"],
        ),
        (
            message(&folder(json!({"added_tokens_decoder": {"x": {"content": "a"}}}))),
            ["`added_tokens_decoder`", "\"x\"", "token ids"],
        ),
        (
            message(&folder(json!({"additional_special_tokens": [null]}))),
            ["`additional_special_tokens`", "null", "a text"],
        ),
    ];
    for (message, parts) in cases {
        for part in parts {
            assert!(message.contains(part), "{part:?} is not in {message:?}");
        }
    }
}

/// Any JSON, rich in the words of tokenizer files.
fn any_json() -> impl Strategy<Value = Value> {
    let word = prop_oneof![
        Just("content"),
        Just("type"),
        Just("ByteLevel"),
        Just("BPE"),
        Just("model"),
        Just("vocab"),
        Just("merges"),
        Just("special"),
        Just("default"),
        Just("name"),
        Just("template"),
        Just("{{ x }}"),
        Just("Sequence"),
        Just("a b"),
        Just("Regex"),
        Just("("),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        word.clone().prop_map(Value::from)
    ];
    leaf.prop_recursive(4, 24, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((word.clone(), inner), 0..5)
                .prop_map(|pairs| pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
        ]
    })
}

proptest! {
    #[test]
    fn any_configuration_loads_or_errs(key in 0..12_usize, value in any_json()) {
        const KEYS: [&str; 12] = ["eos_token", "bos_token", "additional_special_tokens", "added_tokens_decoder", "chat_template", "tokenizer_class",
            "clean_up_tokenization_spaces", "add_prefix_space", "split_special_tokens", "add_bos_token", "model_max_length", "unk_token"];
        let folder = folder(json!({KEYS[key]: value}));
        if let Ok(tokenizer) = Tokenizer::from_dir(folder.path()) {
            tokenizer.encode("<|im_start|>a").unwrap();
        }
        std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
        if let Ok(template) = ChatTemplate::from_dir(folder.path()) {
            prop_assert!(template.render(&[Message::user("a")], RenderOptions::default()).is_ok_and(|text| text.len() < 99));
        }
    }

    #[test]
    fn any_tokenizer_file_loads_or_errs(part in 0..8_usize, value in any_json()) {
        const PARTS: [&str; 8] = ["version", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "truncation"];
        let folder = folder(json!({}));
        let file = folder.path().join("tokenizer.json");
        let mut content: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        content[PARTS[part]] = value.clone();
        for text in [content.to_string(), value.to_string()] {
            write(folder.path(), "tokenizer.json", &text);
            match Tokenizer::from_dir(folder.path()) {
                Ok(tokenizer) => { let _ids: Result<_, _> = tokenizer.encode("ab"); }
                Err(error) => prop_assert!(error.to_string().contains("tokenizer.json"), "{error}"),
            }
        }
    }
}
