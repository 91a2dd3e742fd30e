//! Physical memory, through the direct map.
//!
//! The kernel never touches a user address: it finds the frame in the page tables and uses the
//! direct map. So no kernel access can fault, SMAP needs no `stac`, and another CPU that changes a
//! page table never has to wait for a kernel that uses it.

#[cfg(not(test))]
const BASE: u64 = fluke_abi::layout::DIRECT_MAP;

#[cfg(not(test))]
#[inline]
fn base() -> u64 {
    BASE
}

#[cfg(test)]
#[inline]
fn base() -> u64 {
    tests::BASE.with(|base| *base)
}

/// Kernel address of physical memory.
#[inline]
pub fn direct<T>(physical: u64) -> *mut T {
    base().wrapping_add(physical) as *mut T
}

/// Reads the aligned word at a physical address.
#[inline]
pub fn read_word(physical: u64) -> u64 {
    // SAFETY: physical addresses in the kernel come from page tables, the pool and the boot
    // information, all within the machine's memory; user programs may race, with what they wrote.
    unsafe { direct::<u64>(physical).read_volatile() }
}

/// Writes the aligned word at a physical address.
#[inline]
pub fn write_word(physical: u64, value: u64) {
    // SAFETY: as in `read_word`. What is written there belongs to the caller: a page table, or
    // user memory that the user made accessible.
    unsafe { direct::<u64>(physical).write_volatile(value) };
}

/// Copies `words` words between physical addresses; both runs lie within a page.
#[inline]
pub fn copy_words(from: u64, to: u64, words: u64) {
    // SAFETY: as in `write_word`. `rep movsq` copes with overlap, as a copy in ascending order.
    unsafe {
        core::arch::asm!("rep movsq", inout("rsi") direct::<u64>(from) => _,
            inout("rdi") direct::<u64>(to) => _, inout("rcx") words => _,
            options(nostack, preserves_flags));
    }
}

/// Zeroes a page.
#[inline]
pub fn clear_page(physical: u64) {
    // SAFETY: as in `write_word`; the page is one of the kernel's pool.
    unsafe {
        core::arch::asm!("rep stosq", inout("rdi") direct::<u64>(physical) => _,
            inout("rcx") 512u64 => _, in("rax") 0u64, options(nostack, preserves_flags));
    }
}

/// Copies bytes out of physical memory; the run lies within a page.
#[inline]
pub fn copy_from(physical: u64, to: &mut [u8]) {
    // SAFETY: as in `read_word`; `to` is exclusive and never user memory.
    unsafe { direct::<u8>(physical).copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
}

/// Copies bytes into physical memory; the run lies within a page.
#[inline]
pub fn copy_to(from: &[u8], physical: u64) {
    // SAFETY: as in `write_word`; `from` is never user memory.
    unsafe { direct::<u8>(physical).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
}

#[cfg(test)]
pub(crate) mod tests {
    /// Bytes of pretended physical memory, one run for each test thread.
    pub(crate) const SIZE: usize = 8 << 20;

    thread_local! {
        pub(super) static BASE: u64 = {
            let layout = std::alloc::Layout::from_size_align(SIZE, 4096).unwrap();
            // SAFETY: the layout has a size. Leaked on purpose.
            unsafe { std::alloc::alloc_zeroed(layout) as u64 }
        };
    }
}
