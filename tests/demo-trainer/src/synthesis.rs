//! Synthetic completions: phrases around the calculation steps of a task's own solution, with an answer that is right or
//! plausibly wrong by chance.

use crate::phrases::{CHECKS, CLOSERS, CONNECTORS, OPENERS, PLANS};
use crate::rng::Rng;

/// Most calculations of one completion; of longer solutions the last ones are kept.
const MOST_STEPS: usize = 3;
/// Longest calculation in characters; longer ones are left out.
const LONGEST_STEP: usize = 22;
/// Among wrong answers of a task with several calculations, how many come from forgetting the last one.
const STOPPED_EARLY_SHARE: f64 = 0.35;

/// One calculation of a solution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Left-hand side, such as `48/2`.
    pub expression: String,
    /// Right-hand side, such as `24`.
    pub result: String,
}

/// What the solution of a task says, as far as completions are made from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Worked {
    /// Calculations before the last one.
    pub steps: Vec<Step>,
    /// The calculation whose result is the answer, if the solution has it.
    pub last: Option<Step>,
    /// The answer without thousands separators.
    pub answer: String,
}

/// A solution without an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a solution has no line `#### ANSWER` with a whole number")]
pub struct NoAnswer;

impl Worked {
    /// From the text of a GSM8K solution: calculations are annotated as `<<48/2=24>>`, the last line is `#### 72`.
    ///
    /// # Errors
    /// [`NoAnswer`].
    pub fn from_solution(solution: &str) -> Result<Self, NoAnswer> {
        let (body, answer) = solution.rsplit_once("####").ok_or(NoAnswer)?;
        let answer = answer.trim().replace(',', "");
        let gold: i64 = answer.parse().map_err(|_| NoAnswer)?;
        let mut steps: Vec<Step> = body.split("<<").skip(1).filter_map(step).collect();
        #[expect(clippy::cast_precision_loss, reason = "answers are far below 2^53")]
        let is_gold = |step: &Step| step.result.parse::<f64>().is_ok_and(|result| result == gold as f64);
        let last = steps.pop_if(|step| is_gold(step)).map(|step| Step { result: answer.clone(), ..step });
        let room = MOST_STEPS - usize::from(last.is_some());
        steps.drain(..steps.len().saturating_sub(room));
        Ok(Self { steps, last, answer })
    }
}

/// The calculation in front of `>>`, if it is one and short.
fn step(text: &str) -> Option<Step> {
    let (annotation, _) = text.split_once(">>")?;
    let (expression, result) = annotation.rsplit_once('=')?;
    let (expression, result) = (expression.trim(), result.trim());
    let plain = annotation.bytes().all(|byte| byte.is_ascii_digit() || b"+-*/.=() ".contains(&byte));
    let operates = expression.bytes().skip(1).any(|byte| b"+-*/".contains(&byte));
    let fits = annotation.len() <= LONGEST_STEP && result.parse::<f64>().is_ok();
    (plain && operates && fits).then(|| Step { expression: expression.to_owned(), result: result.to_owned() })
}

/// One synthetic completion, without the end token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    pub text: String,
    /// What stands between the answer tags.
    pub answer: String,
    pub is_right: bool,
}

/// A random completion of a task that is right with probability `right_share`.
#[must_use]
pub fn completion(worked: &Worked, right_share: f64, rng: &mut Rng) -> Completion {
    let is_right = rng.chance(right_share);
    let mut steps: Vec<(&str, String)> =
        worked.steps.iter().map(|step| (step.expression.as_str(), step.result.clone())).collect();
    let answer = match (&worked.last, is_right) {
        (_, true) => worked.answer.clone(),
        (Some(_), false) if forgets_last(worked, rng) => {
            worked.steps.last().map_or_else(|| near_miss(&worked.answer, rng), |step| step.result.clone())
        }
        (_, false) => near_miss(&worked.answer, rng),
    };
    let stopped_early = steps.last().is_some_and(|(_, result)| !is_right && *result == answer);
    if let Some(last) = worked.last.as_ref().filter(|_| !stopped_early) {
        steps.push((&last.expression, answer.clone()));
    }
    Completion { text: assemble(&steps, &answer, rng), answer, is_right }
}

/// Whether a wrong completion stops before the last calculation; only where that gives another answer.
fn forgets_last(worked: &Worked, rng: &mut Rng) -> bool {
    let gives_another = worked.steps.last().is_some_and(|step| {
        step.result != worked.answer && step.result.parse::<f64>().ok() != worked.answer.parse::<f64>().ok()
    });
    gives_another && rng.chance(STOPPED_EARLY_SHARE)
}

/// A wrong answer close to the right one: off by a little, doubled or halved.
fn near_miss(answer: &str, rng: &mut Rng) -> String {
    let right: i64 = answer.parse().unwrap_or_default();
    let mut candidates: Vec<i64> = [1, -1, 2, -2, 10, -10].into_iter().filter_map(|by| right.checked_add(by)).collect();
    candidates.extend(right.checked_mul(2));
    candidates.extend((right % 2 == 0).then_some(right / 2));
    candidates.retain(|wrong| *wrong != right && (*wrong >= 0 || right < 0));
    rng.pick(&candidates).copied().unwrap_or(right.wrapping_add(1)).to_string()
}

