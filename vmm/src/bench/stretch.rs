//! Stretches of the kernel in which nobody else can run: from where it is entered, interrupts are allowed, or a
//! preemption point is passed, to where that happens next, or the kernel is left.

use std::collections::HashMap;

use fluke_abi::probe::Probe;

use super::code::Code;
use super::trace::{Step, visits};
use crate::crash::Symbols;

/// RFLAGS.IF.
const INTERRUPTS: u64 = 1 << 9;

/// A stretch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stretch {
    /// Instructions.
    pub instructions: u64,
    /// Bytes that string instructions moved, each of which counts as one.
    pub bytes: u64,
    /// What the kernel was entered for.
    pub cause: String,
    /// Its instructions' addresses.
    addresses: Vec<u64>,
}

impl Stretch {
    /// Whether it takes longer than another, at a word for an instruction.
    fn is_longer(&self, other: &Self) -> bool {
        let cost = |stretch: &Self| stretch.instructions + stretch.bytes / 8;
        cost(self) > cost(other)
    }

    /// What it is, with the functions that most of it lies in.
    pub fn describe(&self, image: &[u8]) -> String {
        let mut counts: HashMap<String, u64> = HashMap::new();
        if let Some(symbols) = Symbols::new(image) {
            let mut names: HashMap<u64, String> = HashMap::new();
            for &address in &self.addresses {
                let name = names.entry(address).or_insert_with(|| {
                    let frames = symbols.frames(address);
                    let frame = frames.first().map_or("?", String::as_str);
                    let name = frame.split(" (").next().unwrap_or(frame);
                    name.trim_start_matches("fluke_kernel::").to_string()
                });
                *counts.entry(name.clone()).or_default() += 1;
            }
        }
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        let most: Vec<_> = counts
            .iter()
            .take(2)
            .map(|(name, count)| format!("{name} {} %", 100 * count / self.instructions.max(1)))
            .collect();
        format!("{} ({})", self.cause, most.join(", "))
    }
}

/// The longest stretch of a trace.
pub fn longest(code: &Code, steps: &[Step]) -> Stretch {
    let mut longest = Stretch::default();
    for visit in visits(&code.ways, steps) {
        let cause = visit.cause();
        let fresh = || Stretch {
            cause: cause.clone(),
            ..Stretch::default()
        };
        let mut stretch = fresh();
        let mut before = 0;
        for step in visit.steps {
            let ends = step.rflags & INTERRUPTS != 0
                || step.vector.is_some()
                || code.probe(step.rip) == Some(Probe::PreemptionPoint);
            if ends {
                if stretch.is_longer(&longest) {
                    longest = stretch;
                }
                stretch = fresh();
            }
            stretch.instructions += 1;
            stretch.addresses.push(step.rip);
            // A long one is come to again in its middle.
            if step.rip != before {
                stretch.bytes += code.string(step.rip).map_or(0, |bytes| bytes * step.rcx);
            }
            before = step.rip;
        }
        if stretch.is_longer(&longest) {
            longest = stretch;
        }
    }
    longest
}
