//! An allocator that counts the bytes in use, to measure what a forward pass saves.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The system's allocator with a counter. Install it with `#[global_allocator]` in a test that has
/// its own process: the allocations of all threads count.
pub struct CountingAllocator;

impl CountingAllocator {
    /// Bytes that are allocated now.
    pub fn bytes_in_use() -> usize {
        IN_USE.load(Ordering::SeqCst)
    }

    /// The most bytes that were allocated at one time since [`reset_peak`](Self::reset_peak).
    pub fn peak() -> usize {
        PEAK.load(Ordering::SeqCst)
    }

    /// Ends the process when more than this is in use, with a line that names the file being read.
    /// Without this limit, a program that takes all memory of the machine would report nothing.
    pub fn refuse_beyond(bytes: usize) {
        LIMIT.store(bytes, Ordering::SeqCst);
    }

    /// Starts a new measurement of the peak.
    pub fn reset_peak() {
        PEAK.store(Self::bytes_in_use(), Ordering::SeqCst);
    }
}

fn grow(bytes: usize) {
    let now = IN_USE.fetch_add(bytes, Ordering::SeqCst) + bytes;
    PEAK.fetch_max(now, Ordering::SeqCst);
    if now > LIMIT.load(Ordering::Relaxed) {
        // Printing allocates too.
        LIMIT.store(usize::MAX, Ordering::SeqCst);
        let reading = crate::hostile::reading().unwrap_or_default();
        eprintln!("an allocation of {bytes} bytes, {now} in use, while reading {reading}");
        std::process::abort();
    }
}

// SAFETY: every call is passed on to the system's allocator with the same arguments.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller's promise is the same.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        grow(new_size);
        IN_USE.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller's promise is the same.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}
