//! Guest memory: one memfd mapped from physical address 0, and the frames of it that the host
//! gives out while it lays out the machine.
//!
//! The memfd is zero, and stays so wherever nothing is written: on hosts that emulate kernel code,
//! clearing memory in the guest would be most of the boot.

use std::fs::File;
use std::os::fd::FromRawFd;

use fluke_abi::layout::PAGE_SIZE;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::error::Error;

/// Guest memory, shared by all who hold a clone.
#[derive(Clone, Debug)]
pub struct Memory {
    map: GuestMemoryMmap,
    size: u64,
}

impl Memory {
    /// Zeroed memory of `size` bytes, whole pages.
    ///
    /// # Errors
    /// If the host has not so much address space.
    pub fn new(size: u64) -> Result<Self, Error> {
        let file = memfd().map_err(Error::host("creating a memfd for guest memory"))?;
        file.set_len(size)
            .map_err(Error::host("sizing guest memory"))?;
        let map = GuestMemoryMmap::from_ranges_with_files([(
            GuestAddress(0),
            size as usize,
            Some(FileOffset::new(file, 0)),
        )])
        .map_err(|e| Error::Host {
            what: "mapping guest memory; try a smaller --mem",
            source: std::io::Error::other(e),
        })?;
        Ok(Self { map, size })
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The mapping itself, for loaders.
    pub fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// Address of the memory in this process.
    pub(crate) fn host_address(&self) -> Result<u64, Error> {
        let address = self.map.get_host_address(GuestAddress(0));
        Ok(address.map_err(|e| Error::Memory(e.to_string()))? as u64)
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

fn memfd() -> std::io::Result<File> {
    // SAFETY: the name is a C string; the call makes a descriptor and touches nothing else.
    let fd = unsafe { libc::memfd_create(c"flukevm".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { File::from_raw_fd(fd) })
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
