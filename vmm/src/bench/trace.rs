//! Counting instructions: a machine is stepped through its kernel between the marks that a program sets
//! ([`fluke_abi::bench`]).

use std::collections::BTreeMap;
use std::time::Duration;

use fluke_abi::bench::{Mark, News};
use fluke_abi::entry::Entry;
use fluke_abi::ipc::CallWord;
use zerocopy::FromBytes;

use super::Column;
use super::code::Code;
use super::run::Workload;
use super::stretch::{self, Stretch};
use crate::count::{GATE_VECTOR, Ways};
use crate::error::Error;
use crate::paging::read_virtual;
use crate::point::Point;
pub use crate::point::Step;
use crate::vm::Vm;

/// A piece of work that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// Instructions of a visit that are not stepped through, where `syscall` is not the gate: a stub's three before the
/// place where all meet, and `swapgs` and `iretq`; but the last step is counted that comes to these.
const UNSTEPPED: u64 = 4;
/// The same where it is.
const UNSTEPPED_SYSCALL: u64 = 1;

/// The lowest vector of interrupts.
const INTERRUPTS: u64 = 32;

/// What was seen of a piece of work.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Its name.
    pub name: String,
    /// Operations.
    pub operations: u64,
    /// Instructions at CPL 0, without visits of the kernel for interrupts.
    pub instructions: u64,
    /// Visits of the kernel for interrupts.
    pub interrupts: u64,
    /// Addresses of the instructions, without those visits.
    pub addresses: Vec<u64>,
    /// The longest stretch in which nobody else can run.
    pub longest: Stretch,
}

/// Pieces of work whose addresses are kept.
const KEPT: &str = "restart-";

/// Runs a workload that was told to count; every piece of its work, and the code that it ran. Of pieces of the same
/// name, the one with fewest instructions: others had something to do with the time.
///
/// # Errors
/// If the machine cannot be built or stepped, or the program does not come to its end.
pub fn pieces(workload: &Workload, column: &Column) -> Result<(Vec<Piece>, Code), Error> {
    let fails = |why: &str| Error::Control(format!("{}: {why}", workload.on(column)));
    let stopped = |stop| fails(&format!("{stop}"));
    let mut vm = Vm::new(workload.machine(column)?)?;
    let code = vm
        .image
        .as_ref()
        .and_then(|image| Code::of(image))
        .ok_or_else(|| fails("its kernel cannot be stepped through"))?;
    let came = vm.run_to(0, Point::FirstUser, PATIENCE).map_err(stopped)?;
    if !came {
        return Err(fails("it does not begin"));
    }
    let mut pieces: Vec<Piece> = Vec::new();
    loop {
        let mark = next(&mut vm, Point::Told, &fails)?;
        match News::from_number(mark.news) {
            Some(News::Done) => return Ok((pieces, code)),
            Some(News::Begin) => {}
            _ => return Err(fails("it tells of an end without a beginning")),
        }
        let end = next(&mut vm, Point::ToldTraced, &fails)?;
        if News::from_number(end.news) != Some(News::End) || end.name != mark.name {
            return Err(fails("it tells of something else than the end"));
        }
        let steps = vm.trace(0);
        let name = mark.name().unwrap_or_default();
        let kept = name.starts_with(KEPT);
        let (instructions, interrupts, addresses) = count(&code.ways, &steps, kept);
        let piece = Piece {
            name: name.into(),
            operations: mark.operations,
            instructions,
            interrupts,
            addresses,
            longest: stretch::longest(&code, &steps),
        };
        match pieces.iter_mut().find(|other| other.name == name) {
            None => pieces.push(piece),
            Some(other) if piece.instructions < other.instructions => *other = piece,
            Some(_) => {}
        }
    }
}

