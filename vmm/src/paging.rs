//! Four-level page tables: the host builds the first ones, and walks the guest's to read its
//! memory by virtual address.

use bitflags::bitflags;
use fluke_abi::layout::PAGE_SIZE;

use crate::error::Error;
use crate::memory::{Frames, Memory};

/// Bytes in a large page.
pub const LARGE_PAGE: u64 = 2 << 20;

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

bitflags! {
    /// Bits of a page-table entry (SDM vol. 3, 5.5.4).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Entry: u64 {
        /// The entry is in use.
        const PRESENT = 1;
        /// Writing is allowed.
        const WRITE = 1 << 1;
        /// User mode may use it, if all tables on the way say so too.
        const USER = 1 << 2;
        /// Accessed. Set from the start, so that the CPU need not write the tables.
        const ACCESSED = 1 << 5;
        /// Written to. Set from the start in writable pages.
        const DIRTY = 1 << 6;
        /// A 2 MiB or 1 GiB page.
        const LARGE = 1 << 7;
        /// The translation outlives a change of the page table.
        const GLOBAL = 1 << 8;
        /// Not executable.
        const NO_EXECUTE = 1 << 63;
    }
}

impl Entry {
    /// Kernel data: readable, writable.
    pub const DATA: Self = Self::PRESENT
        .union(Self::WRITE)
        .union(Self::ACCESSED)
        .union(Self::DIRTY)
        .union(Self::GLOBAL)
        .union(Self::NO_EXECUTE);
    /// Kernel constants: readable.
    pub const CONSTANT: Self = Self::PRESENT
        .union(Self::ACCESSED)
        .union(Self::GLOBAL)
        .union(Self::NO_EXECUTE);
    /// Kernel code: readable, executable.
    pub const CODE: Self = Self::PRESENT.union(Self::ACCESSED).union(Self::GLOBAL);
    /// A table below the top.
    const TABLE: Self = Self::PRESENT.union(Self::WRITE).union(Self::ACCESSED);
}

/// Page tables under construction.
pub struct PageTables<'a> {
    memory: &'a Memory,
    frames: &'a mut Frames,
    root: u64,
}

impl<'a> PageTables<'a> {
    /// Empty page tables; frames for tables come from `frames`.
    ///
    /// # Errors
    /// If there is none.
    pub fn new(memory: &'a Memory, frames: &'a mut Frames) -> Result<Self, Error> {
        let root = frames.take(PAGE_SIZE).ok_or_else(no_room)?;
        Ok(Self {
            memory,
            frames,
            root,
        })
    }

    /// Physical address of the top-level table.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Makes an empty second-level table for the address in the top-level one, so that the kernel
    /// may later add to an area that all spaces share.
    ///
    /// # Errors
    /// If there is no room for a table.
    pub fn reserve(&mut self, va: u64) -> Result<(), Error> {
        self.below(self.root, index(va, 3), Entry::empty())
            .map(drop)
    }

    /// Maps `size` bytes of whole pages in 4 KiB pages.
    ///
    /// # Errors
    /// If there is no room for a table, or a page is mapped already.
    pub fn map(&mut self, va: u64, pa: u64, size: u64, flags: Entry) -> Result<(), Error> {
        (0..size)
            .step_by(PAGE_SIZE as usize)
            .try_for_each(|offset| self.map_one(va + offset, pa + offset, 0, flags))
    }

    /// Maps one 2 MiB page.
    ///
    /// # Errors
    /// As [`PageTables::map`].
    pub fn map_large(&mut self, va: u64, pa: u64, flags: Entry) -> Result<(), Error> {
        self.map_one(va, pa, 1, flags | Entry::LARGE)
    }

    fn map_one(&mut self, va: u64, pa: u64, level: u32, flags: Entry) -> Result<(), Error> {
        let mut table = self.root;
        for upper in (level + 1..4).rev() {
            table = self.below(table, index(va, upper), flags & Entry::USER)?;
        }
        let slot = table + index(va, level) * 8;
        if self.memory.get::<u64>(slot)? != 0 {
            return Err(Error::Memory(format!("{va:#x} is mapped twice")));
        }
        self.memory.put(slot, &(pa | flags.bits()))
    }

    /// Shares what another top-level table has where a virtual address lies, up to 512 GiB around it.
    ///
    /// # Errors
    /// If the tables are not in memory.
    pub fn share(&mut self, other: u64, va: u64) -> Result<(), Error> {
        let offset = index(va, 3) * 8;
        let entry = self.memory.get::<u64>(other + offset)?;
        self.memory.put(self.root + offset, &entry)
    }

    /// The table below entry `index` of `table`; a new one if there is none. `user`: [`Entry::USER`] if user
    /// mode is to get through.
    fn below(&mut self, table: u64, index: u64, user: Entry) -> Result<u64, Error> {
        let slot = table + index * 8;
        let entry = match self.memory.get::<u64>(slot)? {
            0 => self.frames.take(PAGE_SIZE).ok_or_else(no_room)? | Entry::TABLE.bits(),
            entry => entry,
        };
        self.memory.put(slot, &(entry | user.bits()))?;
        Ok(entry & ADDRESS)
    }
}

fn no_room() -> Error {
    Error::Config("the memory is too small for page tables; give more with --mem".into())
}

