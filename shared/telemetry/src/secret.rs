//! A text that cannot be printed by accident.

use std::fmt;

use serde::{Deserialize, Deserializer};

/// A password, key or token. It has no `Display` and no `Serialize`, and its memory is overwritten when it is dropped.
#[derive(Clone, Default)]
pub struct SecretString(String);

impl SecretString {
    /// Takes the text over.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text, for the one call that needs it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<String> for SecretString {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for SecretString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(crate::REDACTED)
    }
}

impl<'de> Deserialize<'de> for SecretString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

impl Drop for SecretString {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.0).into_bytes();
        bytes.fill(0);
        // Without a reader the compiler may leave the writes out.
        std::hint::black_box(bytes.as_slice());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_never_printed() {
        #[derive(Debug)]
        struct Store {
            _secret: SecretString,
        }
        let store = Store { _secret: SecretString::new("hunter2".into()) };
        assert_eq!(format!("{store:?}"), "Store { _secret: [redacted] }");
        assert_eq!(store._secret.expose(), "hunter2");
        assert!(!store._secret.is_empty() && SecretString::default().is_empty());
    }
}
