//! Where the bytes of one object end up: counted, capped, hashed, and gunzipped on the way if need be.

use std::io::{self, Write};

use flate2::write::MultiGzDecoder;
use sha2::{Digest, Sha256};

use crate::manifest::Sha256Digest;

/// Length and hash of an object's plain bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetched {
    pub bytes: u64,
    pub sha256: Sha256Digest,
}

/// How the object is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Coding {
    Plain,
    Gzip,
}

/// Why the bytes were not taken.
#[derive(Debug)]
pub(crate) enum SinkError {
    /// More plain bytes than the cap allows.
    OverCap,
    /// The gzip stream is damaged or ends early.
    Gzip(io::Error),
    /// The target did not take them.
    Target(io::Error),
}

#[derive(Debug)]
enum Stage<W: Write> {
    Plain(Counted<W>),
    Gzip(Box<MultiGzDecoder<Counted<W>>>),
}

/// Takes the stored bytes of one object, in order.
#[derive(Debug)]
pub(crate) struct Sink<W: Write> {
    stage: Stage<W>,
}

impl<W: Write> Sink<W> {
    /// A sink for at most `cap` plain bytes.
    pub(crate) fn new(target: W, coding: Coding, cap: u64) -> Self {
        let counted = Counted { target, hash: Sha256::new(), bytes: 0, cap, failure: None };
        Self {
            stage: match coding {
                Coding::Plain => Stage::Plain(counted),
                Coding::Gzip => Stage::Gzip(Box::new(MultiGzDecoder::new(counted))),
            },
        }
    }

    pub(crate) fn take(&mut self, stored: &[u8]) -> Result<(), SinkError> {
        let written = match &mut self.stage {
            Stage::Plain(counted) => counted.write_all(stored),
            Stage::Gzip(decoder) => decoder.write_all(stored),
        };
        written.map_err(|error| self.classify(error))
    }

    /// Ends the stream; the target has all bytes but is not synced.
    pub(crate) fn finish(mut self) -> Result<(W, Fetched), SinkError> {
        let finished = match &mut self.stage {
            Stage::Plain(counted) => counted.flush(),
            Stage::Gzip(decoder) => decoder.try_finish(),
        };
        finished.map_err(|error| self.classify(error))?;
        let counted = match self.stage {
            Stage::Plain(counted) => counted,
            Stage::Gzip(decoder) => (*decoder).finish().map_err(SinkError::Gzip)?,
        };
        let fetched = Fetched { bytes: counted.bytes, sha256: Sha256Digest(counted.hash.finalize().into()) };
        Ok((counted.target, fetched))
    }

    /// An error passes through the decoder as text only; the counter below it remembers what happened.
    fn classify(&mut self, error: io::Error) -> SinkError {
        let counted = match &mut self.stage {
            Stage::Plain(counted) => counted,
            Stage::Gzip(decoder) => decoder.get_mut(),
        };
        match counted.failure {
            Some(Failure::Cap) => SinkError::OverCap,
            Some(Failure::Target) => SinkError::Target(error),
            None => SinkError::Gzip(error),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Failure {
    Cap,
    Target,
}

#[derive(Debug)]
struct Counted<W: Write> {
    target: W,
    hash: Sha256,
    bytes: u64,
    cap: u64,
    failure: Option<Failure>,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, plain: &[u8]) -> io::Result<usize> {
        if plain.len() as u64 > self.cap - self.bytes {
            self.failure = Some(Failure::Cap);
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.target.write_all(plain).inspect_err(|_| self.failure = Some(Failure::Target))?;
        self.hash.update(plain);
        self.bytes += plain.len() as u64;
        Ok(plain.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.target.flush().inspect_err(|_| self.failure = Some(Failure::Target))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn gzip(plain: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(plain).unwrap();
        encoder.finish().unwrap()
    }

    fn take_all(stored: &[u8], coding: Coding, cap: u64) -> Result<(Vec<u8>, Fetched), SinkError> {
        let mut sink = Sink::new(Vec::new(), coding, cap);
        for piece in stored.chunks(7) {
            sink.take(piece)?;
        }
        sink.finish()
    }

    #[test]
    fn plain_and_compressed_bytes_hash_alike() {
        let plain = b"some text, some text, some text".as_slice();
        let (bytes, direct) = take_all(plain, Coding::Plain, 1000).unwrap();
        assert_eq!(bytes, plain);
        // Two members, as `gzip` files may have.
        let twice = [gzip(&plain[..10]), gzip(&plain[10..])].concat();
        assert_eq!(take_all(&twice, Coding::Gzip, 1000).unwrap(), (plain.to_vec(), direct));
    }

    #[test]
    fn an_expansion_stops_at_the_cap() {
        let bomb = gzip(&vec![0; 1 << 20]);
        assert!(matches!(take_all(&bomb, Coding::Gzip, (1 << 20) - 1), Err(SinkError::OverCap)));
        assert!(take_all(&bomb, Coding::Gzip, 1 << 20).is_ok());
        assert!(matches!(take_all(&[0; 11], Coding::Plain, 10), Err(SinkError::OverCap)));
    }

    #[test]
    fn damaged_and_cut_streams_are_told_from_a_target_that_fails() {
        let mut stored = gzip(b"abcdefgh");
        let cut = &stored[..stored.len() - 1];
        assert!(matches!(take_all(cut, Coding::Gzip, 1000), Err(SinkError::Gzip(_))));
        let last = stored.len() - 5;
        stored[last] ^= 1;
        assert!(matches!(take_all(&stored, Coding::Gzip, 1000), Err(SinkError::Gzip(_))));
    }

    #[test]
    fn a_full_device_is_reported_as_full() {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut sink = Sink::new(full, Coding::Plain, 1000);
        match sink.take(b"x") {
            Err(SinkError::Target(error)) => assert_eq!(error.kind(), io::ErrorKind::StorageFull),
            other => panic!("{other:?}"),
        }
    }
}
