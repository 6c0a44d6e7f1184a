//! Work that would block the runtime, on threads of its own, and given up once nobody waits for it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::cache::CacheError;

/// Whether somebody still waits for what a thread does. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Interest {
    lost: Arc<AtomicBool>,
}

impl Interest {
    /// Ends with what is returned.
    pub(crate) fn until_dropped(&self) -> Waiting {
        Waiting(self.clone())
    }

    /// Looked at between two blocks of data.
    ///
    /// # Errors
    /// Nobody waits any more: the work is to end with this error, which nobody reads.
    pub(crate) fn check(&self) -> io::Result<()> {
        // Not `Interrupted`, after which the standard library tries again.
        if self.lost.load(Ordering::Relaxed) { Err(io::Error::other("nobody waits for it any more")) } else { Ok(()) }
    }
}

/// Takes the interest away when whoever waits is dropped.
#[derive(Debug)]
pub(crate) struct Waiting(Interest);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.lost.store(true, Ordering::Relaxed);
    }
}

/// Runs `work` where it may block. If this future is dropped, the work is told so; a panic goes on in the caller.
///
/// # Errors
/// [`CacheError::Ending`]: the runtime ends and has not begun the work.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce(&Interest) -> T + Send + 'static,
) -> Result<T, CacheError> {
    let interest = Interest::default();
    let _waiting = interest.until_dropped();
    match tokio::task::spawn_blocking(move || work(&interest)).await {
        Ok(done) => Ok(done),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(CacheError::Ending),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn work_that_nobody_waits_for_hears_of_it() {
        assert!(blocking(|interest| interest.check().is_ok()).await.unwrap());
        let (begun, begins) = tokio::sync::oneshot::channel();
        let (ended, ends) = tokio::sync::oneshot::channel();
        let waiting = tokio::spawn(blocking(move |interest| {
            begun.send(()).unwrap();
            while interest.check().is_ok() {
                std::thread::sleep(Duration::from_millis(1));
            }
            ended.send(()).unwrap();
        }));
        begins.await.unwrap();
        waiting.abort();
        ends.await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_goes_on_where_it_is_waited_for() {
        let waiting = blocking(|_| panic!("as told"));
        let panic = std::panic::AssertUnwindSafe(waiting).catch_unwind().await.unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"as told"));
    }
}
