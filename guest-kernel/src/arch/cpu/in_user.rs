//! Whether a CPU runs user code, for others that must know of no use of a page table.

use super::atomic::{AtomicU32, Ordering};

/// 1 while the CPU runs user code.
///
/// The CPU sets it under the spin lock, and its entry stub clears it before it takes the lock again. Others
/// look under the lock, so they see the 1 of who left before them. If they see 0, the CPU is in the kernel,
/// done with what its user code did, and will find under the lock what they left there.
#[repr(transparent)]
pub struct InUser(pub(super) AtomicU32);

impl InUser {
    /// The CPU is about to run user code.
    #[inline]
    pub fn set(&self) {
        // Relaxed: the lock orders it.
        self.0.store(1, Ordering::Relaxed);
    }

    /// Whether the CPU runs user code at this moment.
    #[inline]
    pub fn is_set(&self) -> bool {
        // Acquire: the stub clears it without the lock, by a `mov`, which x86 keeps behind all that the
        // user code did.
        self.0.load(Ordering::Acquire) != 0
    }
}
