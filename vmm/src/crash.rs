//! Where a guest crashed: registers, the instruction, and the backtrace with the kernel's symbols.
//!
//! Everything here reads a guest that may have destroyed its own stack and page tables: every
//! step is bounded, and what cannot be read is left out.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use addr2line::Context;
use addr2line::gimli::{Dwarf, EndianSlice, LittleEndian, SectionId};
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use kvm_ioctls::VcpuFd;
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};

use crate::memory::Memory;
use crate::paging::read_virtual;

/// Most frames of a backtrace.
const FRAMES_MAX: usize = 48;
/// Longest x86 instruction, bytes.
pub(crate) const INSTRUCTION_BYTES: usize = 15;

/// State of a vCPU when its guest crashed.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Crash {
    /// Number of the vCPU.
    pub vcpu: u32,
    /// Instruction pointer.
    pub rip: u64,
    /// Address of the last page fault.
    pub cr2: u64,
    /// Privilege level.
    pub cpl: u8,
    /// Bytes and text of the instruction, if it could be read.
    pub instruction: Option<String>,
    /// Functions with file and line, innermost first.
    pub backtrace: Vec<String>,
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "vCPU {} at {:#x} (CPL {})",
            self.vcpu, self.rip, self.cpl
        )?;
        if let Some(instruction) = &self.instruction {
            write!(f, ": {instruction}")?;
        }
        match self.backtrace.first() {
            Some(frame) => write!(f, ", in {frame}"),
            None => Ok(()),
        }
    }
}

/// Looks at a vCPU that is not in the guest. `image` is the kernel, for its symbols.
pub fn examine(fd: &VcpuFd, vcpu: u32, memory: &Memory, image: Option<&[u8]>) -> Crash {
    let (Ok(regs), Ok(sregs)) = (fd.get_regs(), fd.get_sregs()) else {
        return Crash {
            vcpu,
            ..Crash::default()
        };
    };
    let read = |va: u64, size: usize| read_virtual(memory, sregs.cr3, va, size);
    let addresses = match sregs.cs.dpl {
        0 => addresses(regs.rip, regs.rbp, read),
        _ => vec![regs.rip],
    };
    let backtrace = backtrace(image.and_then(Symbols::new).as_ref(), &addresses);
    Crash {
        vcpu,
        rip: regs.rip,
        cr2: sregs.cr2,
        cpl: sregs.cs.dpl,
        instruction: disassemble(regs.rip, &read(regs.rip, INSTRUCTION_BYTES)),
        backtrace,
    }
}

/// Where a CPU is in the kernel, and where it returns to, innermost first.
pub(crate) fn addresses(rip: u64, rbp: u64, read: impl Fn(u64, usize) -> Vec<u8>) -> Vec<u64> {
    let mut addresses = vec![rip];
    addresses.extend(return_addresses(rbp, read));
    addresses
}

/// Functions at these addresses, innermost first; an address where there is none.
pub(crate) fn backtrace(symbols: Option<&Symbols<'_>>, addresses: &[u64]) -> Vec<String> {
    let frames = |(i, address): (usize, &u64)| {
        // A return address belongs to the call before it.
        let probe = address - u64::from(i > 0).min(*address);
        let frames = symbols.map(|s| s.frames(probe));
        frames
            .filter(|f| !f.is_empty())
            .unwrap_or_else(|| vec![format!("{address:#x}")])
    };
    addresses.iter().enumerate().flat_map(frames).collect()
}

