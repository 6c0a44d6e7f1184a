//! MessagePack with named fields, bounded on both ways.

use std::fmt::Debug;
use std::io::Cursor;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control::{FromSupervisor, ToSupervisor};
use crate::framing::{FrameError, HEADER_BYTES, header};
use crate::messages::{FromLauncher, FromWorker, ToLauncher, ToWorker};

/// Deepest nesting that a message may have; ours have four levels.
const MAX_DEPTH: usize = 32;

/// `fixstr "t"`, the first key of every message.
const TAG_KEY: [u8; 2] = [0xa1, b't'];

mod sealed {
    pub trait Sealed {}
}

/// One of the message enums: an adjacently tagged map `{t: kind, c: content}`.
pub trait Message: sealed::Sealed + Serialize + DeserializeOwned + Debug + Send + 'static {
    /// Name of the enum, for errors.
    const NAME: &'static str;
}

macro_rules! messages {
    ($($name:ident),*) => {$(
        impl sealed::Sealed for $name {}
        impl Message for $name {
            const NAME: &'static str = stringify!($name);
        }
    )*};
}
messages!(ToWorker, FromWorker, ToLauncher, FromLauncher);

/// What the content of a control message must be; the supervisor defines it.
pub trait Content: Serialize + DeserializeOwned + Debug + Send + 'static {}
impl<T: Serialize + DeserializeOwned + Debug + Send + 'static> Content for T {}

impl<R: Content> sealed::Sealed for ToSupervisor<R> {}
impl<R: Content> Message for ToSupervisor<R> {
    const NAME: &'static str = "ToSupervisor";
}

impl<A: Content> sealed::Sealed for FromSupervisor<A> {}
impl<A: Content> Message for FromSupervisor<A> {
    const NAME: &'static str = "FromSupervisor";
}

/// A message that cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    #[error("encode {message}")]
    Encode {
        message: &'static str,
        #[source]
        source: rmp_serde::encode::Error,
    },
    #[error("encode {message}")]
    TooLong {
        message: &'static str,
        #[source]
        source: FrameError,
    },
    #[error("decode {message} of {length_bytes} bytes: it is no map that begins with its kind")]
    NoMessage { message: &'static str, length_bytes: usize },
    #[error("decode {message} of {length_bytes} bytes")]
    Decode {
        message: &'static str,
        length_bytes: usize,
        #[source]
        source: rmp_serde::decode::Error,
    },
    #[error("decode {message}: {trailing_bytes} bytes follow the message in its frame")]
    Trailing { message: &'static str, trailing_bytes: usize },
}

/// The frame of `message`: length and body in one buffer.
///
/// # Errors
/// [`CodecError::TooLong`] over [`crate::framing::MAX_FRAME_BYTES`]; [`CodecError::Encode`] if serde refuses it.
pub fn encode<M: Message>(message: &M) -> Result<Bytes, CodecError> {
    let mut bytes = vec![0; HEADER_BYTES];
    rmp_serde::encode::write_named(&mut bytes, message)
        .map_err(|source| CodecError::Encode { message: M::NAME, source })?;
    let prefix =
        header(bytes.len() - HEADER_BYTES).map_err(|source| CodecError::TooLong { message: M::NAME, source })?;
    bytes[..HEADER_BYTES].copy_from_slice(&prefix);
    Ok(Bytes::from(bytes))
}

/// The message in the body of one frame.
///
/// Memory stays in proportion to `body`: the kind comes first, so serde never has to keep the content in its own, about
/// thirty times larger form; lists reserve by what they hold; nesting is bounded.
///
/// # Errors
/// [`CodecError`] for anything that is not exactly one message of this enum. Unknown fields are ignored.
pub fn decode<M: Message>(body: &[u8]) -> Result<M, CodecError> {
    let is_small_map = matches!(body.first(), Some(0x81..=0x8f));
    if !is_small_map || body.get(1..3) != Some(TAG_KEY.as_slice()) {
        return Err(CodecError::NoMessage { message: M::NAME, length_bytes: body.len() });
    }
    let mut deserializer = rmp_serde::Deserializer::new(Cursor::new(body));
    deserializer.set_max_depth(MAX_DEPTH);
    let message = M::deserialize(&mut deserializer).map_err(|source| CodecError::Decode {
        message: M::NAME,
        length_bytes: body.len(),
        source,
    })?;
    let read = usize::try_from(deserializer.position()).unwrap_or(usize::MAX);
    match body.len().saturating_sub(read) {
        0 => Ok(message),
        trailing_bytes => Err(CodecError::Trailing { message: M::NAME, trailing_bytes }),
    }
}