fn assemble(steps: &[(&str, String)], answer: &str, rng: &mut Rng) -> String {
    let mut phrase = |alternatives: &'static [&'static str]| rng.pick(alternatives).copied().unwrap_or_default();
    let mut text = format!("<start_working_out>\n{} {}\n", phrase(&OPENERS), phrase(&PLANS));
    for (expression, result) in steps {
        text.push_str(phrase(&CONNECTORS));
        text.push_str(&format!("{expression}={result}.\n"));
    }
    let closer = phrase(&CLOSERS).replace("{}", answer);
    text.push_str(&format!("{} {closer}\n</end_working_out>\n<SOLUTION>{answer}</SOLUTION>", phrase(&CHECKS)));
    text
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::path::Path;

    use grail_environments::{Payload, ThinkingMode, gsm8k};
    use grail_protocol::constants::CHALLENGE_K;
    use grail_text::Tokenizer;

    use super::*;
    use crate::sampling::GENERATION;
    use crate::tasks;

    const SOLUTION: &str = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips \
                            altogether in April and May.\n#### 72";

    fn worked() -> Worked {
        Worked::from_solution(SOLUTION).unwrap()
    }

    #[test]
    fn steps_and_answer_come_from_the_solution() {
        let step = |expression: &str, result: &str| Step { expression: expression.into(), result: result.into() };
        assert_eq!(
            worked(),
            Worked { steps: vec![step("48/2", "24")], last: Some(step("48+24", "72")), answer: "72".into() }
        );
    }

    #[test]
    fn odd_solutions_are_understood() {
        let odd = Worked::from_solution("<<15=15>> <<1/4=0.25>> <<600*2=1200.00>>\n#### 1,200").unwrap();
        assert_eq!((odd.answer.as_str(), odd.steps.len()), ("1200", 1));
        assert_eq!(odd.last.unwrap().result, "1200", "the answer's own spelling");
        let other = Worked::from_solution("<<1+1=2>><<2+2=4>><<4+4=8>><<8+8=16>>\n#### 10").unwrap();
        assert_eq!((other.last, other.steps.len()), (None, 3));
        assert_eq!(Worked::from_solution("no answer"), Err(NoAnswer));
        assert_eq!(Worked::from_solution("#### many"), Err(NoAnswer));
    }

    #[test]
    fn right_and_wrong_answers_come_in_the_asked_shares() {
        let mut rng = Rng::new(1, 1);
        let made: Vec<Completion> = (0..2_000).map(|_| completion(&worked(), 0.55, &mut rng)).collect();
        let right = made.iter().filter(|completion| completion.is_right).count();
        // Six standard deviations are 133.
        assert!(right.abs_diff(1_100) < 133, "{right}");
        assert!(made.iter().all(|completion| (completion.answer == "72") == completion.is_right));
        let early = made.iter().filter(|completion| completion.answer == "24").count();
        assert!(early.abs_diff(315) < 100, "{early}");
        let wrong: HashSet<&str> = made.iter().filter(|made| !made.is_right).map(|made| made.answer.as_str()).collect();
        assert_eq!(wrong, HashSet::from(["24", "71", "73", "70", "74", "62", "82", "144", "36"]));
    }

    #[test]
    fn the_last_calculation_leads_to_the_answer() {
        let mut rng = Rng::new(2, 1);
        for _ in 0..200 {
            let Completion { text, answer, .. } = completion(&worked(), 0.5, &mut rng);
            let last = text.lines().rfind(|line| line.contains('=')).unwrap();
            assert!(last.ends_with(&format!("={answer}.")), "{text}");
        }
    }

    #[test]
    fn completions_of_a_group_are_distinct() {
        let mut rng = Rng::new(3, 1);
        let texts: HashSet<String> = (0..2_000).map(|_| completion(&worked(), 0.5, &mut rng).text).collect();
        // 8^6 wordings: about eight of two million pairs agree.
        assert!(texts.len() > 1_950, "{}", texts.len());
    }

    /// Every task's completions are long enough for a proof, short enough for the demo, and read as the environment reads
    /// them.
    #[test]
    fn completions_of_every_task_are_well_formed() {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/demo/first");
        let tokenizer = Tokenizer::from_dir(&shipped).unwrap();
        let mut rng = Rng::new(5, 1);
        for source in tasks::split_sources().unwrap() {
            let Completion { text, answer, is_right } = completion(&source.worked, 0.5, &mut rng);
            let tokens = tokenizer.encode(&text).unwrap().len() + 1;
            assert!((CHALLENGE_K..=GENERATION.max_tokens).contains(&tokens), "{tokens} tokens: {text}");
            let Payload::Gsm8k { answer: solution } = &source.task.payload else {
                panic!("{} is no task of gsm8k", source.task.id)
            };
            let verdict = gsm8k::evaluate(solution, &text, ThinkingMode::Instructed);
            // A forgotten calculation may leave `.15`, of which the environment reads 15.
            let reads_whole = answer.parse::<i64>().is_ok();
            assert_eq!(verdict.predicted_answer == answer, reads_whole || !answer.starts_with('.'), "{text}");
            let can_be_right = !gsm8k::gold_answer(solution).contains(',');
            assert_eq!(verdict.success, is_right && can_be_right, "{}: {text}", source.task.id);
        }
    }

    #[test]
    fn near_misses_are_never_right_nor_of_another_sign() {
        let mut rng = Rng::new(4, 1);
        for answer in ["0", "1", "2", "7", "-7", "1000", "9223372036854775807"] {
            for _ in 0..100 {
                let wrong: i64 = near_miss(answer, &mut rng).parse().unwrap();
                assert!(wrong != answer.parse::<i64>().unwrap() && (wrong >= 0 || answer.starts_with('-')));
            }
        }
    }
}
