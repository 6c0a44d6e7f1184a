//! Who may come in: requests while nothing changes, weight updates while no request is inside, nobody during a pause.

use std::sync::Arc;

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, watch};

/// A request that is inside; it keeps weight updates out until it is dropped.
#[derive(Debug)]
pub struct Inside {
    _shared: OwnedRwLockReadGuard<()>,
}

/// A weight update that runs alone.
#[derive(Debug)]
pub struct Alone {
    _exclusive: OwnedRwLockWriteGuard<()>,
}

/// The door of a server.
#[derive(Debug)]
pub struct Door {
    is_paused: watch::Sender<bool>,
    /// Fair: a writer waits for the readers that are inside, readers that come later wait for it.
    lock: Arc<RwLock<()>>,
}

impl Default for Door {
    fn default() -> Self {
        Self { is_paused: watch::Sender::new(false), lock: Arc::default() }
    }
}

impl Door {
    /// Waits until there is no pause and no update, then goes in.
    pub async fn enter(&self) -> Inside {
        let mut paused = self.is_paused.subscribe();
        loop {
            // The sender lives as long as `self`.
            if paused.wait_for(|is_paused| !is_paused).await.is_err() {
                unreachable!("the door outlives those who wait before it");
            }
            let shared = Arc::clone(&self.lock).read_owned().await;
            if !*paused.borrow() {
                return Inside { _shared: shared };
            }
        }
    }

    /// Whether requests wait for [`Door::open`].
    #[must_use]
    pub fn is_paused(&self) -> bool {
        *self.is_paused.borrow()
    }

    /// Lets nobody in from now on.
    pub fn close(&self) {
        self.is_paused.send_replace(true);
    }

    /// Ends a pause.
    pub fn open(&self) {
        self.is_paused.send_replace(false);
    }

    /// Waits until nobody is inside.
    pub async fn alone(&self) -> Alone {
        Alone { _exclusive: Arc::clone(&self.lock).write_owned().await }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use futures::poll;

    use super::*;

    #[tokio::test]
    async fn an_update_waits_for_those_inside_and_those_outside_wait_for_it() {
        let door = Door::default();
        let inside = door.enter().await;
        let mut update = Box::pin(door.alone());
        assert!(poll!(&mut update).is_pending());
        let mut late = Box::pin(door.enter());
        assert!(poll!(&mut late).is_pending());
        drop(inside);
        let Poll::Ready(alone) = poll!(&mut update) else { panic!("the update may begin") };
        assert!(poll!(&mut late).is_pending());
        drop(alone);
        late.await;
    }

    #[tokio::test]
    async fn during_a_pause_nobody_comes_in() {
        let door = Door::default();
        door.close();
        let mut request = Box::pin(door.enter());
        assert!(poll!(&mut request).is_pending());
        // A pause does not keep an update out.
        drop(door.alone().await);
        assert!(poll!(&mut request).is_pending());
        door.open();
        request.await;
    }
}
