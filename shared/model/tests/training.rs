//! Gradients, an optimizer's steps, and weights that go out and come back.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use grail_model::train::{DECAY_GROUP, TrainableModel, TrainingGroup};
use grail_model::{Device, Dtype, LoadOptions, Model, ModelConfig, PackedBatch, set_threads};
use grail_protocol::ids::TokenId;
use tch::nn::OptimizerConfig;
use tch::{Kind, Tensor};

fn ids(range: std::ops::Range<u32>) -> Vec<TokenId> {
    range.map(TokenId).collect()
}

fn config(name: &str) -> ModelConfig {
    set_threads(1);
    ModelConfig::from_dir(&grail_golden::path(&format!("models/{name}"))).unwrap()
}

fn loss(model: &TrainableModel, groups: &[TrainingGroup<'_>]) -> Tensor {
    let output = model.completion_logits(groups).unwrap();
    output.logits.cross_entropy_for_logits(&output.targets)
}

#[test]
fn an_optimizer_learns_and_every_variable_takes_part() {
    for name in ["qwen2-tied", "qwen3-untied", "llama-untied-linear"] {
        let model = TrainableModel::random(config(name), Device::Cpu, 7).unwrap();
        let (prompt, first, second) = (ids(1..9), ids(20..40), ids(100..130));
        let groups = [TrainingGroup { prompt: &prompt, completions: vec![&first, &second] }];
        let mut optimizer = tch::nn::AdamW::default().build(model.var_store(), 3e-3).unwrap();
        optimizer.set_weight_decay_group(DECAY_GROUP, 0.01);
        let before = loss(&model, &groups);
        before.backward();
        for (variable, tensor) in model.var_store().variables() {
            assert!(
                tensor.grad().abs().sum(Kind::Double).double_value(&[]) > 0.0,
                "{name}: {variable} has no gradient"
            );
        }
        for _ in 0..30 {
            optimizer.backward_step(&loss(&model, &groups));
        }
        let after = loss(&model, &groups);
        assert!(after.double_value(&[]) < before.double_value(&[]) / 2.0, "{name}: {before:?} to {after:?}");
    }
}

#[test]
fn seeds_decide_fresh_weights() {
    let fresh = |seed| {
        let model = TrainableModel::random(config("qwen2-tied"), Device::Cpu, seed).unwrap();
        let prompt = ids(1..9);
        loss(&model, &[TrainingGroup { prompt: &prompt, completions: vec![&prompt] }]).double_value(&[])
    };
    assert_eq!(fresh(1).to_bits(), fresh(1).to_bits());
    assert_ne!(fresh(1).to_bits(), fresh(2).to_bits());
}

#[test]
fn completion_logits_are_those_of_the_packed_forward_pass() {
    let folder = grail_golden::path("models/qwen3-tied");
    let trainable = TrainableModel::from_dir(&folder, Device::Cpu).unwrap();
    let model = Model::load(&folder, &LoadOptions::on(Device::Cpu)).unwrap();
    let (prompt, first, second, third) = (ids(5..20), ids(30..50), ids(60..61), ids(90..140));
    let groups = [
        TrainingGroup { prompt: &prompt, completions: vec![&first, &second] },
        TrainingGroup { prompt: &second, completions: vec![&third] },
    ];
    let output = trainable.completion_logits(&groups).unwrap();
    assert_eq!(output.offsets, [0, 20, 21, 71]);
    assert_eq!(output.logits.size(), [71, 512]);
    let logits = Vec::<f32>::try_from(output.logits.detach().flatten(0, 1)).unwrap();
    let targets = Vec::<i64>::try_from(output.targets).unwrap();
    for (place, (prompt, completion)) in
        [(&prompt, &first), (&prompt, &second), (&second, &third)].into_iter().enumerate()
    {
        let mut batch = PackedBatch::new();
        batch.push_sequence(&[prompt.as_slice(), completion].concat());
        let rows: Vec<usize> = (prompt.len() - 1..prompt.len() + completion.len() - 1).collect();
        let (_, expected) = model.inspect(&batch, &rows).unwrap();
        let own = output.offsets[place]..output.offsets[place + 1];
        let farthest = (logits[own.start * 512..own.end * 512].iter().zip(&expected))
            .map(|(left, right)| (left - right).abs())
            .fold(0.0, f32::max);
        assert!(farthest <= 1e-4, "completion {place}: {farthest}");
        assert!(targets[own].iter().zip(completion).all(|(target, token)| *target == i64::from(token.0)));
    }
}

#[test]
fn saved_weights_come_back() {
    for name in ["qwen2-untied-yarn", "qwen3-tied", "llama-tied-llama3rope"] {
        let golden = grail_golden::path(&format!("models/{name}"));
        let folder = tempfile::tempdir().unwrap();
        let trainable = TrainableModel::from_dir(&golden, Device::Cpu).unwrap();
        std::fs::copy(golden.join("config.json"), folder.path().join("config.json")).unwrap();
        // The golden weights are bf16, so nothing is lost in either precision.
        trainable.save_safetensors(folder.path(), Dtype::Bf16).unwrap();
        let (original, saved) = (
            Model::load(&golden, &LoadOptions::on(Device::Cpu)).unwrap(),
            Model::load(folder.path(), &LoadOptions::on(Device::Cpu)).unwrap(),
        );
        assert_eq!(original.weights_hash(), saved.weights_hash());
        trainable.save_safetensors(folder.path(), Dtype::F32).unwrap();
        let wide = Model::load(folder.path(), &LoadOptions::on(Device::Cpu)).unwrap();
        assert_ne!(original.weights_hash(), wide.weights_hash());
        let mut batch = PackedBatch::new();
        batch.push_sequence(&ids(0..30));
        assert_eq!(original.inspect(&batch, &[29]).unwrap(), wide.inspect(&batch, &[29]).unwrap());
    }
}

#[test]
fn empty_parts_are_refused() {
    let model = TrainableModel::random(config("qwen2-tied"), Device::Cpu, 1).unwrap();
    let some = ids(0..3);
    for (prompt, completion) in [(&[][..], some.as_slice()), (&some, &[])] {
        assert!(model.completion_logits(&[TrainingGroup { prompt, completions: vec![completion] }]).is_err());
    }
}
