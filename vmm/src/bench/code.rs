//! What a kernel image says of its instructions: which are places where something is decided.

use fluke_abi::probe::{ARMED, Probe};
use object::{Object, ObjectSection, ObjectSymbol, SectionKind};

use crate::count::Ways;
use crate::crash::demangle;

/// `cmp byte ptr [rip + distance], 0`, which every probe point begins with: its first bytes, and all of them.
const COMPARE: [u8; 2] = [0x80, 0x3d];
const COMPARE_BYTES: usize = 7;

/// `rep movsq`, `rep movsb`, `rep stosq`, `rep stosb`: how many bytes each repetition moves.
const STRINGS: [(&[u8], u64); 4] = [
    (&[0xf3, 0x48, 0xa5], 8),
    (&[0xf3, 0xa4], 1),
    (&[0xf3, 0x48, 0xab], 8),
    (&[0xf3, 0xaa], 1),
];

/// The code of an image.
#[derive(Clone, Debug)]
pub struct Code {
    /// Where it is entered and left.
    pub ways: Ways,
    sections: Vec<(u64, Vec<u8>)>,
    /// Addresses of probe points, and the number of their kind.
    probes: Vec<(u64, u32)>,
}

impl Code {
    /// That of an image; none if it is no such kernel.
    pub fn of(image: &[u8]) -> Option<Self> {
        let file = object::File::parse(image).ok()?;
        let armed = file
            .symbols()
            .find(|symbol| symbol.name().is_ok_and(|name| demangle(name) == ARMED))?
            .address();
        let sections: Vec<_> = file
            .sections()
            .filter(|section| section.kind() == SectionKind::Text)
            .filter_map(|section| Some((section.address(), section.data().ok()?.to_vec())))
            .collect();
        let mut probes = Vec::new();
        for (start, bytes) in &sections {
            for (offset, code) in bytes.windows(COMPARE_BYTES).enumerate() {
                let &[.., zero] = code else { continue };
                if code[..2] != COMPARE || zero != 0 {
                    continue;
                }
                let distance = i32::from_le_bytes([code[2], code[3], code[4], code[5]]);
                let address = start + offset as u64;
                let end = address + COMPARE_BYTES as u64;
                let target = end.wrapping_add_signed(distance.into());
                let kind = target.wrapping_sub(armed);
                if kind < Probe::ALL.len() as u64 {
                    probes.push((address, kind as u32));
                }
            }
        }
        probes.sort_unstable();
        Some(Self {
            ways: Ways::of(image)?,
            sections,
            probes,
        })
    }

    /// The kind of probe point that an instruction is.
    pub fn probe(&self, address: u64) -> Option<Probe> {
        let place = self
            .probes
            .binary_search_by_key(&address, |(address, _)| *address);
        Probe::from_number(self.probes[place.ok()?].1)
    }

    /// Bytes that a repetition of a string instruction moves; none if the instruction is no such.
    pub fn string(&self, address: u64) -> Option<u64> {
        let code = self.sections.iter().find_map(|(start, bytes)| {
            let offset = usize::try_from(address.checked_sub(*start)?).ok()?;
            bytes.get(offset..)
        })?;
        let found = STRINGS.iter().find(|(bytes, _)| code.starts_with(bytes));
        found.map(|(_, bytes)| *bytes)
    }
}
