//! Pages for page tables, from the kernel's pool.

use fluke_abi::layout::PAGE_SIZE;

use crate::arch::memory::{clear_page, read_word, write_word};

/// Free pages of the pool. Physical addresses; 0 is none.
pub struct FramePool {
    /// Pages from here on were never used, and are zero.
    fresh: u64,
    end: u64,
    /// Page that was freed last; its first word names the next.
    free: u64,
    live: u64,
}

impl FramePool {
    /// A pool of the pages from `start` to `end`.
    pub const fn new(start: u64, end: u64) -> Self {
        Self {
            fresh: start,
            end,
            free: 0,
            live: 0,
        }
    }

    /// Pages in use.
    pub const fn live(&self) -> u64 {
        self.live
    }

    /// A zeroed page.
    pub fn allocate(&mut self) -> Option<u64> {
        let page = if self.free != 0 {
            let page = self.free;
            self.free = read_word(page);
            clear_page(page);
            page
        } else if self.fresh + PAGE_SIZE <= self.end {
            self.fresh += PAGE_SIZE;
            self.fresh - PAGE_SIZE
        } else {
            return None;
        };
        self.live += 1;
        Some(page)
    }

    /// Takes a page back.
    pub fn free(&mut self, page: u64) {
        write_word(page, self.free);
        self.free = page;
        self.live -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recycled_page_is_zero_and_an_empty_pool_says_so() {
        let mut pool = FramePool::new(PAGE_SIZE, 3 * PAGE_SIZE);
        let first = pool.allocate().unwrap();
        let second = pool.allocate().unwrap();
        assert_eq!(
            (first, second, pool.allocate()),
            (PAGE_SIZE, 2 * PAGE_SIZE, None)
        );
        write_word(first + 8, 7);
        pool.free(first);
        assert_eq!(pool.live(), 1);
        assert_eq!(pool.allocate(), Some(first));
        assert_eq!((read_word(first), read_word(first + 8)), (0, 0));
    }
}
