//! What probe points cost: every use of their bytes in a kernel image.

use fluke_abi::probe::{ARMED, Probe};
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction};
use object::{File, Object, ObjectSection, ObjectSymbol};
use rustc_demangle::demangle;

/// An instruction that uses the byte of a kind of probe points.
#[derive(Clone, Debug)]
pub struct Use {
    /// Its address.
    pub address: u64,
    /// The kind.
    pub probe: Probe,
    /// Whether it and the one after it are a test of the byte: `cmp` with a constant, and a conditional jump.
    pub is_test: bool,
}

/// All uses in an image, in order of addresses.
///
/// # Errors
/// If the image cannot be parsed.
pub fn uses(image: &[u8]) -> Result<Vec<Use>, object::Error> {
    let file = File::parse(image)?;
    let mut symbols = file.symbols();
    let armed = symbols.find(|symbol| {
        let name = symbol.name().unwrap_or_default();
        format!("{:#}", demangle(name)) == ARMED
    });
    let first = armed.map_or(0, |symbol| symbol.address());
    let mut uses = Vec::new();
    for section in file
        .sections()
        .filter(|s| s.name().is_ok_and(|name| name.starts_with(".text")))
    {
        let decoder =
            Decoder::with_ip(64, section.data()?, section.address(), DecoderOptions::NONE);
        let code: Vec<_> = decoder.into_iter().collect();
        for (n, instruction) in code.iter().enumerate() {
            let probe = place(instruction)
                .and_then(|at| Probe::from_number(at.checked_sub(first)?.try_into().ok()?));
            if let Some(probe) = probe {
                uses.push(Use {
                    address: instruction.ip(),
                    probe,
                    is_test: instruction.code() == Code::Cmp_rm8_imm8
                        && code.get(n + 1).is_some_and(|next| {
                            next.flow_control() == FlowControl::ConditionalBranch
                        }),
                });
            }
        }
    }
    Ok(uses)
}

/// The address that an instruction uses, if that is known from the instruction alone.
fn place(instruction: &Instruction) -> Option<u64> {
    let constant = instruction.memory_base() == iced_x86::Register::None
        && instruction.memory_index() == iced_x86::Register::None;
    if instruction.is_ip_rel_memory_operand() {
        Some(instruction.ip_rel_memory_address())
    } else if constant && instruction.memory_displacement64() != 0 {
        Some(instruction.memory_displacement64())
    } else {
        None
    }
}
