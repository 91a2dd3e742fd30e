//! Where the kernel's instructions go: a profile of all that [`crate::count`] steps through, by the entry point
//! called and the functions it goes through.
//!
//! Which functions have been called, and from where, is seen from the calls and returns themselves: nothing is
//! guessed from what lies on a stack. Every kernel stack has its own calls, so a thread that goes on where it
//! was left does so in the functions where it was.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::path::Path;

use fluke_abi::layout::{KERNEL_IMAGE, KERNEL_STACKS};
use iced_x86::{Decoder, DecoderOptions, FlowControl};
use inferno::flamegraph::{self, Options};

use crate::crash::{INSTRUCTION_BYTES, Symbols};
use crate::error::Error;
use crate::image;
use crate::memory::Memory;

/// Bytes of a `call`'s return address.
const SLOT: u64 = 8;
/// Extension of the name of a file of folded stacks.
const FOLDED: &str = "folded";

/// Instructions by where they are.
#[derive(Debug)]
pub struct Profile {
    /// Bytes from one kernel stack to the next.
    stack_step: u64,
    /// Where functions were called that have not returned, by the addresses of their return addresses.
    calls: BTreeMap<u64, u64>,
    /// The next instruction, and the stack pointer before it.
    next: Option<(u64, u64)>,
    /// Whether the instruction at an address is a `call`.
    known: HashMap<u64, bool>,
    /// What was executed since the kernel was entered last.
    visit: Counts,
    /// The same of all visits, by what they were for.
    visits: BTreeMap<String, Counts>,
}

/// How often an instruction was executed, by the addresses of the calls that led there, its own last.
type Counts = HashMap<Vec<u64>, u64>;

impl Profile {
    /// An empty profile of a kernel.
    ///
    /// # Errors
    /// If `kernel` is no kernel's image.
    pub fn new(kernel: &[u8]) -> Result<Self, Error> {
        let (_, info) = image::check_kernel("the kernel", kernel)?;
        Ok(Self {
            // Each is above a guard page as large as itself.
            stack_step: 2 * info.stack_bytes,
            calls: BTreeMap::new(),
            next: None,
            known: HashMap::new(),
            visit: Counts::new(),
            visits: BTreeMap::new(),
        })
    }

    /// A vCPU is about to execute the instruction at `rip`.
    pub fn step(&mut self, memory: &Memory, rip: u64, rsp: u64) {
        if let Some((before, stack)) = self.next.replace((rip, rsp))
            && rsp == stack.wrapping_sub(SLOT)
            && self.is_call(memory, before)
        {
            self.calls.insert(rsp, before);
        }
        // A stack pointer that is at the top belongs to what is below.
        let within = rsp.wrapping_sub(1).wrapping_sub(KERNEL_STACKS);
        let bottom = KERNEL_STACKS.wrapping_add(within - within % self.stack_step);
        let returned = self.calls.range(bottom.min(rsp)..rsp);
        let returned: Vec<_> = returned.map(|(at, _)| *at).collect();
        for at in returned {
            self.calls.remove(&at);
        }
        let top = bottom.saturating_add(self.stack_step);
        let callers = self.calls.range(rsp..top.max(rsp)).rev();
        let stack = callers.map(|(_, site)| *site).chain([rip]).collect();
        *self.visit.entry(stack).or_default() += 1;
    }

    /// Further instructions at `rip`, that were not stepped through.
    pub fn unseen(&mut self, rip: u64, instructions: u32) {
        *self.visit.entry(vec![rip]).or_default() += u64::from(instructions);
    }

    /// The visit of the kernel is at its end; what it was for.
    pub fn leave(&mut self, entry: &str) {
        self.next = None;
        let counts = self.visits.entry(entry.into()).or_default();
        for (stack, instructions) in self.visit.drain() {
            *counts.entry(stack).or_default() += instructions;
        }
    }

    fn is_call(&mut self, memory: &Memory, address: u64) -> bool {
        *self.known.entry(address).or_insert_with(|| {
            let code = memory.get::<[u8; INSTRUCTION_BYTES]>(address.wrapping_sub(KERNEL_IMAGE));
            code.is_ok_and(|code| {
                let decoder = Decoder::with_ip(64, &code, address, DecoderOptions::NONE);
                let first = decoder.into_iter().next();
                first.is_some_and(|instruction| {
                    matches!(
                        instruction.flow_control(),
                        FlowControl::Call | FlowControl::IndirectCall
                    )
                })
            })
        })
    }

