//! Which names carry secrets, and how their values are kept out of lines that somebody else wrote.

use std::borrow::Cow;
use std::fmt;

/// What stands in the place of a secret.
pub const REDACTED: &str = "[redacted]";

/// Parts of a variable's name, between underscores, that mark a secret.
const SECRET_PARTS: [&str; 14] = [
    "SECRET",
    "SECRETS",
    "TOKEN",
    "TOKENS",
    "PASSWORD",
    "PASSWD",
    "PASSPHRASE",
    "CREDENTIAL",
    "CREDENTIALS",
    "MNEMONIC",
    "APIKEY",
    "KEY",
    "KEYS",
    "SURI",
];

/// Beginnings of names that are kept back whatever follows: accounts and wallets, also where a single value is harmless.
const SECRET_PREFIXES: [&str; 5] = ["AWS_", "R2_", "BT_WALLET", "WALLET_", "WANDB_"];

/// Beginnings of credentials that are recognised by themselves, with the least number of characters that follow.
const KNOWN_BEGINNINGS: [(&str, usize); 6] =
    [("AKIA", 16), ("ASIA", 16), ("hf_", 20), ("ghp_", 20), ("github_pat_", 20), ("wandb_v1_", 20)];

/// A shorter value is too likely to occur by chance in an innocent line.
const LEAST_VALUE_CHARACTERS: usize = 8;

/// Whether a variable of this name holds what no log and no child may see.
#[must_use]
pub fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    SECRET_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        || name.split(|c: char| !c.is_ascii_alphanumeric()).any(|part| SECRET_PARTS.contains(&part))
}

/// Replaces secrets in lines of text.
#[derive(Clone, Default)]
pub struct Redactor {
    /// Longest first, so that a value that contains another is replaced whole.
    values: Vec<String>,
}

impl Redactor {
    /// Knows the values of all variables whose name [`is_secret_name`].
    #[must_use]
    pub fn new(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut values: Vec<String> = variables
            .into_iter()
            .filter(|(name, value)| is_secret_name(name) && value.chars().count() >= LEAST_VALUE_CHARACTERS)
            .map(|(_, value)| value)
            .collect();
        values.sort_unstable_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        values.dedup();
        Self { values }
    }

    /// Knows the secrets of this process's environment.
    #[must_use]
    pub fn from_environment() -> Self {
        Self::new(
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))),
        )
    }

    /// The line without known values, without texts that look like credentials, and without the value in `NAME=value` or
    /// `NAME: value` where the name is a secret's.
    #[must_use]
    pub fn redact<'l>(&self, line: &'l str) -> Cow<'l, str> {
        let mut text = Cow::Borrowed(line);
        for value in &self.values {
            if text.contains(value.as_str()) {
                text = Cow::Owned(text.replace(value.as_str(), REDACTED));
            }
        }
        match redact_words(&text) {
            Some(redacted) => Cow::Owned(redacted),
            None => text,
        }
    }
}

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Redactor({} values)", self.values.len())
    }
}

/// `None` if nothing had to be replaced.
fn redact_words(line: &str) -> Option<String> {
    let mut redacted = String::new();
    let mut copied = 0;
    let mut next_is_secret = false;
    let mut replace = |redacted: &mut String, start: usize, end: usize| {
        redacted.push_str(&line[copied..start]);
        redacted.push_str(REDACTED);
        copied = end;
    };
    for (start, word) in words(line) {
        let end = start + word.len();
        if next_is_secret && !is_separator_word(word) {
            next_is_secret = false;
            // `Authorization: Bearer x`, and what was replaced before.
            if word.eq_ignore_ascii_case("bearer") || word.eq_ignore_ascii_case("basic") {
                next_is_secret = true;
                continue;
            }
            if is_plausible_value(word) {
                replace(&mut redacted, start, end);
            }
            continue;
        }
        if looks_like_credential(word) {
            replace(&mut redacted, start, end);
        }
        next_is_secret = match line[end..].trim_start_matches(['"', '\'', ' ']).chars().next() {
            Some('=' | ':') => names_a_secret_in_text(word),
            _ => word.eq_ignore_ascii_case("bearer"),
        };
    }
    if copied == 0 {
        return None;
    }
    redacted.push_str(&line[copied..]);
    Some(redacted)
}

