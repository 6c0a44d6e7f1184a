//! What others wrote never panics, and what is accepted is safe.

use std::path::{Component, Path};

use grail_checkpoint::layout::{Tree, parse_object_key};
use grail_checkpoint::ready::parse_marker;
use grail_checkpoint::{Metadata, Verdict};
use grail_protocol::ids::CheckpointWindow;
use proptest::prelude::*;

const WINDOW: CheckpointWindow = CheckpointWindow(3030);

fn document() -> Vec<u8> {
    let document = serde_json::json!({
        "window": 3030,
        "checkpoint_type": "DELTA",
        "prev_window": 3000,
        "file_manifest": {"delta_sparse.bin.zst": "0".repeat(64), "a/b": "1".repeat(64)},
        "weights_hash": "e".repeat(32),
        "env_id": "gsm8k",
        "env_params": {"split": "train"},
        "thinking_mode": "native",
        "generation_params":
            {"max_tokens": 64, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0},
    });
    serde_json::to_vec(&document).unwrap()
}

proptest! {
    #[test]
    fn damaged_metadata_is_judged_and_never_leaves_its_folder(
        edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..6),
        full in any::<bool>(),
    ) {
        let mut text = document();
        for (place, byte) in edits {
            let place = place.index(text.len());
            text[place] = byte;
        }
        let tree = if full { Tree::Full } else { Tree::Delta };
        let Ok(metadata) = Metadata::parse(&text, WINDOW, tree) else { return Ok(()) };
        prop_assert_eq!(metadata.window, WINDOW);
        let usable = metadata.verdict() == Verdict::Mine;
        prop_assert_eq!(usable, metadata.policy().is_ok() && metadata.files().is_ok());
        for (name, _) in metadata.files().into_iter().flat_map(|manifest| manifest.required()) {
            prop_assert!(Path::new(name).components().all(|part| matches!(part, Component::Normal(_))), "{}", name);
        }
        if let Ok(policy) = metadata.policy() {
            prop_assert!((1..=8192).contains(&policy.generation.max_new()));
            prop_assert!((0.01..=2.0).contains(&policy.generation.temperature));
            prop_assert!((0.0..=1.0).contains(&policy.generation.top_p));
            prop_assert!((1.0..=2.0).contains(&policy.generation.repetition_penalty));
        }
    }

    #[test]
    fn any_key_is_read(key in "(grail/checkpoints/)?checkpoint-[-0-9_+ x\u{661}]{0,9}/(READY-|FULL/|DELTA/)\\PC{0,12}") {
        if let Some(object) = parse_object_key(&key) {
            prop_assert_eq!(grail_checkpoint::layout::object_key(object.window, object.tree, &object.name), key.clone());
        }
        if let Some(choice) = parse_marker(&key) {
            let canonical = grail_checkpoint::layout::ready_key(choice.checkpoint, choice.ready);
            prop_assert_eq!(parse_marker(&canonical), Some(choice));
        }
    }
}
