//! The trainer's signature over a metadata document. Validators do not check it, so neither does anything here depend on it:
//! a wrong one is reported.

use std::fmt;
use std::sync::Arc;

use grail_protocol::json::{self, Style};

use crate::metadata::Metadata;

type Verify = dyn Fn(&[u8], &str) -> bool + Send + Sync;

/// Verifies a signature (hexadecimal, as published) over a message with the trainer's key.
#[derive(Clone)]
pub struct SignatureCheck(Arc<Verify>);

impl SignatureCheck {
    /// A check by `verify(message, signature)`.
    pub fn new(verify: impl Fn(&[u8], &str) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(verify))
    }

    /// Holds the text of `manifest.sig` against the document.
    ///
    /// # Errors
    /// [`SignatureDefect`].
    pub fn check(&self, metadata: &Metadata, signature: Option<&[u8]>) -> Result<(), SignatureDefect> {
        let signature = signature.ok_or(SignatureDefect::Missing)?;
        let signature = std::str::from_utf8(signature).map_err(|_| SignatureDefect::Wrong)?;
        let message = signed_text(metadata).ok_or(SignatureDefect::Wrong)?;
        let Self(verify) = self;
        if verify(message.as_bytes(), signature.trim()) { Ok(()) } else { Err(SignatureDefect::Wrong) }
    }
}

impl fmt::Debug for SignatureCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SignatureCheck")
    }
}

/// What is wrong with a signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SignatureDefect {
    #[error("manifest.sig is missing")]
    Missing,
    #[error("manifest.sig does not fit the document and the trainer's key")]
    Wrong,
}

/// The bytes that the trainer signs: the whole document as Python writes it with sorted keys and without blanks. `None` if the
/// document holds what Python's reader refuses.
fn signed_text(metadata: &Metadata) -> Option<String> {
    let text = serde_json::to_string(metadata.document()).ok()?;
    Some(json::parse(&text).ok()?.to_json(Style::CompactSorted))
}
