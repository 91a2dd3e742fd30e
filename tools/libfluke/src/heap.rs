//! The heap: power-of-two size classes, each with a list of free blocks, over memory that is
//! taken from a range once and never given back.
//!
//! Memory never used before is known to be zero, so big zeroed allocations (stacks, buffers,
//! memory for child spaces) do not touch their pages.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicBool, Ordering};

use fluke_abi::layout::PAGE_SIZE;

/// Smallest block: room for the link of a free list.
const MIN_BITS: u32 = 4;
/// Number of size classes; the largest block is far beyond any machine's memory.
const CLASSES: usize = 44;

/// Blocks in a range of memory.
#[derive(Debug)]
struct Blocks {
    next: u64,
    end: u64,
    free: [u64; CLASSES],
}

impl Blocks {
    const fn empty() -> Self {
        Self {
            next: 0,
            end: 0,
            free: [0; CLASSES],
        }
    }

    fn class(layout: Layout) -> u32 {
        let bytes = layout.size().max(layout.align()).max(1 << MIN_BITS);
        bytes.next_power_of_two().trailing_zeros()
    }

    /// A block, and whether its memory is fresh; 0 if there is none.
    ///
    /// # Safety
    /// The range is memory of the allocator's own.
    unsafe fn take(&mut self, layout: Layout) -> (u64, bool) {
        let bits = Self::class(layout);
        let Some(free) = self.free.get_mut((bits - MIN_BITS) as usize) else {
            return (0, false);
        };
        if *free != 0 {
            let block = *free;
            // SAFETY: a free block's first word holds the next free block.
            *free = unsafe { *(block as *const u64) };
            return (block, false);
        }
        let size = 1u64 << bits;
        // Blocks beyond a page need their alignment only if somebody asked for it.
        let align = if size <= PAGE_SIZE {
            size
        } else {
            PAGE_SIZE.max(layout.align() as u64)
        };
        // Nor do they need more than the pages asked for; a block keeps to its class all the
        // same, because what is freed is found by class and the class is that of the size.
        let start = self.next.next_multiple_of(align);
        match start.checked_add(size) {
            Some(end) if end <= self.end => {
                self.next = end;
                (start, true)
            }
            _ => (0, false),
        }
    }

    /// Takes a block back.
    ///
    /// # Safety
    /// `block` came from `take` with the same layout, and nobody uses it any more.
    unsafe fn give(&mut self, block: u64, layout: Layout) {
        let free = &mut self.free[(Self::class(layout) - MIN_BITS) as usize];
        // SAFETY: the block is ours again, and large enough for a word.
        unsafe { *(block as *mut u64) = *free };
        *free = block;
    }
}

/// An allocator for all threads of a program.
#[derive(Debug)]
pub struct Heap {
    locked: AtomicBool,
    blocks: UnsafeCell<Blocks>,
}

// SAFETY: `blocks` is only used under the lock.
unsafe impl Sync for Heap {}

impl Heap {
    /// A heap without memory.
    pub const fn new() -> Self {
        Self {
            locked: AtomicBool::new(false),
            blocks: UnsafeCell::new(Blocks::empty()),
        }
    }

    /// Gives the heap its memory.
    ///
    /// # Safety
    /// The range is zeroed, valid, and nobody else's.
    pub unsafe fn init(&self, start: u64, size: u64) {
        self.with(|blocks| {
            // Address 0 is no block's.
            blocks.next = start.max(1 << MIN_BITS);
            blocks.end = start + size;
        });
    }

    /// Bytes never used so far.
    pub fn fresh(&self) -> u64 {
        self.with(|blocks| blocks.end - blocks.next)
    }

    fn with<R>(&self, f: impl FnOnce(&mut Blocks) -> R) -> R {
        // A spin lock, because a kernel mutex costs two calls for every allocation. The holder may
        // have been preempted: after a while, wait in the kernel, where it gets its turn.
        let mut tries = 0u32;
        while self
            .locked
            .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            tries += 1;
            if tries.is_multiple_of(1000) {
                crate::thread::pause();
            }
            core::hint::spin_loop();
        }
        // SAFETY: the lock is held.
        let result = f(unsafe { &mut *self.blocks.get() });
        self.locked.store(false, Ordering::Release);
        result
    }
}

