//! What one group costs outside the model: its prompt, and the verdicts on its 16 completions.
//!
//! Budget: 2 ms for each on one core.

use std::path::Path;

use grail_environments::gsm8k::{Gsm8k, evaluate};
use grail_environments::{Environment, Payload, Split, ThinkingMode, prompt_ids};
use grail_protocol::ids::EnvironmentSeed;
use grail_text::{ChatTemplate, Tokenizer};

fn main() {
    divan::main();
}

/// The small tokenizer with the stock Qwen3 template.
fn text() -> (Tokenizer, ChatTemplate) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors/environments/tokenizer");
    let tokenizer = Tokenizer::from_dir(&folder).expect("the tokenizer loads");
    (tokenizer, ChatTemplate::from_dir(&folder).expect("the template parses"))
}

/// Seed to prompt ids, another task each time so that no cache helps more than in use.
#[divan::bench]
fn prompt_of_a_group(bencher: divan::Bencher) {
    let (tokenizer, template) = text();
    let environment = Gsm8k::embedded(Split::Train).expect("the embedded data is whole");
    let mut seed = 0_u64;
    bencher.bench_local(|| {
        seed = seed.wrapping_add(0x9e37_79b9);
        let task = environment.task(EnvironmentSeed(seed)).expect("every seed has a task");
        prompt_ids(&task, ThinkingMode::Native, &tokenizer, &template).expect("the prompt encodes")
    });
}

/// 16 completions of about 4,000 code points.
#[divan::bench]
fn verdicts_of_a_group(bencher: divan::Bencher) {
    let environment = Gsm8k::embedded(Split::Train).expect("the embedded data is whole");
    let task = environment.task(EnvironmentSeed(0)).expect("every seed has a task");
    let Payload::Gsm8k { answer } = task.payload else { unreachable!("it is a task of gsm8k") };
    let completion = format!("{}</think>\n<SOLUTION>72</SOLUTION><|im_end|>", "48 / 2 = 24 < 25, so ".repeat(190));
    bencher.bench_local(|| {
        (0..16).map(|_| evaluate(&answer, divan::black_box(&completion), ThinkingMode::Native).reward).sum::<f64>()
    });
}
