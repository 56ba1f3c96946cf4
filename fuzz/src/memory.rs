//! Measures what a piece of work allocates, and fails the work that takes more than it may.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Metered;

static NOW_BYTES: AtomicUsize = AtomicUsize::new(0);
static MOST_BYTES: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Metered = Metered;

fn took(bytes: usize) {
    let now = NOW_BYTES.fetch_add(bytes, Ordering::Relaxed) + bytes;
    MOST_BYTES.fetch_max(now, Ordering::Relaxed);
}

// SAFETY: all is done by the system's allocator; what is counted beside it allocates nothing.
unsafe impl GlobalAlloc for Metered {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        NOW_BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_bytes: usize) -> *mut u8 {
        took(new_bytes);
        NOW_BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(block, layout, new_bytes) }
    }
}

/// Does the work, and panics if it had more than `most_bytes` allocated at any one time beyond what there was before. What C code
/// allocates is not seen; libFuzzer bounds the whole process.
pub fn within<T>(most_bytes: usize, work: impl FnOnce() -> T) -> T {
    let before = NOW_BYTES.load(Ordering::Relaxed);
    MOST_BYTES.store(before, Ordering::Relaxed);
    let done = work();
    let took = MOST_BYTES.load(Ordering::Relaxed).saturating_sub(before);
    assert!(took <= most_bytes, "{took} bytes of memory, and {most_bytes} are enough");
    done
}
