//! Guest memory: one memfd mapped from physical address 0, and the frames of it that the host
//! gives out while it lays out the machine.
//!
//! The memfd is zero, and stays so wherever nothing is written: on hosts that emulate kernel code,
//! clearing memory in the guest would be most of the boot. A machine made from a snapshot maps the
//! snapshot's memfd, copy on write.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use fluke_abi::layout::PAGE_SIZE;
use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use rustix::io::Errno;
use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::error::Error;

/// The mapping, with a bit for each page that this process writes to.
type Map = GuestMemoryMmap<AtomicBitmap>;

/// Guest memory, shared by all who hold a clone.
#[derive(Clone, Debug)]
pub struct Memory {
    map: Map,
    region: Arc<GuestRegionMmap<AtomicBitmap>>,
    file: Arc<File>,
    size: u64,
}

impl Memory {
    /// Zeroed memory of `size` bytes, whole pages.
    ///
    /// # Errors
    /// If the host has not so much address space.
    pub fn new(size: u64) -> Result<Self, Error> {
        let file = File::from(
            memfd_create("flukevm", MemfdFlags::CLOEXEC)
                .map_err(|e| Error::host("creating a memfd for guest memory")(e.into()))?,
        );
        file.set_len(size)
            .map_err(Error::host("sizing guest memory"))?;
        Self::map_file(Arc::new(file), size, libc::MAP_SHARED)
    }

    /// Memory with the same contents, which neither sees what is written to the other from now
    /// on: pages are shared until written to. The original must not be written to any more.
    ///
    /// # Errors
    /// As [`Memory::new`].
    pub fn copy_on_write(&self) -> Result<Self, Error> {
        Self::map_file(self.file.clone(), self.size, libc::MAP_PRIVATE)
    }

    fn map_file(file: Arc<File>, size: u64, sharing: i32) -> Result<Self, Error> {
        let fail = |source| Error::Host {
            what: "mapping guest memory; try a smaller --mem",
            source,
        };
        let bytes = size as usize;
        let region = MmapRegionBuilder::new_with_bitmap(bytes, AtomicBitmap::with_len(bytes))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_NORESERVE | sharing)
            .with_file_offset(FileOffset::from_arc(file.clone(), 0))
            .build()
            .map_err(|e| fail(io::Error::other(e)))?;
        let region = GuestRegionMmap::new(region, GuestAddress(0))
            .map(Arc::new)
            .ok_or_else(|| fail(io::ErrorKind::InvalidInput.into()))?;
        let map =
            Map::from_arc_regions(vec![region.clone()]).map_err(|e| fail(io::Error::other(e)))?;
        Ok(Self {
            map,
            region,
            file,
            size,
        })
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The mapping itself, for loaders.
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// Address of the memory in this process.
    pub(crate) fn host_address(&self) -> Result<u64, Error> {
        let address = self.map.get_host_address(GuestAddress(0));
        Ok(address.map_err(|e| Error::Memory(e.to_string()))? as u64)
    }