fn index(va: u64, level: u32) -> u64 {
    va >> (12 + 9 * level) & 0x1ff
}

/// Physical memory of a machine, wherever it is kept.
pub trait Physical {
    /// Copies bytes out from a physical address.
    ///
    /// # Errors
    /// If there are not so many.
    fn read(&self, pa: u64, data: &mut [u8]) -> Result<(), Error>;
}

impl Physical for Memory {
    fn read(&self, pa: u64, data: &mut [u8]) -> Result<(), Error> {
        self.read(pa, data)
    }
}

/// Where a virtual address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Physical address.
    pub pa: u64,
    /// Bits of the last entry.
    pub flags: Entry,
    /// Bytes from `pa` to the end of the page.
    pub left: u64,
}

/// Walks the page tables at `root`.
pub fn translate(memory: &dyn Physical, root: u64, va: u64) -> Option<Translation> {
    // Canonical addresses only: the walk itself would ignore the upper bits.
    if (va as i64) << 16 >> 16 != va as i64 {
        return None;
    }
    let mut table = root & ADDRESS;
    for level in (0..4).rev() {
        let mut entry = [0; 8];
        memory.read(table + index(va, level) * 8, &mut entry).ok()?;
        let entry = u64::from_le_bytes(entry);
        let flags = Entry::from_bits_truncate(entry);
        if !flags.contains(Entry::PRESENT) {
            return None;
        }
        if level == 0 || (level < 3 && flags.contains(Entry::LARGE)) {
            let size = PAGE_SIZE << (9 * level);
            let offset = va & (size - 1);
            return Some(Translation {
                pa: (entry & ADDRESS & !(size - 1)) + offset,
                flags,
                left: size - offset,
            });
        }
        table = entry & ADDRESS;
    }
    None
}

/// Reads up to `size` bytes at a virtual address, page by page; fewer where the mapping ends.
pub fn read_virtual(memory: &dyn Physical, root: u64, va: u64, size: usize) -> Vec<u8> {
    let mut data = Vec::with_capacity(size);
    while data.len() < size {
        let Some(at) = translate(memory, root, va.wrapping_add(data.len() as u64)) else {
            break;
        };
        let from = data.len();
        data.resize(size.min(from + at.left as usize), 0);
        if memory.read(at.pa, &mut data[from..]).is_err() {
            data.truncate(from);
            break;
        }
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;
    use fluke_abi::layout::{DIRECT_MAP, KERNEL_IMAGE};

    fn tables(memory: &Memory, build: impl FnOnce(&mut PageTables<'_>)) -> u64 {
        let mut frames = Frames::new(&[(0x1000, 0x40000)]);
        let mut tables = PageTables::new(memory, &mut frames).unwrap();
        build(&mut tables);
        tables.root()
    }

    #[test]
    fn pages_of_both_sizes_translate() {
        let memory = Memory::new(8 << 20).unwrap();
        let root = tables(&memory, |t| {
            t.map_large(DIRECT_MAP + LARGE_PAGE, LARGE_PAGE, Entry::DATA)
                .unwrap();
            t.map(KERNEL_IMAGE, 0x50_0000, 0x3000, Entry::CODE).unwrap();
        });
        let large = translate(&memory, root, DIRECT_MAP + LARGE_PAGE + 0x1234).unwrap();
        assert_eq!(
            (large.pa, large.left),
            (LARGE_PAGE + 0x1234, LARGE_PAGE - 0x1234)
        );
        assert!(large.flags.contains(Entry::NO_EXECUTE | Entry::WRITE));
        let small = translate(&memory, root, KERNEL_IMAGE + 0x2fff).unwrap();
        assert_eq!((small.pa, small.left), (0x50_2fff, 1));
        assert!(!small.flags.intersects(Entry::NO_EXECUTE | Entry::WRITE));
        for unmapped in [
            0,
            DIRECT_MAP,
            KERNEL_IMAGE + 0x3000,
            0x8000_0000_0000,
            u64::MAX,
        ] {
            assert_eq!(translate(&memory, root, unmapped), None, "{unmapped:#x}");
        }
    }

    #[test]
    fn nothing_is_mapped_twice() {
        let memory = Memory::new(1 << 20).unwrap();
        tables(&memory, |t| {
            t.map(0x1000, 0, 0x1000, Entry::DATA).unwrap();
            assert!(t.map(0, 0, 0x2000, Entry::DATA).is_err());
        });
    }

    #[test]
    fn reads_cross_pages_that_are_apart_and_stop_at_holes() {
        let memory = Memory::new(1 << 20).unwrap();
        let root = tables(&memory, |t| {
            t.map(0x1000, 0x90000, 0x1000, Entry::DATA).unwrap();
            t.map(0x2000, 0x80000, 0x1000, Entry::DATA).unwrap();
        });
        memory.write(0x90ffe, b"ab").unwrap();
        memory.write(0x80000, b"cd").unwrap();
        assert_eq!(read_virtual(&memory, root, 0x1ffe, 4), b"abcd");
        assert_eq!(read_virtual(&memory, root, 0x2ffe, 100).len(), 2);
        assert_eq!(read_virtual(&memory, root, 0x5000, 1), b"");
    }
}