impl Default for Heap {
    fn default() -> Self {
        Self::new()
    }
}

// SAFETY: blocks do not overlap, are at least as large and as aligned as asked for, and stay
// valid until they are given back.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the memory was given with `init`.
        self.with(|blocks| unsafe { blocks.take(layout) }).0 as *mut u8
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the memory was given with `init`.
        let (block, fresh) = self.with(|blocks| unsafe { blocks.take(layout) });
        if block == 0 {
            return null_mut();
        }
        if !fresh {
            // SAFETY: the block is that large, and the caller's alone.
            unsafe { (block as *mut u8).write_bytes(0, layout.size()) };
        }
        block as *mut u8
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        self.with(|blocks| unsafe { blocks.give(block as u64, layout) });
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller keeps to the rules of `GlobalAlloc`.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        if Blocks::class(layout) == Blocks::class(new_layout) {
            return block;
        }
        // SAFETY: as above; the two blocks do not overlap.
        unsafe {
            let new = self.alloc(new_layout);
            if !new.is_null() {
                new.copy_from_nonoverlapping(block, layout.size().min(new_size));
                self.dealloc(block, layout);
            }
            new
        }
    }
}

/// The program's heap.
#[cfg_attr(feature = "guest", global_allocator)]
pub static HEAP: Heap = Heap::new();

/// Zeroed pages of the program's own memory, or none.
pub fn pages(size: u64) -> Option<u64> {
    let size = size.max(1).next_multiple_of(PAGE_SIZE);
    let layout = Layout::from_size_align(size as usize, PAGE_SIZE as usize).ok()?;
    // SAFETY: the layout has a size.
    let address = unsafe { alloc::alloc::alloc_zeroed(layout) } as u64;
    (address != 0).then_some(address)
}

/// Gives back what [`pages`] returned.
///
/// # Safety
/// Nobody uses the pages any more, in any space.
pub unsafe fn free_pages(address: u64, size: u64) {
    let size = size.max(1).next_multiple_of(PAGE_SIZE) as usize;
    if let Ok(layout) = Layout::from_size_align(size, PAGE_SIZE as usize) {
        // SAFETY: the caller's promise; the layout is that of `pages`.
        unsafe { alloc::alloc::dealloc(address as *mut u8, layout) };
    }
}

#[cfg(test)]
mod tests {
    use std::vec;

    use super::*;

    #[test]
    fn blocks_are_aligned_disjoint_and_reused() {
        let memory = vec![0u8; 1 << 16];
        let heap = Heap::new();
        // SAFETY: the vector outlives the heap and is used by nothing else.
        unsafe { heap.init(memory.as_ptr() as u64, memory.len() as u64) };
        let layouts = [(1, 1), (24, 8), (32, 32), (100, 4096), (5000, 8)]
            .map(|(size, align)| Layout::from_size_align(size, align).unwrap());
        // SAFETY: every layout has a size, and every block is given back once.
        unsafe {
            let blocks = layouts.map(|layout| heap.alloc(layout));
            for (block, layout) in blocks.iter().zip(layouts) {
                assert!(!block.is_null() && block.addr().is_multiple_of(layout.align()));
                block.write_bytes(0xff, layout.size());
            }
            for (i, a) in blocks.iter().enumerate() {
                for (j, b) in blocks.iter().enumerate().skip(i + 1) {
                    let (a, b) = (a.addr(), b.addr());
                    assert!(a + layouts[i].size() <= b || b + layouts[j].size() <= a);
                }
            }
            heap.dealloc(blocks[1], layouts[1]);
            let again = heap.alloc_zeroed(layouts[1]);
            assert_eq!(again, blocks[1]);
            assert!(
                (0..24).all(|i| *again.add(i) == 0),
                "a recycled block is cleared"
            );
        }
    }

    #[test]
    fn a_full_heap_says_so() {
        let memory = vec![0u8; 8192];
        let heap = Heap::new();
        // SAFETY: as above.
        unsafe {
            heap.init(memory.as_ptr() as u64, memory.len() as u64);
            assert!(heap.alloc(Layout::new::<[u8; 16384]>()).is_null());
            assert!(!heap.alloc(Layout::new::<[u8; 512]>()).is_null());
        }
    }
}