/// Follows the chain of frame pointers upwards; a chain that turns back ends there.
fn return_addresses(mut rbp: u64, read: impl Fn(u64, usize) -> Vec<u8>) -> Vec<u64> {
    let mut addresses = Vec::new();
    while addresses.len() < FRAMES_MAX && rbp.is_multiple_of(8) {
        let frame = read(rbp, 16);
        let (Some(next), Some(address)) = (word(&frame, 0), word(&frame, 8)) else {
            break;
        };
        if address == 0 {
            break;
        }
        addresses.push(address);
        if next <= rbp {
            break;
        }
        rbp = next;
    }
    addresses
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Bytes and text of the instruction at the start of `bytes`.
pub fn disassemble(rip: u64, bytes: &[u8]) -> Option<String> {
    decode(rip, bytes).map(|(_, text)| text)
}

/// The same with the bytes that it takes.
pub(crate) fn decode(rip: u64, bytes: &[u8]) -> Option<(usize, String)> {
    let mut decoder = Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE);
    if !decoder.can_decode() {
        return None;
    }
    let instruction = decoder.decode();
    let mut text = String::new();
    if instruction.is_invalid() {
        text.push_str("(no instruction)");
    } else {
        IntelFormatter::new().format(&instruction, &mut text);
    }
    let length = instruction.len().clamp(1, bytes.len());
    let hex: Vec<String> = bytes[..length].iter().map(|b| format!("{b:02x}")).collect();
    Some((length, format!("{} `{text}`", hex.join(" "))))
}

type Slice<'a> = EndianSlice<'a, LittleEndian>;

/// Symbols and line numbers of a kernel image.
pub struct Symbols<'a> {
    lines: Option<Context<Slice<'a>>>,
    /// Functions: address, bytes, name; in order of addresses.
    functions: Vec<(u64, u64, String)>,
}

impl<'a> Symbols<'a> {
    /// Reads an ELF image; none if it is not one.
    pub fn new(image: &'a [u8]) -> Option<Self> {
        let file = object::File::parse(image).ok()?;
        let load = |id: SectionId| {
            let section = file.section_by_name(id.name());
            let data = section.and_then(|s| s.data().ok()).unwrap_or(&[]);
            Ok::<_, addr2line::gimli::Error>(EndianSlice::new(data, LittleEndian))
        };
        let lines = Dwarf::load(load)
            .ok()
            .and_then(|d| Context::from_dwarf(d).ok());
        let mut functions: Vec<_> = file
            .symbols()
            .filter(|s| s.kind() == SymbolKind::Text)
            .filter_map(|s| Some((s.address(), s.size(), demangle(s.name().ok()?))))
            .collect();
        functions.sort();
        Some(Self { lines, functions })
    }

    /// Functions at an address, innermost inlined one first, with file and line.
    pub fn frames(&self, address: u64) -> Vec<String> {
        let mut frames = Vec::new();
        self.each_frame(address, |name, line| {
            let Some(mut text) = name.or_else(|| self.function(address)) else {
                return;
            };
            if let Some((file, line)) = line {
                text.push_str(&format!(" ({file}:{line})"));
            }
            frames.push(text);
        });
        if frames.is_empty() {
            frames.extend(self.function(address));
        }
        frames
    }

    /// The same by name only.
    pub fn functions(&self, address: u64) -> Vec<String> {
        let mut functions = Vec::new();
        self.each_frame(address, |name, _| functions.extend(name));
        if functions.is_empty() {
            functions.extend(self.symbol(address).map(|(_, name)| name.to_string()));
        }
        functions
    }

    /// The functions that the debug information has at an address: name, file and line.
    fn each_frame(&self, address: u64, mut see: impl FnMut(Option<String>, Option<(&str, u32)>)) {
        let Some(lines) = &self.lines else { return };
        let Ok(mut found) = lines.find_frames(address).skip_all_loads() else {
            return;
        };
        while let Ok(Some(frame)) = found.next() {
            let name = |f: addr2line::FunctionName<_>| Some(demangle(&f.raw_name().ok()?));
            let line = frame.location.and_then(|l| Some((l.file?, l.line?)));
            see(frame.function.and_then(name), line);
        }
    }

    /// File and line of the instruction at an address.
    pub fn line(&self, address: u64) -> Option<(String, u32)> {
        let location = self.lines.as_ref()?.find_location(address).ok()??;
        Some((location.file?.into(), location.line?))
    }

