//! The image gate: what no image may contain, whatever the compiler makes of the sources.
//!
//! A kernel runs on hosts whose KVM emulates it instruction by instruction, saves no vector state
//! for itself, and may be entered by an exception between any two instructions. So its code must
//! keep to the plain instructions, and never use memory below its stack pointer.

use std::fmt;

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, FlowControl, Formatter, Instruction,
    IntelFormatter, Mnemonic, OpKind, Register,
};
use object::elf::{PF_W, PF_X};
use object::{
    File, Object, ObjectSection, ObjectSegment, ObjectSymbol, SectionFlags, SegmentFlags, elf,
};

/// Extensions that the host may lack or not emulate.
const EXTENSIONS: [(CpuidFeature, &str); 9] = [
    (CpuidFeature::POPCNT, "popcnt"),
    (CpuidFeature::BMI1, "BMI1"),
    (CpuidFeature::BMI2, "BMI2"),
    (CpuidFeature::LZCNT, "lzcnt"),
    (CpuidFeature::CMPXCHG16B, "cmpxchg16b"),
    (CpuidFeature::RDTSCP, "rdtscp"),
    (CpuidFeature::XSAVE, "XSAVE"),
    (CpuidFeature::SMAP, "SMAP"),
    (CpuidFeature::AVX, "AVX"),
];

/// Something in an image that may not be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Address.
    pub address: u64,
    /// The function it is in, or nothing.
    pub symbol: String,
    /// The instruction or segment.
    pub what: String,
    /// Why it may not be there.
    pub why: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            address,
            symbol,
            what,
            why,
        } = self;
        write!(f, "{address:#x} {symbol}: {what}: {why}")
    }
}

/// Code that was looked at.
#[derive(Clone, Debug, Default)]
pub struct Scan {
    /// Number of instructions.
    pub instructions: usize,
    /// What is wrong with them.
    pub violations: Vec<Violation>,
}

/// Looks at all instructions of an ELF image.
///
/// # Errors
/// If it cannot be parsed.
pub fn scan_image(image: &[u8]) -> Result<Scan, object::Error> {
    let file = File::parse(image)?;
    let mut scan = Scan::default();
    for section in file.sections() {
        let SectionFlags::Elf { sh_flags, .. } = section.flags() else {
            continue;
        };
        if sh_flags.0 & elf::SHF_EXECINSTR.0 == 0 {
            continue;
        }
        let part = scan_code(section.data()?, section.address());
        scan.instructions += part.instructions;
        scan.violations.extend(part.violations);
    }
    for violation in &mut scan.violations {
        violation.symbol = symbol(&file, violation.address);
    }
    Ok(scan)
}

/// Looks at all instructions of `code`, which is at `address`.
pub fn scan_code(code: &[u8], address: u64) -> Scan {
    let decode = || Decoder::with_ip(64, code, address, DecoderOptions::NONE).into_iter();
    let mut targets: Vec<u64> = decode().map(|i| i.near_branch_target()).collect();
    targets.sort_unstable();

    let mut scan = Scan::default();
    let mut formatter = IntelFormatter::new();
    // Whether nothing comes here from the instruction before.
    let mut unreachable = false;
    for instruction in decode() {
        scan.instructions += 1;
        // What fills the space between functions is never executed.
        unreachable &= targets.binary_search(&instruction.ip()).is_err();
        if instruction.mnemonic() == Mnemonic::Int3 && unreachable {
            continue;
        }
        unreachable = !falls_through(&instruction);
        let Some(why) = objection(&instruction) else {
            continue;
        };
        let mut what = String::new();
        formatter.format(&instruction, &mut what);
        scan.violations.push(Violation {
            address: instruction.ip(),
            symbol: String::new(),
            what,
            why,
        });
    }
    scan
}

/// Whether the next instruction can be executed after this one. A call may be of a function that
/// does not return.
fn falls_through(instruction: &Instruction) -> bool {
    !matches!(
        instruction.flow_control(),
        FlowControl::UnconditionalBranch
            | FlowControl::IndirectBranch
            | FlowControl::Return
            | FlowControl::Exception
            | FlowControl::Call
            | FlowControl::IndirectCall
    )
}

/// Why an instruction may not be there.
fn objection(instruction: &Instruction) -> Option<String> {
    if instruction.is_invalid() {
        return Some("no instruction".into());
    }
    match instruction.mnemonic() {
        Mnemonic::Fxsave64 | Mnemonic::Fxrstor64 => return None,
        Mnemonic::Int3 => return Some("a trap".into()),
        Mnemonic::Int | Mnemonic::Int1 => return Some("a software interrupt".into()),
        Mnemonic::Verw => return Some("KVM does not emulate it".into()),
        _ => {}
    }
    let registers = (0..instruction.op_count())
        .filter(|&i| instruction.op_kind(i) == OpKind::Register)
        .map(|i| instruction.op_register(i));
    if let Some(register) = registers.into_iter().find(|r| is_vector(*r)) {
        return Some(format!("uses the register {register:?}"));
    }
    let features = instruction.cpuid_features();
    // `fninit` resets what user threads use; it computes nothing.
    if features.contains(&CpuidFeature::FPU) && instruction.code() != Code::Fninit {
        return Some("an x87 instruction".into());
    }
    if let Some((_, name)) = EXTENSIONS.iter().find(|(f, _)| features.contains(f)) {
        return Some(format!("not every host has {name}"));
    }
    let below = instruction.memory_base() == Register::RSP
        && (instruction.memory_displacement64() as i64) < 0;
    below.then(|| "uses memory below the stack pointer".into())
}

fn is_vector(register: Register) -> bool {
    register.is_vector_register()
        || register.is_mm()
        || register.is_st()
        || register.is_k()
        || register.is_tmm()
        || register.is_bnd()
}

fn symbol(file: &File<'_>, address: u64) -> String {
    file.symbols()
        .filter(|s| s.is_definition() && s.address() <= address)
        .max_by_key(ObjectSymbol::address)
        .and_then(|s| s.name().ok().map(String::from))
        .unwrap_or_default()
}

/// Looks for segments that are writable and executable, and code that can be written to.
///
/// # Errors
/// If the image cannot be parsed.
pub fn writable_code(image: &[u8]) -> Result<Vec<Violation>, object::Error> {
    let file = File::parse(image)?;
    let mut found = Vec::new();
    let mut executable = Vec::new();
    for segment in file.segments() {
        let SegmentFlags::Elf { p_flags, .. } = segment.flags() else {
            continue;
        };
        let range = segment.address()..segment.address() + segment.size();
        let writes = p_flags.0 & PF_W.0 != 0;
        let executes = p_flags.0 & PF_X.0 != 0;
        if writes && executes {
            found.push(Violation {
                address: range.start,
                symbol: String::new(),
                what: format!("segment of {:#x} bytes", segment.size()),
                why: "both writable and executable".into(),
            });
        }
        if executes && !writes {
            executable.push(range);
        }
    }
    for section in file.sections().filter(|s| s.name() == Ok(".text")) {
        let end = section.address() + section.size();
        let inside = |r: &std::ops::Range<u64>| r.start <= section.address() && end <= r.end;
        if !executable.iter().any(inside) {
            found.push(Violation {
                address: section.address(),
                symbol: String::new(),
                what: ".text".into(),
                why: "in no segment that is executable and cannot be written to".into(),
            });
        }
    }
    Ok(found)
}
