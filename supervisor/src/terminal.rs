//! Words for people on standard error, which may be gone: a terminal that was closed, a pipe that nobody reads any more.

use std::fmt::Arguments;
use std::io::Write;

/// Writes a line to standard error. Unlike `eprintln!` it does not panic when nobody is there to read it: a miner goes on.
pub fn note(line: Arguments<'_>) {
    write_line(&mut std::io::stderr().lock(), line);
}

fn write_line(writer: &mut impl Write, line: Arguments<'_>) {
    // There is nowhere to report it to.
    drop(writeln!(writer, "{line}"));
}

/// Whether a failure to write says only that the reader has gone: a closed pipe, a terminal that was hung up.
#[must_use]
pub fn is_reader_gone(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::BrokenPipe || error.raw_os_error() == Some(nix::errno::Errno::EIO as i32)
}

/// `text` without control characters, for texts that came from elsewhere: an escape sequence must not reach the terminal.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '\u{fffd}' } else { character }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Gone(i32);

    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::Error::from_raw_os_error(self.0))
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_has_gone_is_no_failure() {
        for errno in [nix::errno::Errno::EPIPE, nix::errno::Errno::EIO] {
            write_line(&mut Gone(errno as i32), format_args!("words"));
            assert!(is_reader_gone(&Gone(errno as i32).write(b"x").unwrap_err()));
        }
        assert!(!is_reader_gone(&Gone(nix::errno::Errno::ENOSPC as i32).write(b"x").unwrap_err()));
    }

    #[test]
    fn escapes_are_taken_out() {
        assert_eq!(printable("a\u{1b}[31mb\n"), "a\u{fffd}[31mb\u{fffd}");
    }
}
