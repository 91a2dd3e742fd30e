//! CPUs: what runs on each, and where it is.

use fluke_abi::layout::KERNEL_IMAGE;
use serde::Serialize;

use super::kernel::{Kernel, Name};
use super::table::{Line, Listing, Row, hex, notes, or_dash};
use super::{Machine, Report, Result};
use crate::vcpu::Registers;

/// A CPU.
#[derive(Serialize)]
pub struct Cpu {
    /// Its number.
    pub number: u64,
    /// `user`, `kernel`, `halted`, or `ended`.
    pub mode: &'static str,
    /// The thread that runs on it, as the kernel has it.
    pub thread: Option<Name>,
    /// That thread's space.
    space: Option<Name>,
    rip: u64,
    /// Function and line, in the kernel's image.
    function: Option<String>,
    /// The kernel says that it waits for an interrupt.
    idle: bool,
    /// The kernel says that it runs user code; none before it has come up.
    pub in_user: Option<bool>,
    /// When its timer will fire, nanoseconds since boot; 0 if it is off.
    timer: u64,
    #[serde(skip)]
    registers: Option<Registers>,
}

impl Cpu {
    /// Whether a thread is the one that runs here.
    pub fn runs(&self, thread: &Name) -> bool {
        self.thread.as_ref() == Some(thread)
    }

    /// The general registers, by the names that a trap frame has for them.
    pub fn general(&self) -> Vec<(String, u64)> {
        let Some(Registers {
            general: r,
            special: s,
            ..
        }) = &self.registers
        else {
            return Vec::new();
        };
        let all = [
            ("r15", r.r15),
            ("r14", r.r14),
            ("r13", r.r13),
            ("r12", r.r12),
            ("rbp", r.rbp),
            ("rbx", r.rbx),
            ("r11", r.r11),
            ("r10", r.r10),
            ("r9", r.r9),
            ("r8", r.r8),
            ("rdi", r.rdi),
            ("rsi", r.rsi),
            ("rdx", r.rdx),
            ("rcx", r.rcx),
            ("rax", r.rax),
            ("rip", r.rip),
            ("cs", s.cs.selector.into()),
            ("rflags", r.rflags),
            ("rsp", r.rsp),
            ("ss", s.ss.selector.into()),
        ];
        all.map(|(name, value)| (name.into(), value)).into()
    }
}

impl Row for Cpu {
    const COLUMNS: &'static [&'static str] =
        &["CPU", "MODE", "THREAD", "SPACE", "RIP", "IN", "TIMER"];

    fn cells(&self) -> Vec<String> {
        let index = |name: &Option<Name>| or_dash(&name.as_ref().map(|name| name.index));
        vec![
            self.number.to_string(),
            self.mode.into(),
            index(&self.thread),
            index(&self.space),
            hex(self.rip),
            or_dash(&self.function),
            match self.timer {
                0 => "off".into(),
                ns => format!("{}.{:06} s", ns / 1_000_000_000, ns / 1000 % 1_000_000),
            },
        ]
    }
}

/// The CPUs, without the names of functions.
pub fn cpus(kernel: &Kernel<'_>, machine: &Machine<'_>) -> Result<Vec<Cpu>> {
    let (first, count) = kernel.scheduler.field("cpus")?.elements()?;
    let mut cpus = Vec::new();
    for (number, registers) in (0..count).zip(&machine.vcpus) {
        let state = first.nth(number)?;
        let running = kernel.follow(state.field("current")?)?;
        let (mut thread, mut space) = (None, None);
        if let Some(entity) = running {
            let runs = kernel.thread_of(entity.value)?;
            space = kernel.name_in(runs.value.field("space")?)?;
            thread = Some(runs.name);
        }
        let hardware = state.field("hardware")?.option()?;
        let in_user = match hardware {
            Some(cpu) => Some(cpu.deref()?.field("in_user")?.bool()?),
            None => None,
        };
        cpus.push(Cpu {
            number,
            mode: match registers {
                None => "ended",
                Some(registers) if registers.halted => "halted",
                Some(registers) if registers.special.cs.dpl == 3 => "user",
                Some(_) => "kernel",
            },
            thread,
            space,
            rip: registers.map_or(0, |registers| registers.general.rip),
            function: None,
            idle: state.field("idle")?.bool()?,
            in_user,
            timer: state.field("timer")?.int()?,
            registers: *registers,
        });
    }
    Ok(cpus)
}

/// The view.
pub fn view(kernel: &Kernel<'_>, machine: &Machine<'_>) -> Result<Report> {
    let symbols = machine.symbols()?;
    let mut rows = Vec::new();
    for mut cpu in cpus(kernel, machine)? {
        if cpu.rip >= KERNEL_IMAGE {
            cpu.function = symbols.frames(cpu.rip).into_iter().next();
        }
        rows.push(Line::Good(cpu));
    }
    let listing = Listing {
        notes: notes(kernel)?,
        rows,
    };
    listing.report()
}
