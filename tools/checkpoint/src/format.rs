//! What a checkpoint file holds.
//!
//! ```text
//! page 0       Header
//! page 1       Catalogue, in postcard's encoding, padded to a whole page
//! ...          every page of every source, then the pages of every Run, in the catalogue's order
//! ```
//!
//! Memory comes in *parts*: those that the program was given for itself, its heap, and *sources*, which it
//! can only read and execute (its image, its files). A place in memory is a part and an offset; no address
//! of the checkpointer's own is in the file, since the parts lie elsewhere when it is read.

use alloc::vec::Vec;
use core::fmt;

use fluke_abi::ABI_VERSION;
use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::object::{OBJECT_SIZE, Type};
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::kinds::kind_of;

/// First bytes of every checkpoint file.
pub const MAGIC: [u8; 8] = *b"FLUKECKP";
/// Version of the format.
pub const VERSION: u32 = 1;

/// The checksum of everything.
const CRC: crc::Crc<u64> = crc::Crc::<u64>::new(&crc::CRC_64_XZ);

/// A checksum that grows with what is written.
pub struct Checksum(crc::Digest<'static, u64>);

impl Default for Checksum {
    fn default() -> Self {
        static ONE: crc::Crc<u64> = CRC;
        Self(ONE.digest())
    }
}

impl Checksum {
    /// Takes more bytes in.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum of all bytes so far.
    pub fn value(self) -> u64 {
        self.0.finalize()
    }
}

/// First page of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`].
    pub version: u32,
    /// [`ABI_VERSION`].
    pub abi_version: u32,
    /// Bytes of the whole file.
    pub size: u64,
    /// Bytes of the catalogue, without padding.
    pub catalogue_size: u64,
    /// Nanoseconds since boot when it was taken: where the clock goes on.
    pub clock: u64,
    /// Checksum of everything behind this page.
    pub body: u64,
    /// Checksum of the fields above.
    pub checksum: u64,
}

impl Header {
    /// The header of a file with a body of that checksum.
    pub fn new(size: u64, catalogue_size: u64, clock: u64, body: u64) -> Self {
        let mut header = Self {
            magic: MAGIC,
            version: VERSION,
            abi_version: ABI_VERSION,
            size,
            catalogue_size,
            clock,
            body,
            checksum: 0,
        };
        header.checksum = header.own_checksum();
        header
    }

    /// The page that it is.
    pub fn page(&self) -> [u8; PAGE_SIZE as usize] {
        let mut page = [0; PAGE_SIZE as usize];
        page[..size_of::<Self>()].copy_from_slice(self.as_bytes());
        page
    }

    fn own_checksum(&self) -> u64 {
        let bytes = self.as_bytes();
        CRC.checksum(&bytes[..bytes.len() - size_of::<u64>()])
    }
}

/// A part of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Part {
    /// Memory that the program was given, by number.
    Given(u32),
    /// Its heap.
    Heap,
    /// What it can only read and execute, by number.
    Source(u32),
}

/// A place in the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Where.
    pub part: Part,
    /// Offset in it, bytes.
    pub offset: u64,
}

/// A range of the program's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Its memory; whole pages.
    pub from: Place,
    /// Bytes; whole pages.
    pub size: u64,
    /// [`fluke_abi::state::Prot`] bits.
    pub prot: u64,
    /// First address in the program's space.
    pub at: u64,
}

/// A run of bytes that the heap has memory for; the rest gets it when it is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Offset in the heap; whole pages.
    pub start: u64,
    /// Bytes; whole pages.
    pub size: u64,
}

/// Pages whose contents are in the file; all others are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The first.
    pub from: Place,
    /// How many.
    pub pages: u64,
}

/// What an object refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Link {
    /// Nothing; also what was outside, and had no name there.
    Null,
    /// Another object in the file, by number.
    Object(u32),
    /// Something outside, which the checkpointer has a new one of.
    External(External),
}

/// What a program knows of the world outside its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum External {
    /// Its own space, which its parent made.
    Space,
    /// Its parent's port.
    Parent,
    /// The console's port.
    Console,
}

impl External {
    /// All that there are.
    pub const ALL: [Self; 3] = [Self::Space, Self::Parent, Self::Console];
}

/// An object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pickle {
    /// Number of its [`Type`].
    pub kind: u8,
    /// Its memory.
    pub place: Place,
    /// Its state structure, as `get_state` stores it.
    pub state: Vec<u8>,
    /// Its links, in the order of [`crate::kinds::Kind::links`].
    pub links: Vec<Link>,
}

