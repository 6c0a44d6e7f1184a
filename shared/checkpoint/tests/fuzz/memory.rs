//! How much memory a thread holds at most during a call.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, counting by thread.
#[derive(Debug)]
pub struct Tracking;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator with the layout that came in, so its guarantees are ours. Counting
// neither allocates nor panics: the cells are constants that need no destructor.
unsafe impl GlobalAlloc for Tracking {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.with(|held| {
            held.set(held.get().wrapping_add_unsigned(layout.size()));
            PEAK.with(|peak| peak.set(peak.get().max(held.get())));
        });
        // SAFETY: the caller upholds what `alloc` demands of the layout.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // What another thread allocated may be freed here, so the count may fall below zero.
        HELD.with(|held| held.set(held.get().wrapping_sub_unsigned(layout.size())));
        // SAFETY: the caller passes a pointer and the layout with which this allocator, and so the system's, made it.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Bytes that this thread held at most during `call`, beyond what it held before.
pub fn peak(call: impl FnOnce()) -> usize {
    let before = HELD.with(Cell::take);
    PEAK.with(|peak| peak.set(0));
    call();
    let taken = PEAK.with(Cell::get);
    HELD.with(|held| held.set(held.get().wrapping_add(before)));
    taken.unsigned_abs()
}

#[test]
fn the_peak_counts_what_is_held_at_once() {
    let taken = peak(|| {
        drop(Vec::<u8>::with_capacity(1 << 20));
        drop(Vec::<u8>::with_capacity(3 << 20));
    });
    assert_eq!(taken, 3 << 20);
    let held = Vec::<u8>::with_capacity(1 << 20);
    assert_eq!(peak(|| drop(Vec::<u8>::with_capacity(1 << 10))), 1 << 10);
    assert_eq!(peak(|| std::mem::forget(vec![0_u8; 100])), 100);
    drop(held);
}
