//! The unpacked payload: one zstd frame, whose size is checked before anything is allocated for it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use zstd::stream::read::Decoder;
use zstd::zstd_safe::get_frame_content_size;

use super::DeltaError;

/// Longest frame header of zstd.
const FRAME_HEADER_BYTES: u64 = 18;
/// Payloads up to this size are kept in memory, larger ones in a file without a name.
const IN_MEMORY_BYTES: u64 = 16 << 20;
/// Bytes unpacked at once into a file.
const COPY_BYTES: usize = 1 << 20;

/// The bytes of a payload.
#[derive(Debug)]
pub(super) struct Payload {
    bytes: Bytes,
    pub(super) length: u64,
}

#[derive(Debug)]
enum Bytes {
    Memory(Vec<u8>),
    Scratch(File),
}

impl Payload {
    /// Unpacks the first frame of `packed`; what follows it is ignored. `None` for an object without any byte, which is an
    /// empty delta.
    pub(super) fn unpack(mut packed: impl Read, limit: u64, scratch: &Path) -> Result<Option<Self>, DeltaError> {
        let mut start = Vec::new();
        packed.by_ref().take(FRAME_HEADER_BYTES).read_to_end(&mut start).map_err(DeltaError::io("the packed delta"))?;
        if start.is_empty() {
            return Ok(None);
        }
        let length = stated_size(&start)?;
        if length > limit {
            return Err(DeltaError::Limit { what: "the unpacked payload", bytes: length, limit });
        }
        let decoder = Decoder::new(start.as_slice().chain(packed)).map_err(unpacking)?;
        let mut decoder = decoder.single_frame();
        let bytes = if length <= IN_MEMORY_BYTES {
            let length = usize::try_from(length).map_err(|error| unpacking(io::Error::other(error)))?;
            let mut bytes = vec![0; length];
            decoder.read_exact(&mut bytes).map_err(unpacking)?;
            Bytes::Memory(bytes)
        } else {
            Bytes::Scratch(unpack_to_file(&mut decoder, length, scratch)?)
        };
        // Only the end of the stream says whether the frame is complete.
        match decoder.read(&mut [0]).map_err(unpacking)? {
            0 => Ok(Some(Self { bytes, length })),
            _ => Err(DeltaError::Decompress { what: "it holds more than it states".to_owned() }),
        }
    }

    /// Fills `target` from `offset` on.
    pub(super) fn read_at(&self, target: &mut [u8], offset: u64) -> Result<(), DeltaError> {
        let read = match &self.bytes {
            Bytes::Memory(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                match bytes.get(start..).and_then(|rest| rest.get(..target.len())) {
                    Some(found) => {
                        target.copy_from_slice(found);
                        Ok(())
                    }
                    None => Err(io::ErrorKind::UnexpectedEof.into()),
                }
            }
            Bytes::Scratch(file) => file.read_exact_at(target, offset),
        };
        read.map_err(DeltaError::io("the unpacked delta"))
    }
}

fn stated_size(start: &[u8]) -> Result<u64, DeltaError> {
    let what = match get_frame_content_size(start) {
        Ok(Some(size)) => return Ok(size),
        Ok(None) => "its size is not stated",
        Err(_) => "it does not begin like one",
    };
    Err(DeltaError::Decompress { what: what.to_owned() })
}

fn unpack_to_file(decoder: &mut impl Read, length: u64, scratch: &Path) -> Result<File, DeltaError> {
    let what = || format!("a scratch file in {}", scratch.display());
    let mut file = tempfile::tempfile_in(scratch).map_err(DeltaError::io(what()))?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut left = length;
    while left > 0 {
        let wanted = usize::try_from(left).unwrap_or(COPY_BYTES).min(COPY_BYTES);
        decoder.read_exact(&mut buffer[..wanted]).map_err(unpacking)?;
        file.write_all(&buffer[..wanted]).map_err(DeltaError::io(what()))?;
        left -= wanted as u64;
    }
    Ok(file)
}

/// An error of the decoder has no number of the operating system, one of the file below it has.
fn unpacking(error: io::Error) -> DeltaError {
    if error.raw_os_error().is_some() {
        return DeltaError::io("the packed delta")(error);
    }
    DeltaError::Decompress { what: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_payloads_are_kept_in_a_file_without_a_name() {
        let plain: Vec<u8> = (0..IN_MEMORY_BYTES + 7).map(|index| (index % 251).to_le_bytes()[0]).collect();
        let packed = zstd::bulk::compress(&plain, 1).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let payload = Payload::unpack(packed.as_slice(), u64::MAX, scratch.path()).unwrap().unwrap();
        assert!(matches!(payload.bytes, Bytes::Scratch(_)));
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
        let mut end = [0; 9];
        payload.read_at(&mut end, IN_MEMORY_BYTES - 2).unwrap();
        assert_eq!(end, plain[plain.len() - 9..]);
        assert!(payload.read_at(&mut end, IN_MEMORY_BYTES - 1).is_err());
    }

    #[test]
    fn a_scratch_folder_that_is_missing_is_not_blamed_on_the_payload() {
        let packed = zstd::bulk::compress(&vec![0; 17 << 20], 1).unwrap();
        let error = Payload::unpack(packed.as_slice(), u64::MAX, Path::new("/nowhere")).unwrap_err();
        assert_eq!(error.class(), None);
        assert!(error.to_string().contains("/nowhere"), "{error}");
    }
}
