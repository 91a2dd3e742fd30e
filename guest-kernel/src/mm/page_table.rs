//! Four-level page tables (SDM vol. 3, 4.5), with 4 KiB pages in the user half.

use core::ops::Range;

use fluke_abi::layout::{PAGE_SIZE, VM_MAX};
use fluke_abi::state::Prot;

use super::FramePool;
use crate::arch::memory::{read_word, write_word};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const ENTRIES: u64 = 512;
/// Entries of the top table that belong to the space; the others are the kernel's.
const USER_ENTRIES: u64 = ENTRIES / 2;

/// Bytes that an entry of a table at `level` covers; level 1 is the lowest.
const fn span(level: u32) -> u64 {
    PAGE_SIZE << (9 * (level - 1))
}

const fn index(address: u64, level: u32) -> u64 {
    address / span(level) % ENTRIES
}

/// Whether a present entry allows an access.
const fn allows(entry: u64, access: Prot) -> bool {
    (entry & WRITABLE != 0 || !access.contains(Prot::WRITE))
        && (entry & NO_EXECUTE == 0 || !access.contains(Prot::EXECUTE))
}

/// A page table with an empty user half; the kernel's half as in `template`.
pub fn create(pool: &mut FramePool, template: u64) -> Option<u64> {
    let root = pool.allocate()?;
    // Only these three are in use: direct map, stacks, image (fluke_abi::layout).
    for at in [256, 510, 511] {
        write_word(root + at * 8, read_word(template + at * 8));
    }
    Some(root)
}

/// Where a top table keeps the lowest tables that walks have found, as CPUs do in their paging-structure caches (SDM
/// vol. 3, 4.10.3): in entries of the kernel's half that are not in use. CPUs take no notice of them, because bit 0
/// is never set.
const CACHE: u64 = 320 * 8;
/// It has room for 2 to that of them, each with the end of the addresses that it covers before it.
const CACHED: u32 = 6;

/// Where the lowest table that covers a user address is kept, if it is. Programs like round addresses, so the place is
/// a hash (multiplicative, by the golden ratio).
const fn cached(root: u64, address: u64) -> u64 {
    let hash = ((address / span(2)) as u32).wrapping_mul(0x9e37_79b9) >> (u32::BITS - CACHED);
    root + CACHE + hash as u64 * 16
}

/// The lowest table that covers a user address, if a walk has found it. It stays as long as the space.
#[inline(always)]
fn remembered(root: u64, address: u64) -> Option<u64> {
    let slot = cached(root, address);
    let below = read_word(slot).wrapping_sub(address).wrapping_sub(1);
    if below < span(2) {
        Some(read_word(slot + 8))
    } else {
        None
    }
}

/// Remembers it.
fn remember(root: u64, address: u64, table: u64) {
    let slot = cached(root, address);
    write_word(slot, (address / span(2) + 1) * span(2));
    write_word(slot + 8, table);
}

/// Physical address of a byte in the user half, if it is mapped with at least the permissions `access`.
#[inline(always)]
pub fn lookup(root: u64, address: u64, access: Prot) -> Option<u64> {
    match remembered(root, address) {
        Some(table) => read_entry(table, address, access),
        None => lookup_far(root, address, access),
    }
}

#[inline(never)]
fn lookup_far(root: u64, address: u64, access: Prot) -> Option<u64> {
    if address >= VM_MAX {
        return None;
    }
    let table = walk(root, address)?;
    remember(root, address, table);
    read_entry(table, address, access)
}

/// As [`lookup`], for an address in the kernel's half.
pub fn lookup_in_kernel(root: u64, address: u64, access: Prot) -> Option<u64> {
    read_entry(walk(root, address)?, address, access)
}

/// The lowest table that covers an address.
fn walk(root: u64, address: u64) -> Option<u64> {
    let mut table = root;
    for level in [4, 3, 2] {
        let entry = read_word(table + index(address, level) * 8);
        if entry & PRESENT == 0 {
            return None;
        }
        table = entry & ADDRESS;
    }
    Some(table)
}

/// What a lowest table says of an address.
#[inline]
fn read_entry(table: u64, address: u64, access: Prot) -> Option<u64> {
    let entry = read_word(table + index(address, 1) * 8);
    if entry & PRESENT != 0 && allows(entry, access) {
        Some((entry & ADDRESS) | (address % PAGE_SIZE))
    } else {
        None
    }
}

