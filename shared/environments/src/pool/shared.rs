//! Work that is done once for all who ask for it at the same time.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OnceCell;

type Cell<V> = Arc<OnceCell<V>>;

/// What is being worked out now. Nothing is kept beyond the last who asked.
#[derive(Debug)]
pub(super) struct Shared<K: Eq + Hash, V> {
    cells: Mutex<HashMap<K, Cell<V>>>,
}

impl<K: Eq + Hash, V> Default for Shared<K, V> {
    fn default() -> Self {
        Self { cells: Mutex::default() }
    }
}

impl<K: Clone + Eq + Hash, V: Clone> Shared<K, V> {
    /// The outcome of `work` on `key`, from whoever asked first. If he goes away, another one who waits goes on.
    pub(super) async fn get(&self, key: K, work: impl Future<Output = V>) -> V {
        let cell = Arc::clone(self.lock().entry(key.clone()).or_default());
        let share = Share { owner: self, key, cell: Some(cell) };
        match share.cell.as_deref() {
            Some(cell) => cell.get_or_init(|| work).await.clone(),
            None => work.await,
        }
    }
}

impl<K: Eq + Hash, V> Shared<K, V> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Cell<V>>> {
        // Nothing here can panic half-way.
        self.cells.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One who asked.
struct Share<'s, K: Eq + Hash, V> {
    owner: &'s Shared<K, V>,
    key: K,
    /// Taken by `drop` alone, which must let go of it before it counts those who are left.
    cell: Option<Cell<V>>,
}

impl<K: Eq + Hash, V> Drop for Share<'_, K, V> {
    fn drop(&mut self) {
        let mut cells = self.owner.lock();
        let Some(own) = self.cell.take() else { return };
        // Whoever came after the outcome was known may have a cell of his own.
        let Some(current) = cells.get(&self.key).filter(|current| Arc::ptr_eq(current, &own)) else { return };
        let is_known = current.initialized();
        drop(own);
        if is_known || Arc::strong_count(current) == 1 {
            cells.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::pin::{Pin, pin};
    use std::task::{Context, Waker};

    use super::*;

    fn is_pending<F: Future>(future: Pin<&mut F>) -> bool {
        future.poll(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    fn count(shared: &Shared<u8, u8>) -> usize {
        shared.lock().len()
    }

    #[tokio::test]
    async fn equal_work_is_done_once_and_not_kept() {
        let shared = Shared::<u8, u8>::default();
        let (send, receive) = tokio::sync::oneshot::channel();
        let mut first = pin!(shared.get(1, async { receive.await.unwrap() }));
        let mut second = pin!(shared.get(1, async { unreachable!("the first is at it") }));
        assert!(is_pending(first.as_mut()) && is_pending(second.as_mut()));
        send.send(7).unwrap();
        assert_eq!((first.await, second.await), (7, 7));
        assert_eq!(count(&shared), 0);
        assert_eq!(shared.get(1, ready(8)).await, 8);
    }

    #[tokio::test]
    async fn nothing_is_left_of_those_who_went_away() {
        let shared = Shared::<u8, u8>::default();
        {
            let mut first = pin!(shared.get(1, pending()));
            assert!(is_pending(first.as_mut()));
            {
                let mut second = pin!(shared.get(1, ready(5)));
                assert!(is_pending(second.as_mut()));
            }
            assert_eq!(count(&shared), 1, "the first still waits");
        }
        assert_eq!(count(&shared), 0);
    }

    #[tokio::test]
    async fn another_goes_on_and_a_newer_one_is_left_alone() {
        let shared = Shared::<u8, u8>::default();
        let mut second = pin!(shared.get(1, ready(5)));
        {
            let mut first = pin!(shared.get(1, pending()));
            assert!(is_pending(first.as_mut()));
            assert!(is_pending(second.as_mut()));
        }
        assert_eq!(second.await, 5);
        // One who was polled last and has the old cell goes after a newer one came.
        let old = shared.get(2, ready(1));
        let mut slow = Box::pin(old);
        let mut stuck = Box::pin(shared.get(3, pending()));
        assert!(is_pending(stuck.as_mut()));
        shared.lock().insert(3, Cell::default());
        drop(stuck);
        assert_eq!(count(&shared), 1, "not his own");
        assert_eq!(slow.as_mut().await, 1);
    }
}
