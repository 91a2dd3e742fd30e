//! Memory as an ELF kernel with the note that names its PVH entrance.

use std::ops::Range;

use fluke_abi::layout::PAGE_SIZE;
use object::elf::{
    ELFCLASS64, ELFDATA2LSB, ELFMAG, ELFOSABI_NONE, EM_X86_64, ET_EXEC, EV_CURRENT, FileFlags,
    FileHeader64, Ident, NoteHeader32, NoteType, PF_R, PF_W, PF_X, PT_LOAD, PT_NOTE,
    ProgramHeader64, ProgramType, SHN_UNDEF,
};
use object::pod::bytes_of;
use object::{LittleEndian, U16, U32, U64};

use crate::error::Error;
use crate::memory::Memory;

const LE: LittleEndian = LittleEndian;

/// `XEN_ELFNOTE_PHYS32_ENTRY`: the physical address to enter in 32-bit mode.
const PHYS32_ENTRY: NoteType = NoteType(18);
/// Zero pages between others that are not worth a segment of their own.
const GAP_PAGES: u64 = 16;

/// Writes all pages that are not zero as an ELF file to be entered at `entry`.
///
/// # Errors
/// If the memory cannot be read.
pub fn write(memory: &Memory, entry: u64) -> Result<Vec<u8>, Error> {
    let runs = runs(memory)?;
    let headers = 1 + runs.len();
    let note = note(entry);
    let note_at = (size_of::<FileHeader64<LittleEndian>>()
        + headers * size_of::<ProgramHeader64<LittleEndian>>()) as u64;
    let mut at = (note_at + note.len() as u64).next_multiple_of(PAGE_SIZE);

    let mut file = bytes_of(&header(entry, headers)).to_vec();
    file.extend(bytes_of(&segment(
        PT_NOTE,
        note_at,
        note_at,
        note.len() as u64,
        4,
    )));
    for run in &runs {
        let size = run.end - run.start;
        file.extend(bytes_of(&segment(PT_LOAD, at, run.start, size, PAGE_SIZE)));
        at += size;
    }
    file.extend(note);
    file.resize(file.len().next_multiple_of(PAGE_SIZE as usize), 0);
    for run in runs {
        let from = file.len();
        file.resize(from + (run.end - run.start) as usize, 0);
        memory.read(run.start, &mut file[from..])?;
    }
    Ok(file)
}

/// Runs of pages that are not all zero, nor far from one that is not, in order.
fn runs(memory: &Memory) -> Result<Vec<Range<u64>>, Error> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut page = [0; PAGE_SIZE as usize];
    for at in memory
        .extents()?
        .into_iter()
        .flat_map(|e| e.step_by(PAGE_SIZE as usize))
    {
        memory.read(at, &mut page)?;
        if page.iter().all(|byte| *byte == 0) {
            continue;
        }
        let end = at + PAGE_SIZE;
        match runs.last_mut() {
            Some(last) if at - last.end <= GAP_PAGES * PAGE_SIZE => last.end = end,
            _ => runs.push(at..end),
        }
    }
    Ok(runs)
}

fn note(entry: u64) -> Vec<u8> {
    let name = *b"Xen\0";
    let header = NoteHeader32 {
        n_namesz: U32::new(LE, name.len() as u32),
        // Some loaders read 32 bits, and some 64.
        n_descsz: U32::new(LE, size_of::<u64>() as u32),
        n_type: U32::new(LE, PHYS32_ENTRY),
    };
    [bytes_of(&header), &name, &entry.to_le_bytes()].concat()
}

fn header(entry: u64, headers: usize) -> FileHeader64<LittleEndian> {
    let size = size_of::<FileHeader64<LittleEndian>>();
    FileHeader64 {
        e_ident: Ident {
            magic: ELFMAG,
            class: ELFCLASS64,
            data: ELFDATA2LSB,
            version: EV_CURRENT,
            os_abi: ELFOSABI_NONE,
            abi_version: 0,
            padding: [0; 7],
        },
        e_type: U16::new(LE, ET_EXEC),
        e_machine: U16::new(LE, EM_X86_64),
        e_version: U32::new(LE, EV_CURRENT.0.into()),
        e_entry: U64::new(LE, entry),
        e_phoff: U64::new(LE, size as u64),
        e_shoff: U64::new(LE, 0),
        e_flags: U32::new(LE, FileFlags(0)),
        e_ehsize: U16::new(LE, size as u16),
        e_phentsize: U16::new(LE, size_of::<ProgramHeader64<LittleEndian>>() as u16),
        e_phnum: U16::new(LE, headers as u16),
        e_shentsize: U16::new(LE, 0),
        e_shnum: U16::new(LE, 0),
        e_shstrndx: U16::new(LE, SHN_UNDEF),
    }
}

fn segment(
    kind: ProgramType,
    offset: u64,
    at: u64,
    size: u64,
    align: u64,
) -> ProgramHeader64<LittleEndian> {
    let flags = match kind {
        PT_LOAD => PF_R | PF_W | PF_X,
        _ => PF_R,
    };
    ProgramHeader64 {
        p_type: U32::new(LE, kind),
        p_flags: U32::new(LE, flags),
        p_offset: U64::new(LE, offset),
        p_vaddr: U64::new(LE, at),
        p_paddr: U64::new(LE, at),
        p_filesz: U64::new(LE, size),
        p_memsz: U64::new(LE, size),
        p_align: U64::new(LE, align),
    }
}
