//! `env show`.

use std::fmt::Write;

use grail_environments::{Payload, Task};
use serde_json::{Value, json};

use super::{EnvSite, Pick, RowsChoice, SCHEMA, document, task};
use crate::commands::CommandError;
use crate::commands::control::Form;

/// A task with what its answers are judged by.
///
/// # Errors
/// [`CommandError`] if there are no rows or no such task.
pub async fn show(site: &EnvSite, choice: &RowsChoice, pick: &Pick, form: Form) -> Result<String, CommandError> {
    let environment = choice.open(site).await?;
    let task = task(&*environment, pick)?;
    let origin = choice.origin();
    let (id, split, tasks) = (environment.id(), environment.split(), environment.task_count());
    match form {
        Form::Text => Ok(format!("{id} {split}: task {} of {tasks}{}\n\n{}", task.id, origin.remark(), render(&task))),
        Form::Json => document(&json!({
            "schema": SCHEMA,
            "environment": id,
            "split": split,
            "rows": origin,
            "tasks": tasks,
            "task": task.id,
            "row": task.row,
            "question": task.question,
            "payload": payload(&task.payload),
        })),
    }
}

fn render(task: &Task) -> String {
    let mut text = format!("{}\n", task.question.trim_end());
    let mut part = |title: &str, content: &str| {
        // Writing into a string cannot fail.
        writeln!(text, "\n-- {title}\n{}", content.trim_end()).unwrap_or_default();
    };
    match &task.payload {
        Payload::Gsm8k { answer } => part("answer", answer),
        Payload::Math { answer, solution, level, subject } => {
            part("answer", answer);
            part("solution", solution);
            part("subject", &format!("{subject}, level {level}"));
        }
        Payload::Python { dataset_id, tests, reference_solution } => {
            part("id in the data set", dataset_id);
            part("reference solution", reference_solution);
            for (index, test) in tests.iter().enumerate() {
                part(&format!("test {}", index + 1), test);
            }
        }
    }
    text
}

fn payload(payload: &Payload) -> Value {
    match payload {
        Payload::Gsm8k { answer } => json!({ "answer": answer.as_ref() }),
        Payload::Math { answer, solution, level, subject } => json!({
            "answer": answer.as_ref(),
            "solution": solution.as_ref(),
            "level": level,
            "subject": subject.as_ref(),
        }),
        Payload::Python { dataset_id, tests, reference_solution } => json!({
            "dataset_id": dataset_id.as_ref(),
            "tests": tests.as_ref(),
            "reference_solution": reference_solution.as_ref(),
        }),
    }
}