    /// Whether both are clones of one.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.region, &other.region)
    }

    /// Takes the log of this process's own writes: a bit for each page written to since the last
    /// time.
    pub(crate) fn take_written(&self) -> Vec<u64> {
        self.region.bitmap().get_and_reset()
    }

    /// Adds pages to that log: a bit for each, from an address on.
    pub(crate) fn note_written(&self, start: u64, log: &[u64]) {
        for (n, word) in log.iter().enumerate() {
            for bit in (0..64).filter(|bit| word >> bit & 1 != 0) {
                let page = start + (n as u64 * 64 + bit) * PAGE_SIZE;
                let bitmap = self.region.bitmap();
                bitmap.set_addr_range(page as usize, PAGE_SIZE as usize);
            }
        }
    }

    /// Runs of pages of the memfd that may be other than zero. Without copying on write, that is
    /// all of the memory.
    pub(crate) fn extents(&self) -> Result<Vec<Range<u64>>, Error> {
        extents(&self.file, self.size).map_err(Error::host("looking for guest memory in use"))
    }

    /// Copies pages in from other memory.
    pub(crate) fn copy_from(&self, other: &Self, pages: Range<u64>) -> Result<(), Error> {
        let fail = |e: vm_memory::GuestMemoryError| Error::Memory(e.to_string());
        let (at, bytes) = (GuestAddress(pages.start), pages.end - pages.start);
        let from = other.map.get_slice(at, bytes as usize).map_err(fail)?;
        let to = self.map.get_slice(at, bytes as usize).map_err(fail)?;
        from.copy_to_volatile_slice(to);
        Ok(())
    }

    /// Copies bytes in at a physical address.
    ///
    /// # Errors
    /// If they do not fit there.
    pub fn write(&self, pa: u64, data: &[u8]) -> Result<(), Error> {
        self.map
            .write_slice(data, GuestAddress(pa))
            .map_err(|e| Error::Memory(format!("writing {} bytes at {pa:#x}: {e}", data.len())))
    }

    /// Copies bytes out from a physical address.
    ///
    /// # Errors
    /// If there are not so many.
    pub fn read(&self, pa: u64, data: &mut [u8]) -> Result<(), Error> {
        self.map
            .read_slice(data, GuestAddress(pa))
            .map_err(|e| Error::Memory(format!("reading at {pa:#x}: {e}")))
    }

    /// Writes a structure.
    ///
    /// # Errors
    /// As [`Memory::write`].
    pub fn put<T: IntoBytes + Immutable>(&self, pa: u64, value: &T) -> Result<(), Error> {
        self.write(pa, value.as_bytes())
    }

    /// Reads a structure.
    ///
    /// # Errors
    /// As [`Memory::read`].
    pub fn get<T: FromBytes + IntoBytes>(&self, pa: u64) -> Result<T, Error> {
        let mut value = T::new_zeroed();
        self.read(pa, value.as_mut_bytes())?;
        Ok(value)
    }
}

/// Runs of whole pages of a file of `size` bytes that are not holes, in order.
///
/// # Errors
/// If the host does not tell.
pub(crate) fn extents(file: &File, size: u64) -> io::Result<Vec<Range<u64>>> {
    let mut runs = Vec::new();
    let mut end = 0;
    while end < size {
        let start = match seek(file, SeekFrom::Data(end)) {
            Ok(start) => start & !(PAGE_SIZE - 1),
            // Nothing but a hole.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        end = seek(file, SeekFrom::Hole(start))?.next_multiple_of(PAGE_SIZE);
        runs.push(start..end.min(size));
    }
    Ok(runs)
}

/// Hands out page frames from a few ranges of physical memory, lowest first, never twice.
#[derive(Clone, Debug)]
pub struct Frames {
    /// Free ranges: start and end, physical addresses.
    free: Vec<(u64, u64)>,
}

impl Frames {
    /// Frames from ranges of whole pages, given as start and end. Empty ones are ignored.
    pub fn new(ranges: &[(u64, u64)]) -> Self {
        Self {
            free: ranges.iter().copied().filter(|(s, e)| s < e).collect(),
        }
    }

    /// Takes `size` bytes, rounded up to whole pages, from the first range that has room.
    pub fn take(&mut self, size: u64) -> Option<u64> {
        let size = size.next_multiple_of(PAGE_SIZE);
        let range = self.free.iter_mut().find(|(s, e)| e - s >= size)?;
        let start = range.0;
        range.0 += size;
        Some(start)
    }

    /// Takes all of the largest range: start and bytes.
    pub fn take_largest(&mut self) -> Option<(u64, u64)> {
        let range = self.free.iter_mut().max_by_key(|(s, e)| e - s)?;
        let taken = (range.0, range.1 - range.0);
        range.0 = range.1;
        (taken.1 > 0).then_some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_never_given_twice() {
        let mut frames = Frames::new(&[(0x1000, 0x3000), (0x8000, 0x20000)]);
        assert_eq!(frames.take(1), Some(0x1000));
        assert_eq!(frames.take(0x2000), Some(0x8000));
        assert_eq!(frames.take(0x1000), Some(0x2000));
        assert_eq!(frames.take(0x100000), None);
        assert_eq!(frames.take_largest(), Some((0xa000, 0x16000)));
        assert_eq!(frames.take_largest(), None);
    }

    #[test]
    fn memory_is_zero_and_bounded() {
        let memory = Memory::new(0x4000).unwrap();
        assert_eq!(memory.get::<u64>(0x3ff8).unwrap(), 0);
        memory.put(0x1000, &7u64).unwrap();
        assert_eq!(memory.get::<u64>(0x1000).unwrap(), 7);
        assert!(memory.get::<u64>(0x3ffc).is_err());
        assert!(memory.write(u64::MAX, &[1]).is_err());
    }
}
