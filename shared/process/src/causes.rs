//! An error and its causes as one line of text.

/// `error` and everything behind it, separated by `: `.
#[must_use]
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::PathBuf;

    use super::*;
    use crate::spec::SpawnError;

    #[test]
    fn every_cause_is_named_once() {
        let source = io::Error::from(io::ErrorKind::NotFound);
        assert_eq!(with_causes(&source), "entity not found");
        let error = SpawnError::Exec { program: PathBuf::from("/bin/x"), source };
        assert_eq!(with_causes(&error), "start /bin/x: entity not found");
    }
}
