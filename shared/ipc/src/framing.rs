//! Frames: a little-endian `u32` length, then that many bytes.
//!
//! The length is checked against the cap before anything is allocated, and memory grows with the bytes that have arrived,
//! never with the length that was announced. An incomplete frame is a state, not an error.

use bytes::{Buf, Bytes, BytesMut};

/// Bytes of the length prefix.
pub const HEADER_BYTES: usize = 4;

/// The longest body: a group of 16 rollouts of 32,768 tokens takes 4 MiB, so 64 MiB leave room for whole-window requests.
pub const MAX_FRAME_BYTES: usize = 64 << 20;

/// The least and the usual most to make room for before a read.
const READ_CHUNK_BYTES: usize = 4 << 10;
const LARGE_CHUNK_BYTES: usize = 64 << 10;

/// A frame that is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    #[error("frame of {length_bytes} bytes is over the limit of {limit_bytes}")]
    TooLong { length_bytes: usize, limit_bytes: usize },
}

/// Takes bytes in any chunks and gives whole frames.
#[derive(Debug)]
pub struct FrameDecoder {
    buffer: BytesMut,
    limit_bytes: usize,
}

impl Default for FrameDecoder {
    fn default() -> Self {
        Self::with_limit(MAX_FRAME_BYTES)
    }
}

impl FrameDecoder {
    /// A decoder that refuses bodies over `limit_bytes`.
    #[must_use]
    pub fn with_limit(limit_bytes: usize) -> Self {
        Self { buffer: BytesMut::new(), limit_bytes }
    }

    /// Adds bytes that have arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The body of the next frame, or `None` until all of it is here.
    ///
    /// # Errors
    /// [`FrameError::TooLong`]; the stream has lost its meaning then, and every later call says the same.
    pub fn next_frame(&mut self) -> Result<Option<Bytes>, FrameError> {
        let Some(length_bytes) = self.announced()? else { return Ok(None) };
        if self.buffer.len() < HEADER_BYTES + length_bytes {
            return Ok(None);
        }
        self.buffer.advance(HEADER_BYTES);
        Ok(Some(self.buffer.split_to(length_bytes).freeze()))
    }

    /// Bytes of a frame that is not complete yet.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Memory that is reserved for the frame to come.
    #[must_use]
    pub fn capacity_bytes(&self) -> usize {
        self.buffer.capacity()
    }

    /// The buffer to read into, with room for at least one more byte; it doubles with what has arrived.
    pub(crate) fn read_buffer(&mut self) -> Result<&mut BytesMut, FrameError> {
        let missing = self
            .announced()?
            .map_or(READ_CHUNK_BYTES, |length_bytes| (HEADER_BYTES + length_bytes).saturating_sub(self.buffer.len()));
        let room = missing.clamp(READ_CHUNK_BYTES, self.buffer.len().max(LARGE_CHUNK_BYTES));
        self.buffer.reserve(room);
        Ok(&mut self.buffer)
    }

    /// Length of the frame whose header is complete, checked.
    fn announced(&self) -> Result<Option<usize>, FrameError> {
        let Some(header) = self.buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let length_bytes = usize::try_from(u32::from_le_bytes(*header)).unwrap_or(usize::MAX);
        if length_bytes > self.limit_bytes {
            return Err(FrameError::TooLong { length_bytes, limit_bytes: self.limit_bytes });
        }
        Ok(Some(length_bytes))
    }
}

/// The frame of `body`, for tests and tools; messages are framed by [`crate::codec::encode`] without this copy.
///
/// # Errors
/// [`FrameError::TooLong`] over [`MAX_FRAME_BYTES`].
pub fn frame(body: &[u8]) -> Result<Bytes, FrameError> {
    let mut bytes = BytesMut::with_capacity(HEADER_BYTES + body.len());
    bytes.extend_from_slice(&header(body.len())?);
    bytes.extend_from_slice(body);
    Ok(bytes.freeze())
}