    /// Folded stacks, one a line: what the visit was for, the functions from the outermost on with those that
    /// were inlined, and the instructions; in order.
    pub fn folded(&self, kernel: &[u8]) -> Vec<String> {
        let symbols = Symbols::new(kernel);
        let mut names = HashMap::new();
        let mut lines = BTreeMap::<String, u64>::new();
        for (entry, counts) in &self.visits {
            for (stack, count) in counts {
                let mut line = entry.clone();
                for address in stack {
                    let named = names.entry(*address);
                    line.push_str(named.or_insert_with(|| path(symbols.as_ref(), *address)));
                }
                *lines.entry(line).or_default() += count;
            }
        }
        let line = |(stack, count)| format!("{stack} {count}");
        lines.into_iter().map(line).collect()
    }
}

/// The functions that an instruction is part of, outermost first, each after a `;`.
fn path(symbols: Option<&Symbols<'_>>, address: u64) -> String {
    let functions = symbols.map_or_else(Vec::new, |symbols| symbols.functions(address));
    if functions.is_empty() {
        return format!(";{address:#x}");
    }
    let short = |name: &String| format!(";{}", name.replace("fluke_kernel::", ""));
    functions.iter().rev().map(short).collect()
}

/// What a profile is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Folded stacks, for other programs.
    Folded,
    /// A flame graph, for browsers.
    Graph,
}

impl Form {
    /// What a file of that name holds.
    pub fn of(path: &Path) -> Self {
        match path.extension() {
            Some(extension) if extension == FOLDED => Self::Folded,
            _ => Self::Graph,
        }
    }

    /// Writes folded stacks in this form.
    ///
    /// # Errors
    /// If `to` cannot be written to.
    pub fn write(self, lines: &[String], mut to: impl Write) -> io::Result<()> {
        if self == Self::Folded || lines.is_empty() {
            return lines.iter().try_for_each(|line| writeln!(to, "{line}"));
        }
        let mut options = Options::default();
        options.title = "CPL 0 instructions".into();
        options.count_name = "instructions".into();
        options.deterministic = true;
        flamegraph::from_lines(&mut options, lines.iter().map(String::as_str), to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STACK: u64 = 0x4000;

    fn profile() -> Profile {
        Profile {
            stack_step: 2 * STACK,
            calls: BTreeMap::new(),
            next: None,
            // Calls at 10 and 20; a jump at 30.
            known: [(10, true), (20, true), (30, false)].into(),
            visit: Counts::new(),
            visits: BTreeMap::new(),
        }
    }

    fn play(profile: &mut Profile, steps: &[(u64, u64)]) -> Vec<(Vec<u64>, u64)> {
        let memory = Memory::new(1 << 21).unwrap();
        for (rip, rsp) in steps {
            profile.step(&memory, *rip, *rsp);
        }
        profile.leave("it");
        let mut seen: Vec<_> = profile.visits.remove("it").unwrap().into_iter().collect();
        seen.sort();
        seen
    }

    #[test]
    fn instructions_are_in_the_functions_that_were_called() {
        let top = KERNEL_STACKS + 2 * STACK;
        let steps = [
            (10, top),
            (20, top - 8),
            (30, top - 16),
            (30, top - 16),
            // Returns from both at once, as a stack that is left does.
            (40, top),
        ];
        let expected = [
            (vec![10], 1),
            (vec![10, 20], 1),
            (vec![10, 20, 30], 2),
            (vec![40], 1),
        ];
        assert_eq!(play(&mut profile(), &steps), expected);
    }

    #[test]
    fn stacks_keep_their_calls_while_others_are_used() {
        let top = |n: u64| KERNEL_STACKS + n * 2 * STACK;
        let steps = [
            (10, top(1)),
            (30, top(1) - 8),
            // The same on another stack, of which nothing is left in the end.
            (20, top(2)),
            (30, top(2) - 8),
            (30, top(1) - 8),
            (30, top(2)),
        ];
        let expected = [
            (vec![10], 1),
            (vec![10, 30], 2),
            (vec![20], 1),
            (vec![20, 30], 1),
            (vec![30], 1),
        ];
        assert_eq!(play(&mut profile(), &steps), expected);
    }

    #[test]
    fn a_graph_is_a_picture_and_names_its_functions() {
        let lines = ["thread_self;boundary::trap 40".to_string()];
        let mut picture = Vec::new();
        let form = Form::of(Path::new("a/b.svg"));
        form.write(&lines, &mut picture).unwrap();
        let picture = String::from_utf8(picture).unwrap();
        assert!(picture.contains("<svg") && picture.contains("boundary::trap"));
        let mut text = Vec::new();
        let form = Form::of(Path::new("a/b.folded"));
        form.write(&lines, &mut text).unwrap();
        assert_eq!(text, b"thread_self;boundary::trap 40\n");
    }
}
