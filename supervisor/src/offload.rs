//! Where computing goes that takes milliseconds: signatures, hashes, the window file.

use tokio::task::JoinError;

/// Where heavy computing happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Offload {
    /// On a thread of its own, so that the event loop goes on.
    #[default]
    Threads,
    /// Where it is asked for: the order of events is the same in every run, as a simulation needs it.
    Here,
}

impl Offload {
    /// Runs `work`.
    ///
    /// # Errors
    /// If `work` panicked on its thread.
    pub async fn run<T: Send + 'static>(self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
        match self {
            Self::Threads => tokio::task::spawn_blocking(work).await,
            Self::Here => Ok(work()),
        }
    }
}