/// Runs of characters that names and credentials are made of, with their places.
fn words(line: &str) -> impl Iterator<Item = (usize, &str)> {
    let in_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '/' | '+' | '.');
    let mut rest = 0;
    std::iter::from_fn(move || {
        let start = rest + line[rest..].find(in_word)?;
        let length = line[start..].find(|c| !in_word(c)).unwrap_or(line.len() - start);
        rest = start + length;
        Some((start, &line[start..rest]))
    })
}

/// Stricter than [`is_secret_name`]: a line says `missing key: model.norm` and `tokens: 512` without a secret.
fn names_a_secret_in_text(word: &str) -> bool {
    let is_alone = !word.contains(['_', '-', '.']);
    if is_alone && ["key", "keys", "token", "tokens"].iter().any(|name| word.eq_ignore_ascii_case(name)) {
        return false;
    }
    is_secret_name(word) || word.eq_ignore_ascii_case("authorization")
}

/// Numbers and a few letters are none; nor is what was replaced before.
fn is_plausible_value(word: &str) -> bool {
    word.len() >= LEAST_VALUE_CHARACTERS && word != "redacted" && word.parse::<f64>().is_err()
}

fn is_separator_word(word: &str) -> bool {
    word.chars().all(|c| !c.is_ascii_alphanumeric())
}

fn looks_like_credential(word: &str) -> bool {
    KNOWN_BEGINNINGS.iter().any(|(beginning, least)| {
        word.strip_prefix(beginning).is_some_and(|rest| {
            rest.len() >= *least && rest.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_secrets() {
        for name in [
            "AWS_ACCESS_KEY_ID",
            "R2_WRITE_SECRET_ACCESS_KEY",
            "r2_bucket_id",
            "HF_TOKEN",
            "WANDB_API_KEY",
            "GRAIL_DB_PASSWORD",
            "BT_WALLET_HOT",
            "SOME-API-KEY",
        ] {
            assert!(is_secret_name(name), "{name}");
        }
        for name in [
            "PATH",
            "TOKENIZERS_PARALLELISM",
            "GRAIL_LOG",
            "KEYBOARD",
            "CUDA_VISIBLE_DEVICES",
            "MONKEY",
            "max_tokenized",
        ] {
            assert!(!is_secret_name(name), "{name}");
        }
    }

    fn redact(line: &str) -> String {
        let variables = [
            ("HF_TOKEN", "abcdefgh12345678"),
            ("OTHER_TOKEN", "abcdefgh12345678-longer"),
            ("SHORT_TOKEN", "true"),
            ("HOME", "/home/miner"),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Redactor::new(variables).redact(line).into_owned()
    }

    #[test]
    fn known_values_disappear_wherever_they_stand() {
        assert_eq!(redact("GET /x?k=abcdefgh12345678&y"), "GET /x?k=[redacted]&y");
        assert_eq!(redact("xabcdefgh12345678-longery"), "x[redacted]y");
    }

    #[test]
    fn credentials_are_recognised_by_their_look_and_by_their_name() {
        let cases = [
            ("using AKIAIOSFODNN7EXAMPLE now", "using [redacted] now"),
            ("token hf_abcdefghijklmnopqrstuv.", "token hf_abcdefghijklmnopqrstuv."),
            ("token hf_abcdefghijklmnopqrstuv", "token [redacted]"),
            ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG+bPx rest", "AWS_SECRET_ACCESS_KEY=[redacted] rest"),
            (r#"{"api_key": "s3cr3t-value", "n": 1}"#, r#"{"api_key": "[redacted]", "n": 1}"#),
            ("Authorization: Bearer eyJhbGciOi.x-y_z", "Authorization: Bearer [redacted]"),
            ("password = hunter2hunter", "password = [redacted]"),
            ("HF_TOKEN=abcdefgh12345678", "HF_TOKEN=[redacted]"),
        ];
        for (line, expected) in cases {
            assert_eq!(redact(line), expected, "{line}");
        }
    }

    #[test]
    fn innocent_lines_stay_as_they_are() {
        for line in [
            "",
            "Load weight end. elapsed=1.25 s, avail mem=70.1 GB",
            "tokens: 512, tokens/s: 1200.5",
            "max_total_num_tokens=4096, home=/home/miner is true",
            "Prefill batch #new-token: 12345678, #cached-token: 0",
            "missing key: model.norm.weight",
            "eos_token: <|im_end|>",
            "key ideas matter",
            "schön: größer ≥ 3 €",
        ] {
            let redactor = Redactor::new([("SHORT_TOKEN".to_owned(), "true".to_owned())]);
            assert_eq!(redactor.redact(line), line);
        }
    }
}