/// Runs a workload to its next mark, in the way that `to` says; the mark.
///
/// # Errors
/// If it does not come there, or the mark cannot be read: what `fails` makes of why.
pub fn next(vm: &mut Vm, to: Point, fails: &impl Fn(&str) -> Error) -> Result<Mark, Error> {
    match vm.run_to(0, to, PATIENCE) {
        Ok(true) => {}
        Ok(false) => return Err(fails("it hangs")),
        Err(stop) => return Err(fails(&stop.to_string())),
    }
    let told = vm.registers(0).and_then(|registers| {
        let (root, at) = (registers.special.cr3, registers.general.rdi);
        let bytes = read_virtual(vm.memory(), root, at, size_of::<Mark>());
        Mark::read_from_bytes(&bytes).ok()
    });
    told.ok_or_else(|| fails("what it tells cannot be read"))
}

/// Instructions, and visits for interrupts, which are not among them; and addresses, if they are wanted.
fn count(ways: &Ways, steps: &[Step], wanted: bool) -> (u64, u64, Vec<u64>) {
    let (mut instructions, mut interrupts, mut addresses) = (0, 0, Vec::new());
    for visit in visits(ways, steps) {
        if visit.is_interrupt() {
            interrupts += 1;
            continue;
        }
        instructions += visit.instructions();
        if wanted {
            addresses.extend(visit.steps.iter().map(|step| step.rip));
        }
    }
    (instructions, interrupts, addresses)
}

/// A visit of the kernel, or the part of one that was stepped through.
#[derive(Clone, Copy, Debug)]
pub struct Visit<'t> {
    /// Its steps.
    pub steps: &'t [Step],
    /// Instructions that were not stepped through.
    unstepped: u64,
}

impl Visit<'_> {
    /// Instructions.
    pub fn instructions(&self) -> u64 {
        self.steps.len() as u64 + self.unstepped
    }

    /// Whether it is for an interrupt.
    pub fn is_interrupt(&self) -> bool {
        self.steps
            .first()
            .and_then(|step| step.vector)
            .is_some_and(|vector| vector >= INTERRUPTS)
    }

    /// What it is for: an entry point, `page fault`, `interrupt`, `exception`; `the rest of a call` if it began before.
    pub fn cause(&self) -> String {
        let Some(first) = self.steps.first() else {
            return "nothing".into();
        };
        let entry = || {
            let entry = Entry::from_number(CallWord(first.rax).number());
            entry.map_or("no entry point", |entry| entry.row().name)
        };
        match first.vector {
            None => "the rest of a call",
            Some(GATE_VECTOR) => entry(),
            Some(14) => "page fault",
            Some(INTERRUPTS..) => "interrupt",
            Some(_) => "exception",
        }
        .into()
    }
}

/// The visits in a trace.
pub fn visits<'t>(ways: &Ways, steps: &'t [Step]) -> Vec<Visit<'t>> {
    let mut visits = Vec::new();
    let mut from = 0;
    for (at, step) in steps.iter().enumerate() {
        let left = step.rip == ways.swapgs;
        if left || at + 1 == steps.len() {
            let steps = &steps[from..=at];
            let unstepped = match steps[0].rip {
                rip if rip == ways.syscall => UNSTEPPED_SYSCALL,
                rip if rip == ways.trap => UNSTEPPED,
                _ => 0,
            };
            visits.push(Visit { steps, unstepped });
            from = at + 1;
        }
    }
    visits
}

/// Instructions of one operation of each piece of work, by name, without what the marks themselves take.
pub fn per_operation(pieces: &[Piece]) -> BTreeMap<String, f64> {
    let nothing = pieces
        .iter()
        .find(|piece| piece.name == "nothing")
        .map_or(0, |piece| piece.instructions);
    pieces
        .iter()
        .filter(|piece| piece.name != "nothing")
        .map(|piece| {
            let work = piece.instructions.saturating_sub(nothing) as f64;
            (piece.name.clone(), work / piece.operations.max(1) as f64)
        })
        .collect()
}