/// Everything but the contents of memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Catalogue {
    /// Bytes of each part that the program was given; whole pages.
    pub given: Vec<u64>,
    /// Bytes of each source; whole pages.
    pub sources: Vec<u64>,
    /// Bytes of addresses of the heap; whole pages.
    pub heap: u64,
    /// Bytes of memory that the heap may still get.
    pub heap_left: u64,
    /// What the heap has memory for.
    pub chunks: Vec<Chunk>,
    /// The program's own space.
    pub views: Vec<View>,
    /// All objects in the memory.
    pub objects: Vec<Pickle>,
    /// Contents of the memory that is no source.
    pub runs: Vec<Run>,
    /// The last request for a checkpoint that has been fulfilled.
    pub requests: u64,
}

/// Why a file is no checkpoint that can be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It does not begin like one.
    Foreign,
    /// It has another version of the format, this one.
    Version(u32),
    /// It was made by programs for another version of the kernel's interface, this one.
    Abi(u32),
    /// It has another size than it says: what there is, and what there should be.
    Size(u64, u64),
    /// What it says is not what was written.
    Damaged,
    /// Its contents make no sense, though they are what was written.
    Nonsense(&'static str),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => write!(f, "not a checkpoint"),
            Self::Version(version) => {
                write!(
                    f,
                    "a checkpoint of format {version}; this flukevm reads format {VERSION}"
                )
            }
            Self::Abi(version) => write!(
                f,
                "a checkpoint of kernel interface {version}; this flukevm has {ABI_VERSION}"
            ),
            Self::Size(is, should) if is < should => {
                write!(f, "a checkpoint cut short: {is} of {should} bytes")
            }
            Self::Size(is, should) => {
                write!(
                    f,
                    "a checkpoint of {should} bytes with {} more behind it",
                    is - should
                )
            }
            Self::Damaged => write!(f, "a damaged checkpoint: its checksum is wrong"),
            Self::Nonsense(what) => write!(f, "a checkpoint that makes no sense: {what}"),
        }
    }
}

/// A checked checkpoint file.
#[derive(Debug)]
pub struct Checkpoint<'a> {
    /// Nanoseconds since boot when it was taken.
    pub clock: u64,
    /// What it holds.
    pub catalogue: Catalogue,
    /// The pages behind the catalogue.
    pages: &'a [u8],
}

/// Whole pages of so many bytes.
pub const fn pages(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_SIZE)
}

impl<'a> Checkpoint<'a> {
    /// Reads a file, and checks all that restoring it relies on.
    pub fn read(file: &'a [u8]) -> Result<Self, Refusal> {
        if !file.starts_with(&MAGIC) {
            return Err(Refusal::Foreign);
        }
        let size = file.len() as u64;
        let (header, _) =
            Header::read_from_prefix(file).map_err(|_| Refusal::Size(size, PAGE_SIZE))?;
        // Before the checksum, which later versions may compute in another way.
        if header.version != VERSION {
            return Err(Refusal::Version(header.version));
        }
        if header.checksum != header.own_checksum() {
            return Err(Refusal::Damaged);
        }
        if header.abi_version != ABI_VERSION {
            return Err(Refusal::Abi(header.abi_version));
        }
        if header.size != size {
            return Err(Refusal::Size(size, header.size));
        }
        let (first, body) = file
            .split_at_checked(PAGE_SIZE as usize)
            .ok_or(Refusal::Size(size, PAGE_SIZE))?;
        let rest_is_zero = first[size_of::<Header>()..].iter().all(|&byte| byte == 0);
        if !rest_is_zero || CRC.checksum(body) != header.body {
            return Err(Refusal::Damaged);
        }
        let nonsense = Refusal::Nonsense("the catalogue cannot be read");
        let catalogue_size = usize::try_from(header.catalogue_size).map_err(|_| nonsense)?;
        let encoded = body.get(..catalogue_size).ok_or(nonsense)?;
        let catalogue: Catalogue = postcard::from_bytes(encoded).map_err(|_| nonsense)?;
        let at = pages(header.catalogue_size) * PAGE_SIZE;
        let pages = body.get(at as usize..).ok_or(nonsense)?;
        catalogue
            .check(pages.len() as u64)
            .map_err(Refusal::Nonsense)?;
        Ok(Self {
            clock: header.clock,
            catalogue,
            pages,
        })
    }

    /// Contents of a source.
    pub fn source(&self, number: usize) -> &'a [u8] {
        let before: u64 = self.catalogue.sources[..number].iter().sum();
        let size = self.catalogue.sources[number];
        &self.pages[before as usize..(before + size) as usize]
    }

    /// The runs, with their contents.
    pub fn runs(&self) -> impl Iterator<Item = (Run, &'a [u8])> + '_ {
        let mut rest = &self.pages[self.catalogue.sources.iter().sum::<u64>() as usize..];
        self.catalogue.runs.iter().map(move |run| {
            let (contents, behind) = rest.split_at((run.pages * PAGE_SIZE) as usize);
            rest = behind;
            (*run, contents)
        })
    }
}