/// Header of a body of `length_bytes`.
pub(crate) fn header(length_bytes: usize) -> Result<[u8; HEADER_BYTES], FrameError> {
    let too_long = FrameError::TooLong { length_bytes, limit_bytes: MAX_FRAME_BYTES };
    if length_bytes > MAX_FRAME_BYTES {
        return Err(too_long);
    }
    u32::try_from(length_bytes).map(u32::to_le_bytes).map_err(|_| too_long)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode_in_chunks(stream: &[u8], sizes: &[usize]) -> Vec<Bytes> {
        let mut decoder = FrameDecoder::default();
        let mut frames = Vec::new();
        let mut rest = stream;
        let mut sizes = sizes.iter().copied().cycle();
        while !rest.is_empty() {
            let size = sizes.next().unwrap_or(1).clamp(1, rest.len());
            decoder.push(&rest[..size]);
            rest = &rest[size..];
            while let Some(frame) = decoder.next_frame().unwrap() {
                frames.push(frame);
            }
        }
        assert_eq!(decoder.pending_bytes(), 0);
        frames
    }

    proptest! {
        #[test]
        fn any_chunking_gives_the_same_frames(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..12),
            sizes in prop::collection::vec(1_usize..97, 1..8),
        ) {
            let mut stream = Vec::new();
            for body in &bodies {
                stream.extend_from_slice(&frame(body).unwrap());
            }
            prop_assert_eq!(decode_in_chunks(&stream, &sizes), bodies);
        }

        #[test]
        fn a_cut_frame_is_a_state(body in prop::collection::vec(any::<u8>(), 1..200), cut in any::<prop::sample::Index>()) {
            let whole = frame(&body).unwrap();
            let cut = cut.index(whole.len());
            let mut decoder = FrameDecoder::default();
            decoder.push(&whole[..cut]);
            prop_assert_eq!(decoder.next_frame(), Ok(None));
            prop_assert_eq!(decoder.pending_bytes(), cut);
            decoder.push(&whole[cut..]);
            prop_assert_eq!(decoder.next_frame().unwrap().unwrap(), body);
        }

        #[test]
        fn random_bytes_never_panic(noise in prop::collection::vec(any::<u8>(), 0..4096)) {
            let mut decoder = FrameDecoder::default();
            decoder.push(&noise);
            while let Ok(Some(_)) = decoder.next_frame() {}
        }
    }

    #[test]
    fn four_gib_are_refused_before_allocating() {
        let mut decoder = FrameDecoder::default();
        decoder.push(&u32::MAX.to_le_bytes());
        let before = decoder.capacity_bytes();
        let refused = FrameError::TooLong { length_bytes: 4_294_967_295, limit_bytes: MAX_FRAME_BYTES };
        assert_eq!(decoder.next_frame(), Err(refused));
        assert_eq!(decoder.next_frame(), Err(refused), "and stays refused");
        assert!(decoder.read_buffer().is_err());
        assert_eq!(decoder.capacity_bytes(), before);
    }

    #[test]
    fn the_cap_itself_is_allowed_and_one_more_is_not() {
        let mut decoder = FrameDecoder::with_limit(10);
        decoder.push(&[10, 0, 0, 0]);
        decoder.push(&[7; 10]);
        assert_eq!(decoder.next_frame().unwrap().unwrap().as_ref(), &[7; 10]);
        decoder.push(&[11, 0, 0, 0]);
        assert_eq!(decoder.next_frame(), Err(FrameError::TooLong { length_bytes: 11, limit_bytes: 10 }));
        assert!(header(MAX_FRAME_BYTES).is_ok());
        assert!(header(MAX_FRAME_BYTES + 1).is_err());
    }

    #[test]
    fn memory_follows_what_arrived_not_what_was_announced() {
        let mut decoder = FrameDecoder::default();
        decoder.push(&u32::try_from(MAX_FRAME_BYTES).unwrap().to_le_bytes());
        decoder.read_buffer().unwrap();
        assert!(decoder.capacity_bytes() <= 2 * LARGE_CHUNK_BYTES, "{}", decoder.capacity_bytes());
        decoder.push(&vec![0; 1 << 20]);
        decoder.read_buffer().unwrap();
        assert!(decoder.capacity_bytes() <= 4 << 20, "{}", decoder.capacity_bytes());
    }
}
