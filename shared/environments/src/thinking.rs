//! Thinking modes: the tags a model writes and the system prompt that asks for them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How a checkpoint is asked to reason; part of its metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ThinkingMode {
    /// The system prompt names the reasoning tags; the template is whatever the checkpoint carries.
    Instructed,
    /// The model's own `<think>` tags; the template is told `enable_thinking=true`.
    Native,
}

/// Tags of one mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tags {
    /// Opens the reasoning.
    pub thinking_open: &'static str,
    /// Closes the reasoning; its word differs from the opening one in instructed mode.
    pub thinking_close: &'static str,
    /// Opens the answer.
    pub solution_open: &'static str,
    /// Closes the answer.
    pub solution_close: &'static str,
}

/// A text that is no thinking mode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no thinking mode; there are \"instructed\" and \"native\"")]
pub struct ParseThinkingModeError(pub String);

impl ThinkingMode {
    /// Both modes.
    pub const ALL: [Self; 2] = [Self::Instructed, Self::Native];

    /// Name as in a checkpoint's metadata.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Instructed => "instructed",
            Self::Native => "native",
        }
    }

    /// Tags that a completion is read by.
    #[must_use]
    pub const fn tags(self) -> Tags {
        let (thinking_open, thinking_close) = match self {
            Self::Instructed => ("<start_working_out>", "</end_working_out>"),
            Self::Native => ("<think>", "</think>"),
        };
        Tags { thinking_open, thinking_close, solution_open: "<SOLUTION>", solution_close: "</SOLUTION>" }
    }

    /// System prompt, byte for byte as the trainer's; changing it makes every prompt invalid.
    #[must_use]
    pub const fn system_prompt(self) -> &'static str {
        match self {
            Self::Instructed => {
                "You are given a problem. Think step by step.\n\
                 Place your reasoning between <start_working_out> and </end_working_out>.\n\
                 You may write and reason about code during your thinking.\n\
                 After thinking, you MUST provide your final solution wrapped in <SOLUTION> and </SOLUTION> tags.\n\
                 Any code outside <SOLUTION> tags will be ignored. Your answer will score 0 without these tags."
            }
            Self::Native => {
                "You are given a problem. Think step by step.\n\
                 You may write and reason about code during your thinking.\n\
                 After thinking, you MUST provide your final solution wrapped in <SOLUTION> and </SOLUTION> tags.\n\
                 Any code outside <SOLUTION> tags will be ignored. Your answer will score 0 without these tags."
            }
        }
    }

    /// `enable_thinking` for the chat template; `None` means that the variable is not passed.
    #[must_use]
    pub const fn enable_thinking(self) -> Option<bool> {
        match self {
            Self::Instructed => None,
            Self::Native => Some(true),
        }
    }
}

impl fmt::Display for ThinkingMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ThinkingMode {
    type Err = ParseThinkingModeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|mode| mode.as_str() == text).ok_or_else(|| ParseThinkingModeError(text.to_owned()))
    }
}
