//! Kernel stacks: slots that the host has mapped, each above a guard page.

use fluke_abi::layout::KERNEL_STACKS;

/// Bytes of a kernel stack. The deepest use is dropping translations through
/// [`crate::mm::hierarchy::DEPTH_MAX`] levels of regions.
pub const STACK_BYTES: u64 = 16384;

/// Top of a stack slot.
const fn top(slot: u32) -> u64 {
    KERNEL_STACKS + (slot as u64 + 1) * 2 * STACK_BYTES
}

/// The slots that belong to no CPU.
pub struct Stacks {
    /// Slots from here on were never used.
    fresh: u32,
    end: u32,
    /// Top of the free stack that was freed last; its first word names the next. 0 is none.
    free: u64,
}

impl Stacks {
    /// Slots `from` to `end`.
    pub const fn new(from: u32, end: u32) -> Self {
        Self {
            fresh: from,
            end,
            free: 0,
        }
    }

    /// The top of a free stack.
    pub fn allocate(&mut self) -> Option<u64> {
        if self.free != 0 {
            let top = self.free;
            // SAFETY: a free stack is mapped and nobody uses it; `free` stored the link.
            self.free = unsafe { *((top - 8) as *const u64) };
            return Some(top);
        }
        (self.fresh < self.end).then(|| {
            self.fresh += 1;
            top(self.fresh - 1)
        })
    }

    /// Takes a stack back.
    pub fn free(&mut self, top: u64) {
        // SAFETY: nobody runs on a stack that is freed: the thread is stopped.
        unsafe { *((top - 8) as *mut u64) = self.free };
        self.free = top;
    }
}