/// Most bytes of addresses that anything may take: far beyond memory, and sums of it do not overflow.
const SIZE_MAX: u64 = 1 << 46;
/// Most elements of a list.
const COUNT_MAX: usize = 1 << 20;

type Check = Result<(), &'static str>;

fn whole_pages(bytes: u64) -> bool {
    bytes.is_multiple_of(PAGE_SIZE) && bytes <= SIZE_MAX
}

impl Catalogue {
    /// Bytes of a part.
    fn size_of(&self, part: Part) -> Option<u64> {
        match part {
            Part::Given(number) => self.given.get(number as usize).copied(),
            Part::Heap => Some(self.heap),
            Part::Source(number) => self.sources.get(number as usize).copied(),
        }
    }

    /// Whether there is memory behind a range of a part.
    fn has_memory(&self, place: Place, size: u64) -> bool {
        let Some(end) = place.offset.checked_add(size) else {
            return false;
        };
        match place.part {
            Part::Heap => {
                let mut at = place.offset;
                // In order, since they are checked to be.
                for chunk in &self.chunks {
                    if (chunk.start..chunk.start + chunk.size).contains(&at) {
                        at = chunk.start + chunk.size;
                    }
                }
                at >= end
            }
            part => self.size_of(part).is_some_and(|size| end <= size),
        }
    }

    /// Checks what restoring relies on: that all there is fits together, and is of a size that can be.
    fn check(&self, page_bytes: u64) -> Check {
        let lengths = [
            self.given.len(),
            self.sources.len(),
            self.chunks.len(),
            self.views.len(),
            self.objects.len(),
            self.runs.len(),
        ];
        if lengths.into_iter().any(|length| length > COUNT_MAX) {
            return Err("there are too many of something");
        }
        self.check_memory(page_bytes)?;
        self.check_objects()
    }

    fn check_memory(&self, page_bytes: u64) -> Check {
        let mut sizes = self.given.iter().chain(&self.sources).chain([&self.heap]);
        if !sizes.all(|size| whole_pages(*size)) {
            return Err("a part of memory is no whole number of pages");
        }
        if self.given.first() != Some(&PAGE_SIZE) {
            return Err("there is no startup block");
        }
        let mut end = 0;
        for Chunk { start, size } in &self.chunks {
            if !whole_pages(*start) || !whole_pages(*size) || *size == 0 || *start < end {
                return Err("the heap's memory overlaps, or is out of order");
            }
            end = start + size;
        }
        if end > self.heap {
            return Err("the heap has memory behind its end");
        }
        for view in &self.views {
            let size = self.size_of(view.from.part);
            let end = view.from.offset.checked_add(view.size);
            let fits = end.zip(size).is_some_and(|(end, size)| end <= size);
            if !fits || !whole_pages(view.from.offset) || !whole_pages(view.size) {
                return Err("a range of addresses has no memory");
            }
        }
        let add = |bytes: u64, more: u64| {
            bytes
                .checked_add(more)
                .filter(|bytes| *bytes <= page_bytes)
                .ok_or("there are more contents than pages")
        };
        let mut bytes = self
            .sources
            .iter()
            .try_fold(0, |sum, size| add(sum, *size))?;
        for run in &self.runs {
            let size = run
                .pages
                .checked_mul(PAGE_SIZE)
                .filter(|size| whole_pages(*size));
            let size = size.ok_or("there are more contents than pages")?;
            let writable = !matches!(run.from.part, Part::Source(_));
            if !writable || !whole_pages(run.from.offset) || !self.has_memory(run.from, size) {
                return Err("there are contents without memory");
            }
            bytes = add(bytes, size)?;
        }
        if bytes != page_bytes {
            return Err("there are more pages than contents");
        }
        Ok(())
    }

    fn check_objects(&self) -> Check {
        for object in &self.objects {
            let kind = Type::from_number(object.kind.into()).and_then(kind_of);
            let kind = kind.ok_or("an object has no type")?;
            let aligned = object.place.offset.is_multiple_of(OBJECT_SIZE);
            let writable = !matches!(object.place.part, Part::Source(_));
            if !aligned || !writable || !self.has_memory(object.place, OBJECT_SIZE) {
                return Err("an object has no memory");
            }
            if object.state.len() != kind.state || object.links.len() != kind.links.len() {
                return Err("an object has the state of another");
            }
            for (link, wanted) in object.links.iter().zip(kind.links) {
                let right = match link {
                    Link::Null | Link::External(_) => true,
                    Link::Object(number) => self
                        .objects
                        .get(*number as usize)
                        .is_some_and(|target| wanted.accepts(target.kind)),
                };
                if !right {
                    return Err("an object links to what it cannot");
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
