//! The owner's word of the kernel mutex.
//!
//! While nobody waits, it is taken and given up by one instruction, without the core lock. Whoever must
//! wait marks it, under the core lock: from then on it changes only under the core lock, until it is
//! passed on and nobody is left who waits. So the mark and the queue of who waits agree.
//!
//! Threads are known by their offset (`arena.rs`), which is less than 2 GiB. What one owner wrote the next must
//! see. It does by the word, if it takes the mutex itself: *release* where the word becomes 0, *acquire* where 0 is
//! found. It does by the core lock, if the mutex is passed to it: who waits is queued, woken and put on a CPU under
//! it. A thread asks for itself only whether it is the owner, and nobody else makes that true or false while it runs.

use super::atomic::{AtomicU32, Ordering};

/// Bit of the word: somebody sleeps until the mutex is passed on.
const CONTENDED: u32 = 1;

/// A thread as owner. 0 is nobody.
const fn word(thread: u32) -> u32 {
    (thread + 1) << 1
}

/// The word, at first 0.
pub struct Owner(pub(super) AtomicU32);

impl Owner {
    /// Whether the running thread, which is given, has the mutex.
    #[inline]
    pub fn is(&self, thread: u32) -> bool {
        self.0.load(Ordering::Relaxed) & !CONTENDED == word(thread)
    }

    /// Whether somebody waits. Unless under the core lock, it may already be otherwise.
    #[inline]
    pub fn is_contended(&self) -> bool {
        self.0.load(Ordering::Relaxed) & CONTENDED != 0
    }

    /// Takes the mutex if it is free.
    #[inline]
    pub fn try_take(&self, thread: u32) -> bool {
        // Acquire: nothing else orders this after the last owner.
        self.0
            .compare_exchange(0, word(thread), Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    /// Under the core lock: takes the mutex if it is free; otherwise returns the owner, who will pass it
    /// on. The caller queues for it before it drops the core lock.
    #[inline]
    pub fn contend(&self, thread: u32) -> Option<u32> {
        // Acquire: the last owner may have given it up without the core lock.
        let before = self.0.fetch_or(CONTENDED, Ordering::Acquire);
        if before == 0 {
            // The mark keeps everybody else off; it goes, since nobody waits. Relaxed: there is nothing yet
            // that another would have to see.
            self.0.store(word(thread), Ordering::Relaxed);
            return None;
        }
        Some((before >> 1) - 1)
    }

    /// The owner gives the mutex up, unless somebody waits.
    #[inline]
    pub fn try_release(&self, thread: u32) -> bool {
        // Release: the next owner may take it without the core lock.
        self.0
            .compare_exchange(word(thread), 0, Ordering::Release, Ordering::Relaxed)
            .is_ok()
    }

    /// The running thread, which is given, gives the mutex up if it has it, under the core lock, where nobody can begin
    /// to wait. If somebody does, `next` takes the next owner out of the queue, and tells whether others wait still.
    #[inline]
    pub fn pass_on(&self, thread: u32, next: impl FnOnce() -> (Option<u32>, bool)) {
        let before = self.0.load(Ordering::Relaxed);
        let owner = if before == word(thread) {
            0
        } else if before == word(thread) | CONTENDED {
            let (next, more) = next();
            next.map_or(0, word) | if more { CONTENDED } else { 0 }
        } else {
            return;
        };
        // Release, for 0: as in `try_release`.
        self.0.store(owner, Ordering::Release);
    }
}