    /// Functions by path, or the end of one: where they begin, and their paths. A method's path is that of its
    /// `impl`: `wait::wake`.
    pub fn find(&self, path: &str) -> Vec<(u64, String)> {
        let is = |name: &str| {
            let plain = match (name.find("<impl "), name.rfind(">::")) {
                (Some(from), Some(to)) => [&name[..from], &name[to + 3..]].concat(),
                _ => name.into(),
            };
            let before = plain.strip_suffix(path);
            before.is_some_and(|before| before.is_empty() || before.ends_with("::"))
        };
        let functions = self.functions.iter().filter(|(_, _, name)| is(name));
        functions.map(|(at, _, name)| (*at, name.clone())).collect()
    }

    /// Where a line of a source file, given by its path or the end of one, begins in each function that it is
    /// part of.
    pub fn find_line(&self, file: &str, line: u32) -> Vec<u64> {
        let (Some(lines), Some((first, ..)), Some((last, size, _))) =
            (&self.lines, self.functions.first(), self.functions.last())
        else {
            return Vec::new();
        };
        let Ok(locations) = lines.find_location_range(*first, last + size.max(&1)) else {
            return Vec::new();
        };
        let mut found = BTreeMap::new();
        for (address, _, location) in locations {
            let is = location
                .file
                .is_some_and(|path| Path::new(path).ends_with(file));
            if is && location.line == Some(line) {
                let function = self
                    .functions
                    .partition_point(|(start, ..)| *start <= address);
                let first = found.entry(function).or_insert(address);
                *first = address.min(*first);
            }
        }
        found.into_values().collect()
    }

    fn function(&self, address: u64) -> Option<String> {
        let (start, name) = self.symbol(address)?;
        Some(format!("{name}+{:#x}", address - start))
    }

    /// Address and name of the function that an address is part of.
    fn symbol(&self, address: u64) -> Option<(u64, &str)> {
        let after = self
            .functions
            .partition_point(|(start, ..)| *start <= address);
        let (start, size, name) = self.functions.get(after.checked_sub(1)?)?;
        // Assembly routines have no size; what follows them is theirs.
        (*size == 0 || address < start + size).then_some((*start, name.as_str()))
    }
}

/// A symbol's name as in the source.
pub fn demangle(name: &str) -> String {
    format!("{:#}", rustc_demangle::demangle(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_shown_with_their_bytes() {
        let xorps = disassemble(0x1000, &[0x0f, 0x57, 0xc0, 0x90]);
        assert_eq!(xorps.as_deref(), Some("0f 57 c0 `xorps xmm0,xmm0`"));
        assert_eq!(disassemble(0, &[]), None);
        let cut = disassemble(0, &[0x0f]).unwrap();
        assert!(cut.contains("no instruction"), "{cut}");
    }

    #[test]
    fn frame_pointer_chains_end() {
        let frame = |next: u64, address: u64| [next.to_le_bytes(), address.to_le_bytes()].concat();
        let chain = |rbp: u64, _: usize| match rbp {
            0x10 => frame(0x20, 1),
            0x20 => frame(0x40, 2),
            0x40 => frame(0x10, 3),
            0x80 => frame(0x90, 0),
            _ => Vec::new(),
        };
        assert_eq!(return_addresses(0x10, chain), [1, 2, 3], "a loop");
        assert_eq!(
            return_addresses(0x80, chain),
            [0; 0],
            "a null return address"
        );
        assert_eq!(return_addresses(0x11, chain), [0; 0], "misaligned");
        assert_eq!(return_addresses(0x1000, chain), [0; 0], "unmapped");
    }

    #[test]
    fn own_symbols_are_found() {
        let image = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let symbols = Symbols::new(&image).unwrap();
        let (start, ..) = symbols
            .functions
            .iter()
            .find(|(.., name)| name.ends_with("crash::disassemble"))
            .unwrap();
        let frames = symbols.frames(*start);
        assert!(frames[0].contains("disassemble"), "{frames:?}");
        assert!(frames[0].contains("crash.rs:"), "{frames:?}");
    }
}
