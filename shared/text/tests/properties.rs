//! Properties of the byte-level tokenizer.

use std::sync::LazyLock;

use grail_golden::path;
use grail_protocol::ids::TokenId;
use grail_text::Tokenizer;
use proptest::prelude::*;

static MODEL: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::from_dir(&path("models/tokenizer")).expect("the tokenizer loads"));
static MINI: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::from_dir(&path("environments/tokenizer")).expect("the tokenizer loads"));

/// Texts that NFC leaves as they are, with special strings in between.
fn text() -> impl Strategy<Value = String> {
    prop::collection::vec(
        prop_oneof!["[ -~\n\t]{0,12}", "[à-ÿ一-龥\u{1F600}-\u{1F64F}]{0,4}", Just("<|im_end|>".to_owned())],
        0..8,
    )
    .prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn encoding_then_decoding_gives_the_text(text in text()) {
        for tokenizer in [&*MODEL, &*MINI] {
            let ids = tokenizer.encode(&text).unwrap();
            prop_assert_eq!(&tokenizer.decode(&ids).unwrap(), &text);
            let ends = ids.iter().filter(|id| Some(**id) == tokenizer.eos_token_id()).count();
            prop_assert_eq!(ends, text.matches("<|im_end|>").count());
        }
    }

    #[test]
    fn any_text_encodes_within_the_vocabulary(text in any::<String>()) {
        let ids = MINI.encode(&text).unwrap();
        prop_assert!(ids.iter().all(|id| (id.0 as usize) < MINI.vocab_size()));
        prop_assert!(ids.len() <= text.len() * 3);
    }

    #[test]
    fn any_ids_decode(ids in prop::collection::vec(any::<u32>().prop_map(|id| TokenId(id % 7000)), 0..40)) {
        let text = MINI.decode(&ids).unwrap();
        let (left, right) = ids.split_at(ids.len() / 2);
        prop_assert!(text.len() <= MINI.decode(left).unwrap().len() + MINI.decode(right).unwrap().len());
    }
}
