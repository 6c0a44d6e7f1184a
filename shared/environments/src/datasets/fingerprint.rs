//! Whether rows are the published ones.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};

use super::published::HubSplit;

/// SHA-256 over the questions in order, each after its length in bytes as a little-endian `u64`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

/// A text that is no fingerprint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no fingerprint: 64 hexadecimal digits are expected")]
pub struct NotAFingerprint(pub String);

impl Fingerprint {
    /// Fingerprint of `questions`.
    #[must_use]
    pub fn of(questions: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        let mut hash = Sha256::new();
        for question in questions {
            let question = question.as_ref();
            hash.update((question.len() as u64).to_le_bytes());
            hash.update(question.as_bytes());
        }
        Self(hash.finalize().into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl FromStr for Fingerprint {
    type Err = NotAFingerprint;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| NotAFingerprint(text.to_owned()))?;
        Ok(Self(bytes))
    }
}

/// What the rows of a file must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expectation {
    /// Their number.
    pub rows: usize,
    /// Their fingerprint.
    pub fingerprint: Fingerprint,
}

/// Files other than the published ones that an operator names, by split on the hub. As text: `SPLIT=ROWS:FINGERPRINT`, several
/// of them with commas between, for instance `train=7473:8631…`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides(pub BTreeMap<HubSplit, Expectation>);

/// A text that names no files.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no override of a data set: SPLIT=ROWS:FINGERPRINT is expected, where SPLIT is train, validation or test and \
     FINGERPRINT 64 hexadecimal digits"
)]
pub struct NotAnOverride(pub String);

impl FromStr for Overrides {
    type Err = NotAnOverride;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let entry = |entry: &str| {
            let (split, expected) = entry.trim().split_once('=')?;
            let (rows, fingerprint) = expected.split_once(':')?;
            let expectation = Expectation { rows: rows.parse().ok()?, fingerprint: fingerprint.parse().ok()? };
            Some((HubSplit::ALL.into_iter().find(|known| known.as_str() == split)?, expectation))
        };
        let entries = text.split(',').map(|part| entry(part).ok_or_else(|| NotAnOverride(part.to_owned())));
        Ok(Self(entries.collect::<Result<_, _>>()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_name_both_values() {
        let fingerprint = Fingerprint::of(["q"]);
        let overrides: Overrides = format!("train=3:{fingerprint}, test=1:{fingerprint}").parse().unwrap();
        let expected = [(HubSplit::Train, 3), (HubSplit::Test, 1)];
        assert_eq!(overrides.0, expected.map(|(split, rows)| (split, Expectation { rows, fingerprint })).into());
        let bad = ["", "train", "train=3", "train=:ab", "val=3:00", "train=3:00", "train=-1:00"];
        for text in
            bad.map(str::to_owned).into_iter().chain([format!("dev=3:{fingerprint}"), format!("3:{fingerprint}")])
        {
            assert_eq!(text.parse::<Overrides>(), Err(NotAnOverride(text.clone())));
        }
    }

    #[test]
    fn lengths_are_part_of_fingerprints() {
        assert_ne!(Fingerprint::of(["ab", "c"]), Fingerprint::of(["a", "bc"]));
        assert_eq!(Fingerprint::of(["é"]).to_string(), hex::encode(Sha256::digest(b"\x02\0\0\0\0\0\0\0\xc3\xa9")));
    }
}
