//! The secret that ties a child to the supervisor that started it.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{OwnedFd, RawFd};

/// Bytes of a token.
pub const TOKEN_BYTES: usize = 32;

/// 256 random bits, given to a child on an inherited descriptor and shown by it in the handshake. Never printed.
#[derive(Clone)]
pub struct Token([u8; TOKEN_BYTES]);

impl Token {
    /// A fresh token from the kernel's generator.
    ///
    /// # Errors
    /// If `/dev/urandom` cannot be read.
    pub fn generate() -> io::Result<Self> {
        let mut bytes = [0; TOKEN_BYTES];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// Reads a token from the pipe on which it was handed over, to its end.
    ///
    /// # Errors
    /// If the descriptor cannot be read or holds another number of bytes.
    pub fn read_from(descriptor: OwnedFd) -> io::Result<Self> {
        let mut bytes = Vec::with_capacity(TOKEN_BYTES + 1);
        let limit = u64::try_from(TOKEN_BYTES + 1).unwrap_or(u64::MAX);
        File::from(descriptor).take(limit).read_to_end(&mut bytes)?;
        let length = bytes.len();
        <[u8; TOKEN_BYTES]>::try_from(bytes).map(Self).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, format!("a token has {TOKEN_BYTES} bytes, {length} were given"))
        })
    }

    /// Reads a token from the inherited descriptor of this number, and closes it.
    ///
    /// # Errors
    /// As [`Token::read_from`]; also if the number is a standard descriptor or none that is open.
    pub fn read_from_number(number: RawFd) -> io::Result<Self> {
        if number <= 2 {
            let detail = format!("descriptor {number} is a standard one, a token comes on another");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, detail));
        }
        // The number comes from a command line, so nothing here owns the descriptor: it is opened anew, then closed.
        let token = Self::read_from(File::open(format!("/proc/self/fd/{number}"))?.into());
        nix::unistd::close(number)?;
        token
    }

    /// The bytes, to hand over.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; TOKEN_BYTES] {
        &self.0
    }

    /// Whether `shown` is this token; takes the same time wherever the two differ.
    #[must_use]
    pub fn matches(&self, shown: &[u8]) -> bool {
        if shown.len() != TOKEN_BYTES {
            return false;
        }
        let difference = self.0.iter().zip(shown).fold(0, |sum, (ours, theirs)| sum | (ours ^ theirs));
        std::hint::black_box(difference) == 0
    }
}

impl From<[u8; TOKEN_BYTES]> for Token {
    fn from(bytes: [u8; TOKEN_BYTES]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token([redacted])")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn only_the_same_bytes_match() {
        let token = Token::from([7; TOKEN_BYTES]);
        assert!(token.matches(&[7; TOKEN_BYTES]));
        for place in 0..TOKEN_BYTES {
            let mut other = [7; TOKEN_BYTES];
            other[place] ^= 0x80;
            assert!(!token.matches(&other), "differs at {place}");
        }
        assert!(!token.matches(&[]));
        assert!(!token.matches(&[7; TOKEN_BYTES - 1]));
        assert!(!token.matches(&[7; TOKEN_BYTES + 1]));
    }

    #[test]
    fn fresh_tokens_differ_and_are_never_printed() {
        let (one, other) = (Token::generate().unwrap(), Token::generate().unwrap());
        assert!(!one.matches(other.as_bytes()));
        assert_eq!(format!("{one:?}"), "Token([redacted])");
    }

    #[test]
    fn a_number_names_an_inherited_descriptor() {
        use std::os::fd::IntoRawFd;
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(&[9; TOKEN_BYTES]).unwrap();
        drop(writer);
        let number = OwnedFd::from(reader).into_raw_fd();
        assert!(Token::read_from_number(number).unwrap().matches(&[9; TOKEN_BYTES]));
        assert!(Token::read_from_number(0).is_err());
        assert!(Token::read_from_number(-1).is_err());
        assert!(Token::read_from_number(900_000).is_err());
    }

    #[test]
    fn a_pipe_carries_it_and_other_lengths_are_refused() {
        for (given, accepted) in [(TOKEN_BYTES, true), (0, false), (31, false), (33, false), (5_000, false)] {
            let (reader, mut writer) = std::io::pipe().unwrap();
            writer.write_all(&vec![9; given]).unwrap();
            drop(writer);
            assert_eq!(Token::read_from(reader.into()).is_ok(), accepted, "{given} bytes");
        }
    }
}
