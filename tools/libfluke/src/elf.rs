//! ELF programs: just enough to load one.

use fluke_abi::layout::{PAGE_SIZE, PROGRAM_BASE};
use fluke_abi::state::Prot;

use crate::startup::PROGRAM_END;

/// A segment to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Offset of the contents in the file.
    pub offset: u64,
    /// Virtual address.
    pub address: u64,
    /// Bytes in the file.
    pub file_size: u64,
    /// Bytes in memory.
    pub memory_size: u64,
    /// Permissions.
    pub prot: Prot,
}

impl Segment {
    /// Address of the first page.
    pub const fn page(&self) -> u64 {
        self.address & !(PAGE_SIZE - 1)
    }

    /// End of the last page.
    pub const fn page_end(&self) -> u64 {
        (self.address + self.memory_size).next_multiple_of(PAGE_SIZE)
    }
}

/// A program.
#[derive(Clone, Copy, Debug)]
pub struct Program<'a> {
    image: &'a [u8],
    /// First instruction.
    pub entry: u64,
    table: u64,
    entry_size: u64,
    count: u64,
}

fn bytes<const N: usize>(image: &[u8], offset: u64) -> Option<[u8; N]> {
    let start = usize::try_from(offset).ok()?;
    image.get(start..start.checked_add(N)?)?.try_into().ok()
}

fn half(image: &[u8], offset: u64) -> Option<u64> {
    bytes(image, offset).map(u16::from_le_bytes).map(u64::from)
}

fn word(image: &[u8], offset: u64) -> Option<u64> {
    bytes(image, offset).map(u32::from_le_bytes).map(u64::from)
}

fn long(image: &[u8], offset: u64) -> Option<u64> {
    bytes(image, offset).map(u64::from_le_bytes)
}

impl<'a> Program<'a> {
    /// Reads the headers of an executable for x86-64, and checks that its segments lie where
    /// programs may be, in order, on pages of their own, and none both writable and executable.
    pub fn parse(image: &'a [u8]) -> Result<Self, &'static str> {
        const EXECUTABLE: u64 = 2;
        const X86_64: u64 = 62;
        if !image.starts_with(b"\x7fELF\x02\x01") {
            return Err("not a 64-bit little-endian ELF file");
        }
        let read = |offset, read: fn(&[u8], u64) -> Option<u64>| {
            read(image, offset).ok_or("the ELF header is cut off")
        };
        if read(16, half)? != EXECUTABLE || read(18, half)? != X86_64 {
            return Err("not an executable for x86-64");
        }
        let program = Self {
            image,
            entry: read(24, long)?,
            table: read(32, long)?,
            entry_size: read(54, half)?,
            count: read(56, half)?,
        };
        let mut end = PROGRAM_BASE;
        for segment in program.segments() {
            let segment = segment?;
            if segment.page() < end {
                return Err("segments overlap, or lie below the program base");
            }
            end = segment.page_end();
        }
        if end == PROGRAM_BASE {
            return Err("the program has no segments");
        }
        Ok(program)
    }

    /// The segments to load.
    pub fn segments(&self) -> impl Iterator<Item = Result<Segment, &'static str>> + '_ {
        (0..self.count).filter_map(|i| self.segment(i).transpose())
    }

    fn segment(&self, index: u64) -> Result<Option<Segment>, &'static str> {
        const LOAD: u64 = 1;
        let at = self.table.wrapping_add(index * self.entry_size);
        let read = |offset, read: fn(&[u8], u64) -> Option<u64>| {
            read(self.image, at.wrapping_add(offset)).ok_or("the program headers are cut off")
        };
        let flags = read(4, word)?;
        let mut prot = Prot::empty();
        for (bit, meaning) in [(1, Prot::EXECUTE), (2, Prot::WRITE), (4, Prot::READ)] {
            prot.set(meaning, flags & bit != 0);
        }
        let segment = Segment {
            offset: read(8, long)?,
            address: read(16, long)?,
            file_size: read(32, long)?,
            memory_size: read(40, long)?,
            prot,
        };
        if read(0, word)? != LOAD || segment.memory_size == 0 {
            return Ok(None);
        }
        if prot.contains(Prot::WRITE | Prot::EXECUTE) {
            return Err("a segment is both writable and executable");
        }
        let in_file = segment.offset.checked_add(segment.file_size);
        if segment.file_size > segment.memory_size
            || in_file.is_none_or(|end| end > self.image.len() as u64)
        {
            return Err("a segment is cut off");
        }
        match segment.address.checked_add(segment.memory_size) {
            Some(end) if end <= PROGRAM_END => Ok(Some(segment)),
            _ => Err("a segment lies where programs may not be"),
        }
    }

    /// A segment's contents.
    pub fn contents(&self, segment: &Segment) -> &'a [u8] {
        let start = segment.offset as usize;
        &self.image[start..start + segment.file_size as usize]
    }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::*;

    /// An image with one segment for each `(flags, address, memory size)`, without contents.
    fn image(segments: &[(u32, u64, u64)]) -> Vec<u8> {
        let mut image = vec![0; 64 + 56 * segments.len()];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        image[16] = 2;
        image[18] = 62;
        image[24..32].copy_from_slice(&PROGRAM_BASE.to_le_bytes());
        image[32] = 64;
        image[54] = 56;
        image[56] = segments.len() as u8;
        for (header, &(flags, address, size)) in image[64..].chunks_exact_mut(56).zip(segments) {
            header[0] = 1;
            header[4..8].copy_from_slice(&flags.to_le_bytes());
            header[16..24].copy_from_slice(&address.to_le_bytes());
            header[40..48].copy_from_slice(&size.to_le_bytes());
        }
        image
    }

    #[test]
    fn segments_come_with_their_permissions() {
        let image = image(&[(5, PROGRAM_BASE, 10), (6, PROGRAM_BASE + 0x1000, 0x1001)]);
        let program = Program::parse(&image).unwrap();
        let segments: Vec<_> = program.segments().map(Result::unwrap).collect();
        assert_eq!(segments[0].prot, Prot::READ | Prot::EXECUTE);
        assert_eq!(segments[1].prot, Prot::READ | Prot::WRITE);
        assert_eq!(segments[1].page_end(), PROGRAM_BASE + 0x3000);
    }

    #[test]
    fn bad_programs_are_refused() {
        let refused = |segments| Program::parse(&image(segments)).is_err();
        assert!(refused(&[]));
        assert!(refused(&[(7, PROGRAM_BASE, 10)]), "writable and executable");
        assert!(
            refused(&[(4, PROGRAM_BASE, 10), (6, PROGRAM_BASE + 0x800, 10)]),
            "one page"
        );
        assert!(refused(&[(4, 0x1000, 10)]), "below the program base");
        assert!(refused(&[(4, PROGRAM_BASE, u64::MAX)]), "wraps");
        assert!(refused(&[(4, u64::MAX - 5, 10)]), "wraps");
    }

    #[test]
    fn every_truncation_is_refused() {
        let image = image(&[(5, PROGRAM_BASE, 10), (6, PROGRAM_BASE + 0x1000, 0x1001)]);
        // The last field of a program header, its alignment, is not read.
        for length in 0..image.len() - 8 {
            assert!(Program::parse(&image[..length]).is_err(), "{length} bytes");
        }
    }
}
