//! The decoder with its cache against the packed forward pass.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::sync::Arc;

use grail_model::generate::{DecodeError, Decoder};
use grail_model::{Device, LoadOptions, Model, PackedBatch, set_threads};
use grail_protocol::ids::TokenId;

const BOUND: f32 = 1e-4;

fn model(name: &str) -> Arc<Model> {
    set_threads(1);
    let folder = grail_golden::path(&format!("models/{name}"));
    Arc::new(Model::load(&folder, &LoadOptions::on(Device::Cpu)).unwrap())
}

fn tokens(seed: u32, count: u32) -> Vec<TokenId> {
    (0..count).map(|index| TokenId((seed * 131 + index * index * 7 + index) % 512)).collect()
}

/// Logits behind every token of the sequence.
fn packed(model: &Model, sequence: &[TokenId]) -> Vec<Vec<f32>> {
    let mut batch = PackedBatch::new();
    batch.push_sequence(sequence);
    let (_, logits) = model.inspect(&batch, &(0..sequence.len()).collect::<Vec<_>>()).unwrap();
    logits.chunks(model.config().vocab_size).map(<[f32]>::to_vec).collect()
}

fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len());
    let farthest = found.iter().zip(expected).map(|(left, right)| (left - right).abs()).fold(0.0, f32::max);
    assert!(farthest <= BOUND, "{what}: logits differ by {farthest}");
}

#[test]
fn steps_equal_the_packed_forward_pass() {
    for name in [
        "qwen2-tied",
        "qwen2-untied-yarn",
        "qwen3-tied",
        "qwen3-untied",
        "llama-tied-llama3rope",
        "llama-untied-linear",
    ] {
        let model = model(name);
        let mut decoder = Decoder::new(Arc::clone(&model), 4, 256).unwrap();
        let sequences: Vec<Vec<TokenId>> = (0..4).map(|seed| tokens(seed, 100)).collect();
        let expected: Vec<Vec<Vec<f32>>> = sequences.iter().map(|sequence| packed(&model, sequence)).collect();
        for (slot, (sequence, expected)) in sequences.iter().zip(&expected).enumerate() {
            let prompt = 5 + 9 * slot;
            let logits = decoder.prefill(slot, &sequence[..prompt]).unwrap();
            assert_close(&logits, &expected[prompt - 1], &format!("{name} prefill of slot {slot}"));
        }
        // All slots in order, some in another order, two far apart, one alone: each a different view of the cache.
        let orders: [&[usize]; 5] = [&[0, 1, 2, 3], &[2, 0, 3], &[0, 3], &[1], &[1, 2]];
        for round in 0..60 {
            let order = orders[round % orders.len()];
            let step: Vec<(usize, TokenId)> =
                order.iter().map(|slot| (*slot, sequences[*slot][decoder.len(*slot)])).collect();
            let rows = decoder.step(&step).unwrap();
            assert_eq!(rows.iter().len(), order.len());
            for (row, slot) in rows.iter().zip(order) {
                let at = decoder.len(*slot) - 1;
                assert_close(row, &expected[*slot][at], &format!("{name} slot {slot} position {at}"));
            }
        }
    }
}

#[test]
fn a_copied_prefix_continues_as_its_own_sequence() {
    let model = model("qwen3-untied");
    let mut decoder = Decoder::new(Arc::clone(&model), 3, 200).unwrap();
    let prompt = tokens(1, 70);
    decoder.prefill(2, &prompt).unwrap();
    decoder.copy_prefix(2, 0, 70).unwrap();
    decoder.copy_prefix(2, 1, 40).unwrap();
    assert_eq!((decoder.len(0), decoder.len(1), decoder.len(2)), (70, 40, 70));
    let tails = [tokens(2, 20), tokens(3, 20), tokens(4, 20)];
    let starts = [70, 40, 70];
    let expected: Vec<Vec<Vec<f32>>> = starts
        .iter()
        .zip(&tails)
        .map(|(start, tail)| packed(&model, &[&prompt[..*start], tail].concat())[*start..].to_vec())
        .collect();
    for at in 0..20 {
        let step: Vec<(usize, TokenId)> = tails.iter().enumerate().map(|(slot, tail)| (slot, tail[at])).collect();
        let rows = decoder.step(&step).unwrap();
        for (slot, row) in rows.iter().enumerate() {
            assert_close(row, &expected[slot][at], &format!("slot {slot} step {at}"));
        }
    }
}

#[test]
fn a_prompt_may_come_in_parts_and_a_slot_serves_again() {
    let model = model("llama-tied-llama3rope");
    let mut decoder = Decoder::new(Arc::clone(&model), 2, 150).unwrap();
    let long = tokens(9, 140);
    decoder.prefill(1, &long).unwrap();
    decoder.release(1);
    assert!(decoder.is_empty());
    let sequence = tokens(5, 90);
    let expected = packed(&model, &sequence);
    for (from, to) in [(0, 1), (1, 64), (64, 65), (65, 90)] {
        let logits = decoder.prefill(1, &sequence[from..to]).unwrap();
        assert_close(&logits, &expected[to - 1], &format!("part up to {to}"));
    }
    assert_eq!((decoder.len(0), decoder.len(1)), (0, 90));
    // A slot that holds nothing may begin with a step.
    let rows = decoder.step(&[(0, sequence[0])]).unwrap();
    assert_close(rows.row(0).unwrap(), &expected[0], "first token");
    assert!(rows.row(1).is_none());
}

#[test]
fn refused_calls_change_nothing() {
    let mut decoder = Decoder::new(model("qwen2-tied"), 2, 10).unwrap();
    decoder.prefill(0, &tokens(1, 9)).unwrap();
    assert!(matches!(decoder.prefill(2, &tokens(1, 1)), Err(DecodeError::NoSuchSlot { slot: 2, slots: 2 })));
    assert!(matches!(decoder.prefill(1, &[]), Err(DecodeError::Empty)));
    assert!(matches!(decoder.prefill(1, &tokens(1, 11)), Err(DecodeError::ContextFull { .. })));
    assert!(matches!(decoder.prefill(1, &[TokenId(512)]), Err(DecodeError::UnknownToken { .. })));
    assert!(matches!(decoder.step(&[(1, TokenId(1)), (1, TokenId(2))]), Err(DecodeError::SlotTwice { slot: 1 })));
    assert!(matches!(decoder.copy_prefix(0, 1, 10), Err(DecodeError::PrefixTooLong { held: 9, .. })));
    assert_eq!((decoder.len(0), decoder.len(1)), (9, 0));
    assert!(decoder.step(&[]).unwrap().into_flat().is_empty());
    decoder.step(&[(0, TokenId(1))]).unwrap();
    assert!(matches!(decoder.step(&[(0, TokenId(1))]), Err(DecodeError::ContextFull { slot: 0, held: 10, .. })));
}

#[test]
fn a_model_may_be_read_by_several_threads() {
    let model = model("qwen2-tied");
    let sequence = tokens(3, 50);
    let expected = packed(&model, &sequence);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut decoder = Decoder::new(Arc::clone(&model), 1, 64).unwrap();
                assert_close(&decoder.prefill(0, &sequence).unwrap(), expected.last().unwrap(), "other thread");
            });
        }
    });
}
