//! What a CPU is at: its kernel stack, and the instructions there with their source lines.

use std::collections::HashMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use fluke_abi::layout::KERNEL_IMAGE;
use serde::Serialize;

use super::table::report;
use super::{Machine, Place, Report, Result};
use crate::crash;
use crate::paging::read_virtual;

/// Instructions of a listing.
const INSTRUCTIONS: usize = 24;
/// Longest source file that is shown from, bytes.
const SOURCE_MAX: u64 = 1 << 20;

#[derive(Serialize)]
struct Stack {
    cpu: u32,
    /// `user` or `kernel`; in user mode nothing is on the stack.
    mode: &'static str,
    /// Functions with file and line, innermost first.
    functions: Vec<String>,
}

/// The kernel stack of a CPU.
///
/// # Errors
/// If there is no such CPU.
pub fn stack(machine: &Machine<'_>, cpu: u32) -> Result<Report> {
    let registers = machine.vcpu(cpu)?;
    let kernel = registers.special.cs.dpl == 0;
    let read = |va, size| read_virtual(machine.memory, registers.special.cr3, va, size);
    let general = &registers.general;
    let stack = Stack {
        cpu,
        mode: if kernel { "kernel" } else { "user" },
        functions: match kernel {
            true => {
                let addresses = crash::addresses(general.rip, general.rbp, read);
                crash::backtrace(Some(&machine.symbols()?), &addresses)
            }
            false => Vec::new(),
        },
    };
    let mut text = String::new();
    if !kernel {
        let _ = writeln!(
            text,
            "CPU {cpu} runs user code at {:#x}: nothing is on its kernel stack.",
            general.rip
        );
    }
    for (depth, function) in stack.functions.iter().enumerate() {
        let _ = writeln!(text, "{depth:2}: {function}");
    }
    report(text, &stack)
}

/// Where a CPU is, on one line.
///
/// # Errors
/// If there is no such CPU.
pub fn place(machine: &Machine<'_>, cpu: u32) -> Result<String> {
    let registers = machine.vcpu(cpu)?;
    let rip = registers.general.rip;
    let size = crash::INSTRUCTION_BYTES;
    let bytes = read_virtual(machine.memory, registers.special.cr3, rip, size);
    let mut text = format!("{rip:#x}");
    if let Some(instruction) = crash::disassemble(rip, &bytes) {
        let _ = write!(text, ": {instruction}");
    }
    let functions = match rip {
        KERNEL_IMAGE.. => machine.symbols()?.frames(rip),
        _ => vec!["user code".into()],
    };
    if let Some(function) = functions.first() {
        let _ = write!(text, ", in {function}");
    }
    Ok(text)
}

#[derive(Serialize)]
struct Listing {
    /// Function that the first instruction is in; none outside the kernel.
    function: Option<String>,
    instructions: Vec<Instruction>,
}

#[derive(Serialize)]
struct Instruction {
    address: u64,
    /// Bytes and text.
    instruction: String,
    /// File and line.
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<(String, u32)>,
    /// That line, if the file is at hand.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
}

/// Instructions from a place on.
///
/// # Errors
/// If there is no such CPU.
pub fn listing(machine: &Machine<'_>, place: Place) -> Result<Report> {
    let (registers, address) = match place {
        Place::Cpu(cpu) => {
            let registers = machine.vcpu(cpu)?;
            (registers, registers.general.rip)
        }
        Place::Address(address) => (machine.vcpu(0)?, address),
    };
    let symbols = machine.symbols()?;
    let size = INSTRUCTIONS * crash::INSTRUCTION_BYTES;
    let bytes = read_virtual(machine.memory, registers.special.cr3, address, size);
    let mut sources = Sources::default();
    let mut instructions = Vec::new();
    let mut at = 0;
    while instructions.len() < INSTRUCTIONS
        && let Some(rest) = bytes.get(at..)
        && let Some((length, instruction)) = crash::decode(address.wrapping_add(at as u64), rest)
    {
        let address = address.wrapping_add(at as u64);
        let line = symbols.line(address);
        let source = line
            .as_ref()
            .and_then(|(file, line)| sources.line(file, *line));
        instructions.push(Instruction {
            address,
            instruction,
            line,
            source,
        });
        at += length;
    }
    let listing = Listing {
        function: symbols.frames(address).pop(),
        instructions,
    };
    let mut text = String::new();
    if let Some(function) = &listing.function {
        let _ = writeln!(text, "In {function}:");
    }
    if listing.instructions.is_empty() {
        let _ = writeln!(text, "Nothing is mapped at {address:#x}.");
    }
    let mut before = None;
    for instruction in &listing.instructions {
        if let Some((file, line)) = &instruction.line
            && before != instruction.line
        {
            let source = instruction.source.as_deref().unwrap_or_default();
            let _ = writeln!(text, "{file}:{line}  {source}");
            before.clone_from(&instruction.line);
        }
        let _ = writeln!(
            text,
            "  {:#018x}  {}",
            instruction.address, instruction.instruction
        );
    }
    report(text, &listing)
}

/// Source files, each read once.
#[derive(Default)]
struct Sources(HashMap<String, Option<String>>);

impl Sources {
    fn line(&mut self, file: &str, line: u32) -> Option<String> {
        let read = || {
            // An image names any file it likes: only what looks like source is read.
            let path = Path::new(file);
            let known = path.extension().is_some_and(|extension| extension == "rs");
            let about = fs::metadata(path)
                .ok()
                .filter(|about| about.is_file() && known);
            about.filter(|about| about.len() <= SOURCE_MAX)?;
            fs::read_to_string(path).ok()
        };
        let text = self.0.entry(file.into()).or_insert_with(read).as_ref()?;
        let line = text.lines().nth((line as usize).checked_sub(1)?)?;
        Some(line.trim().into())
    }
}
