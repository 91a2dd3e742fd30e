//! Kernel and program images: the embedded ones, and the checks that every image passes before
//! anything of it reaches guest memory.

use std::fs;
use std::ops::Range;
use std::path::Path;

use fluke_abi::boot::{IMAGE_MAGIC, IMAGE_SECTION, ImageInfo, SUPERVISOR_SEGMENT};
use fluke_abi::state::Prot;
use fluke_abi::{ABI_VERSION, layout};
use object::elf::{EM_X86_64, ET_EXEC, FileHeader64, PF_R, PF_W, PF_X, PT_INTERP, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{LittleEndian, Object, ObjectSection};
use zerocopy::FromBytes;

use crate::error::Error;

mod embedded {
    include!(concat!(env!("OUT_DIR"), "/images.rs"));
}

/// Most loadable segments of an image.
const SEGMENTS_MAX: usize = 6;

/// Names of the embedded kernels, which begin with their execution models, and programs.
pub fn embedded() -> (Vec<&'static str>, Vec<&'static str>) {
    let names = |table: &[(&'static str, &[u8])]| table.iter().map(|(name, _)| *name).collect();
    (names(embedded::KERNELS), names(embedded::PROGRAMS))
}

/// The embedded kernel of that name, such as `interrupt`.
///
/// # Errors
/// If this build has none of that name.
pub fn kernel(model: &str) -> Result<&'static [u8], Error> {
    find(embedded::KERNELS, model).ok_or_else(|| Error::Image {
        name: model.into(),
        why: "no kernel of that model is built in; rebuild flukevm without \
              FLUKEVM_GUESTS=skip"
            .into(),
    })
}

/// The same with bugs to choose from.
///
/// # Errors
/// If this build has none.
pub fn mutants(model: &str) -> Result<&'static [u8], Error> {
    find(embedded::MUTANTS, model).ok_or_else(|| Error::Image {
        name: model.into(),
        why: "no kernel with bugs is built in; rebuild flukevm with --features mutants".into(),
    })
}

/// The build id of an image, in hexadecimal.
pub fn build_id(image: &[u8]) -> Option<String> {
    let file = object::File::parse(image).ok()?;
    let id = file.build_id().ok()??;
    Some(id.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The embedded kernel with a build id.
pub fn kernel_of_build(id: &str) -> Option<&'static [u8]> {
    let mut images = embedded::KERNELS.iter().map(|(_, image)| *image);
    images.find(|image| build_id(image).as_deref() == Some(id))
}

/// A program: the embedded one of that name, or the file of that path.
///
/// # Errors
/// If there is neither, or the file cannot be read.
pub fn program(name_or_path: &str) -> Result<Vec<u8>, Error> {
    if let Some(image) = find(embedded::PROGRAMS, name_or_path) {
        return Ok(image.to_vec());
    }
    let path = Path::new(name_or_path);
    // A directory beside us must not shadow a misspelt program's list of names.
    if name_or_path.contains('/') || path.is_file() {
        return fs::read(path).map_err(|source| Error::File {
            path: path.into(),
            source,
        });
    }
    let names: Vec<_> = embedded().1.into_iter().filter(|n| *n != "root").collect();
    Err(Error::Image {
        name: name_or_path.into(),
        why: format!(
            "no program of that name is built in, and there is no such file; built in: {}",
            if names.is_empty() {
                "none".into()
            } else {
                names.join(", ")
            }
        ),
    })
}

fn find(table: &'static [(&str, &[u8])], name: &str) -> Option<&'static [u8]> {
    let (_, image) = table.iter().find(|(n, _)| *n == name)?;
    Some(image)
}

/// A loadable segment of a checked image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadSegment {
    /// Virtual address.
    pub va: u64,
    /// Physical address, for kernels.
    pub pa: u64,
    /// Bytes in memory; what the file does not fill is zero.
    pub size: u64,
    /// Where the contents are in the file.
    pub file: Range<usize>,
    /// Permissions.
    pub prot: Prot,
    /// Of a kernel: [`SUPERVISOR_SEGMENT`].
    pub supervisor: bool,
}

impl LoadSegment {
    /// The whole pages that the segment touches: first address and bytes.
    pub fn pages(&self) -> (u64, u64) {
        let start = self.va & !(layout::PAGE_SIZE - 1);
        let end = (self.va + self.size).next_multiple_of(layout::PAGE_SIZE);
        (start, end - start)
    }
}

/// A checked ELF image. The addresses do not overflow, segments share no page, and none is both
/// writable and executable.
#[derive(Clone, Debug)]
pub struct Elf {
    /// First instruction.
    pub entry: u64,
    /// Segments in order of their addresses.
    pub segments: Vec<LoadSegment>,
}

/// Checks a guest program.
///
/// # Errors
/// If a root program or `PROGRAM` cannot run it; the text says what it is and what to do.
pub fn check_program(name: &str, data: &[u8]) -> Result<Elf, Error> {
    let range = layout::PROGRAM_BASE..layout::ROOT_MEMORY;
    check(data, &range).map_err(|why| Error::Image {
        name: name.into(),
        why: format!("{why}; build it against libfluke (see tools/programs)"),
    })
}

/// Checks a kernel image, and reads what it says of itself.
///
/// # Errors
/// If the machine cannot boot it.
pub fn check_kernel(name: &str, data: &[u8]) -> Result<(Elf, ImageInfo), Error> {
    let fail = |why: String| Error::Image {
        name: name.into(),
        why: format!("{why}; build it from guest-kernel"),
    };
    let low = layout::KERNEL_IMAGE + layout::KERNEL_PHYSICAL;
    let elf = check(data, &(low..u64::MAX)).map_err(fail)?;
    if let Some(s) = elf
        .segments
        .iter()
        .find(|s| s.pa != s.va - layout::KERNEL_IMAGE)
    {
        return Err(fail(format!(
            "the segment at {:#x} is not loaded at its address",
            s.va
        )));
    }
    let info = image_info(data).ok_or_else(|| fail(format!("no section {IMAGE_SECTION}")))?;
    if info.magic != IMAGE_MAGIC {
        return Err(fail(format!(
            "the section {IMAGE_SECTION} holds something else"
        )));
    }
    if info.abi_version != ABI_VERSION {
        return Err(fail(format!(
            "it speaks version {} of the ABI and this flukevm version {ABI_VERSION}",
            info.abi_version
        )));
    }
    let pages = info.stack_bytes / layout::PAGE_SIZE;
    if !(1..=64).contains(&pages) || info.stack_bytes % layout::PAGE_SIZE != 0 {
        return Err(fail(format!(
            "it wants kernel stacks of {} bytes",
            info.stack_bytes
        )));
    }
    Ok((elf, info))
}

fn image_info(data: &[u8]) -> Option<ImageInfo> {
    let file = object::File::parse(data).ok()?;
    let section = file.section_by_name(IMAGE_SECTION)?.data().ok()?;
    Some(ImageInfo::read_from_prefix(section).ok()?.0)
}

/// Checks an ELF whose segments must lie in `range`.
fn check(data: &[u8], range: &Range<u64>) -> Result<Elf, String> {
    const E: LittleEndian = LittleEndian;
    if !data.starts_with(b"\x7fELF") {
        return Err("not an ELF file".into());
    }
    match data.get(4..6) {
        Some([2, 1]) => {}
        Some([1, _]) => return Err("a 32-bit ELF file, not 64-bit x86-64".into()),
        Some([2, 2]) => return Err("a big-endian ELF file, not x86-64".into()),
        _ => return Err("an ELF file cut short in its header".into()),
    }
    let header = FileHeader64::<LittleEndian>::parse(data)
        .map_err(|_| "an ELF file cut short in its header")?;
    if header.e_machine(E) != EM_X86_64 {
        return Err(format!(
            "an ELF file for another machine (number {}), not x86-64",
            header.e_machine(E).0
        ));
    }
    let headers = header
        .program_headers(E, data)
        .map_err(|_| "an ELF file cut short before its program headers")?;
    if headers.iter().any(|h| h.p_type(E) == PT_INTERP) {
        return Err(
            "a dynamically linked program of the host's, not a static guest program".into(),
        );
    }
    if header.e_type(E) != ET_EXEC {
        return Err("not an executable with fixed addresses (ET_EXEC)".into());
    }
    let mut segments = Vec::new();
    for h in headers
        .iter()
        .filter(|h| h.p_type(E) == PT_LOAD && h.p_memsz(E) > 0)
    {
        segments.push(segment(h, data, range)?);
    }
    segments.sort_by_key(|s| s.va);
    if segments.is_empty() || segments.len() > SEGMENTS_MAX {
        return Err(format!(
            "{} segments to load, not 1 to {SEGMENTS_MAX}",
            segments.len()
        ));
    }
    for pair in segments.windows(2) {
        let (start, size) = pair[0].pages();
        if start + size > pair[1].pages().0 {
            return Err(format!(
                "segments share the page at {:#x}",
                pair[1].pages().0
            ));
        }
    }
    let entry = header.e_entry(E);
    if !segments
        .iter()
        .any(|s| s.prot.contains(Prot::EXECUTE) && (s.va..s.va + s.size).contains(&entry))
    {
        return Err(format!(
            "the entry point {entry:#x} is not in an executable segment"
        ));
    }
    Ok(Elf { entry, segments })
}

fn segment(
    header: &impl ProgramHeader<Endian = LittleEndian, Word = u64>,
    data: &[u8],
    range: &Range<u64>,
) -> Result<LoadSegment, String> {
    const E: LittleEndian = LittleEndian;
    let (va, size) = (header.p_vaddr(E), header.p_memsz(E));
    let inside = va
        .checked_add(size)
        .is_some_and(|end| va >= range.start && end <= range.end - layout::PAGE_SIZE);
    if !inside {
        return Err(format!(
            "the segment at {va:#x} ({size:#x} bytes) is outside {:#x} to {:#x}",
            range.start, range.end
        ));
    }
    let (offset, filled) = (header.p_offset(E), header.p_filesz(E));
    let end = offset
        .checked_add(filled)
        .filter(|end| *end <= data.len() as u64);
    let (Some(end), true) = (end, filled <= size) else {
        return Err(format!("an ELF file cut short in the segment at {va:#x}"));
    };
    let flags = header.p_flags(E).0;
    if flags & PF_W.0 != 0 && flags & PF_X.0 != 0 {
        return Err(format!(
            "the segment at {va:#x} is both writable and executable"
        ));
    }
    let mut prot = Prot::empty();
    prot.set(Prot::READ, flags & PF_R.0 != 0);
    prot.set(Prot::WRITE, flags & PF_W.0 != 0);
    prot.set(Prot::EXECUTE, flags & PF_X.0 != 0);
    Ok(LoadSegment {
        va,
        pa: header.p_paddr(E),
        size,
        file: offset as usize..end as usize,
        prot,
        supervisor: flags & SUPERVISOR_SEGMENT != 0,
    })
}

#[cfg(test)]
mod tests;