/// The lowest table that covers a user address. Fails if the pool has no page for a table.
#[inline(never)]
fn make_table(pool: &mut FramePool, root: u64, address: u64) -> Option<u64> {
    let mut table = root;
    for level in [4, 3, 2] {
        let at = table + index(address, level) * 8;
        let mut entry = read_word(at);
        if entry & PRESENT == 0 {
            entry = pool.allocate()? | PRESENT | WRITABLE | USER;
            write_word(at, entry);
        }
        table = entry & ADDRESS;
    }
    remember(root, address, table);
    Some(table)
}

/// Maps pages that one lowest-level table covers to consecutive physical pages from `page` on.
/// Fails if the pool has no page for a table.
pub fn map(
    pool: &mut FramePool,
    root: u64,
    addresses: Range<u64>,
    page: u64,
    prot: Prot,
) -> Option<()> {
    let address = addresses.start;
    let table = match remembered(root, address) {
        Some(table) => table,
        None => make_table(pool, root, address)?,
    };
    let writable = if prot.contains(Prot::WRITE) {
        WRITABLE
    } else {
        0
    };
    let no_execute = if prot.contains(Prot::EXECUTE) {
        0
    } else {
        NO_EXECUTE
    };
    let mut entry = page | PRESENT | USER | writable | no_execute;
    let first = table + index(address, 1) * 8;
    let pages = (addresses.end - address) / PAGE_SIZE;
    for at in (0..pages).map(|n| first + n * 8) {
        write_word(at, entry);
        entry += PAGE_SIZE;
    }
    Some(())
}

/// Unmaps all pages from `start` to `end`; says whether there were any.
pub fn unmap(root: u64, start: u64, end: u64) -> bool {
    unmap_level(root, 4, start, end)
}

fn unmap_level(table: u64, level: u32, start: u64, end: u64) -> bool {
    let mut any = false;
    let mut address = start;
    while address < end {
        let next = (address / span(level) + 1) * span(level);
        let at = table + index(address, level) * 8;
        let entry = read_word(at);
        if entry & PRESENT != 0 {
            if level == 1 {
                write_word(at, 0);
                any = true;
            } else {
                any |= unmap_level(entry & ADDRESS, level - 1, address, end.min(next));
            }
        }
        address = next;
    }
    any
}

/// Frees all tables of the user half. The top table stays.
pub fn clear(pool: &mut FramePool, root: u64) {
    clear_level(pool, root, 4, USER_ENTRIES);
}

fn clear_level(pool: &mut FramePool, table: u64, level: u32, entries: u64) {
    for at in (0..entries).map(|i| table + i * 8) {
        let entry = read_word(at);
        if entry & PRESENT != 0 {
            if level > 2 {
                clear_level(pool, entry & ADDRESS, level - 1, ENTRIES);
            }
            pool.free(entry & ADDRESS);
            write_word(at, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_those_given_and_unmapped_pages_are_gone() {
        let mut pool = FramePool::new(PAGE_SIZE, 64 * PAGE_SIZE);
        let template = pool.allocate().unwrap();
        let root = create(&mut pool, template).unwrap();
        let tables = pool.live();
        let address = 0x7fff_0000_3000;
        map(
            &mut pool,
            root,
            address..address + PAGE_SIZE,
            0x5000,
            Prot::READ | Prot::WRITE,
        )
        .unwrap();
        assert_eq!(lookup(root, address + 5, Prot::WRITE), Some(0x5005));
        assert_eq!(lookup(root, address, Prot::EXECUTE), None);
        assert_eq!(lookup(root, address + PAGE_SIZE, Prot::READ), None);
        assert!(unmap(root, 0, 1 << 47));
        assert!(!unmap(root, 0, 1 << 47));
        assert_eq!(lookup(root, address, Prot::READ), None);
        for nowhere in [0, 1 << 21, address - (1 << 21), VM_MAX, 1 << 47] {
            assert_eq!(lookup(root, nowhere, Prot::READ), None);
        }
        clear(&mut pool, root);
        assert_eq!(pool.live(), tables);
    }
}
