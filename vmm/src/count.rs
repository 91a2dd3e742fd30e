//! Counting the instructions that the kernel executes, by the entry point called.
//!
//! Between two visits of the kernel a program runs freely, with hardware breakpoints on the two
//! ways in; a visit is stepped through, instruction by instruction, up to the `iretq` that ends it.
//! A visit that puts its thread to sleep goes on with another thread, and ends when that one
//! returns to user mode: a round trip of RPC is two visits, that of the client's call and that of
//! the server's. Needs one vCPU, and a host whose breakpoints stop CPL 0 code.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use fluke_abi::entry::Entry;
use fluke_abi::layout::{DIRECT_MAP, GATE, KERNEL_IMAGE};
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug,
};
use kvm_ioctls::VcpuFd;
use object::{Object, ObjectSection, ObjectSymbol};

use crate::crash::demangle;
use crate::error::Error;
use crate::memory::Memory;
use crate::profile::Profile;

/// Instructions of every visit, by what the visit was for.
#[derive(Debug, Default)]
pub struct Counts {
    visits: BTreeMap<String, Vec<u32>>,
    /// Where they were, if that is wanted.
    pub profile: Option<Profile>,
}

/// Counts that a vCPU adds to and its machine reads.
pub type SharedCounts = Arc<Mutex<Counts>>;

/// Visits of one kind.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Visits {
    /// Entry point, or `page fault`, `interrupt`, `exception`.
    pub entry: String,
    /// How many.
    pub visits: usize,
    /// Fewest CPL 0 instructions.
    pub min: u32,
    /// Half of the visits took at most so many.
    pub median: u32,
    /// Most.
    pub max: u32,
    /// All together.
    pub total: u64,
}

impl Counts {
    fn add(&mut self, entry: String, instructions: u32) {
        self.visits.entry(entry).or_default().push(instructions);
    }

    /// One row for each kind of visit, in order of names.
    pub fn rows(&self) -> Vec<Visits> {
        let row = |(entry, counts): (&String, &Vec<u32>)| {
            let mut sorted = counts.clone();
            sorted.sort_unstable();
            Visits {
                entry: entry.clone(),
                visits: sorted.len(),
                min: sorted[0],
                median: sorted[sorted.len() / 2],
                max: sorted[sorted.len() - 1],
                total: sorted.iter().map(|count| u64::from(*count)).sum(),
            }
        };
        self.visits.iter().map(row).collect()
    }
}

/// The rows of [`Counts`] for people.
pub fn table(rows: &[Visits]) -> String {
    let mut text = format!(
        "{:40} {:>7} {:>7} {:>7} {:>7} {:>9}\n",
        "CPL 0 instructions", "visits", "min", "median", "max", "total"
    );
    for Visits {
        entry,
        visits,
        min,
        median,
        max,
        total,
    } in rows
    {
        text.push_str(&format!(
            "{entry:40} {visits:>7} {min:>7} {median:>7} {max:>7} {total:>9}\n"
        ));
    }
    text
}

/// Where a kernel image is entered and left.
#[derive(Clone, Copy, Debug)]
pub struct Ways {
    /// Where all exception and interrupt stubs meet.
    pub trap: u64,
    /// Where `syscall` goes.
    pub syscall: u64,
    /// Where all ways from user mode meet: the registers that calls change are on the frame.
    pub enter: u64,
    /// Where all interrupts of the kernel itself meet.
    pub from_kernel: u64,
    /// Where, on the way to user mode, all registers but `rsp` are the thread's, and that points to its vector.
    pub leaving: u64,
    /// The `swapgs` before the `iretq` to user mode.
    pub swapgs: u64,
}

impl Ways {
    /// Those of an image; none if it has no such symbols.
    pub fn of(image: &[u8]) -> Option<Self> {
        let file = object::File::parse(image).ok()?;
        let find = |name: &str| {
            let named = |s: &object::Symbol<'_, '_>| s.name().is_ok_and(|n| demangle(n) == name);
            file.symbols().find(named).map(|s| s.address())
        };
        let leave = find("fluke_kernel::arch::entry::leave_to_user")?;
        let mut sections = file.sections();
        let code = sections.find_map(|section| section.data_range(leave, 128).ok()?)?;
        let position = |wanted: &[u8]| {
            let mut windows = code.windows(wanted.len());
            windows.position(|bytes| bytes == wanted)
        };
        let (drop, swap) = (position(&DROP_VECTOR)?, position(&SWAPGS_IRETQ)?);
        Some(Self {
            trap: find("fluke_kernel::arch::entry::trap")?,
            syscall: find("fluke_kernel::arch::entry::syscall_entry")?,
            enter: find("fluke_kernel::arch::entry::enter")?,
            from_kernel: find("fluke_kernel::arch::entry::from_kernel")?,
            leaving: leave + drop as u64,
            swapgs: leave + swap as u64,
        })
    }

    /// Stops a vCPU where it enters the kernel next.
    ///
    /// # Errors
    /// If the host refuses.
    pub fn await_entry(&self, fd: &VcpuFd) -> Result<(), Error> {
        let mut debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP,
            ..Default::default()
        };
        debug.arch.debugreg[0] = self.trap;
        debug.arch.debugreg[1] = self.syscall;
        // Both global, on execution.
        debug.arch.debugreg[7] = 0x400 | 1 << 1 | 1 << 3;
        fd.set_guest_debug(&debug)
            .map_err(Error::kvm("stopping the guest at a point"))
    }
}

/// `add rsp, 16`: drops vector and error code.
const DROP_VECTOR: [u8; 4] = [0x48, 0x83, 0xc4, 0x10];

/// `swapgs`, `iretq`: the way to user code. Hosts need not stop between the two.
pub const SWAPGS_IRETQ: [u8; 5] = [0x0f, 0x01, 0xf8, 0x48, 0xcf];

/// Instructions of an exception stub before [`Ways::trap`]: error code, vector, jump.
const STUB_INSTRUCTIONS: u32 = 3;

/// The instruction that waits for an interrupt.
pub const HLT: u8 = 0xf4;
/// `sti`, `hlt`: how the kernel does.
const STI_HLT: [u8; 2] = [0xfb, HLT];

/// Whether what comes next in the kernel is to wait for an interrupt. With interrupts on that is not stepped
/// through: one that is taken between the two instructions would be waited for in vain.
pub fn waits(memory: &Memory, rip: u64) -> bool {
    let code = memory.get::<[u8; 2]>(rip.wrapping_sub(KERNEL_IMAGE));
    code.is_ok_and(|code| code == STI_HLT || code[0] == HLT)
}

/// Steps one vCPU.
pub struct Counter {
    ways: Ways,
    counts: SharedCounts,
    visit: Option<(String, u32)>,
}

impl Counter {
    /// A counter for a kernel image, armed; none if the image has no such symbols or the host
    /// refuses.
    pub fn new(fd: &VcpuFd, image: &[u8], counts: SharedCounts) -> Option<Self> {
        let counter = Self {
            ways: Ways::of(image)?,
            counts,
            visit: None,
        };
        counter.ways.await_entry(fd).is_ok().then_some(counter)
    }

    fn step(fd: &VcpuFd) {
        let debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
            ..Default::default()
        };
        // As below.
        let _ = fd.set_guest_debug(&debug);
    }

    /// After a debug exit.
    pub fn stopped(&mut self, fd: &VcpuFd, memory: &Memory) {
        let Ok(regs) = fd.get_regs() else { return };
        let counts = self.counts.clone();
        let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
        let begins = self.visit.is_none();
        let visit = self.visit.get_or_insert_with(|| {
            if regs.rip == self.ways.syscall {
                (entry_name(regs.rax), 0)
            } else {
                (cause(memory, regs.rsp, regs.rax), STUB_INSTRUCTIONS)
            }
        });
        let instructions = &mut visit.1;
        if let Some(profile) = &mut counts.profile {
            if begins {
                profile.unseen(regs.rip, *instructions);
            }
            profile.step(memory, regs.rip, regs.rsp);
        }
        if begins {
            return Self::step(fd);
        }
        *instructions += 1;
        if waits(memory, regs.rip) {
            // It ends when a thread is found for the CPU.
            *instructions += STUB_INSTRUCTIONS;
            drop(counts);
            // As below.
            let _ = self.ways.await_entry(fd);
            return;
        }
        if regs.rip == self.ways.trap {
            return Self::step(fd);
        }
        if regs.rip == self.ways.swapgs
            && let Some((entry, instructions)) = self.visit.take()
        {
            if let Some(profile) = &mut counts.profile {
                // The `iretq`.
                profile.unseen(regs.rip, 1);
                profile.leave(&entry);
            }
            counts.add(entry, instructions + 2);
            drop(counts);
            // Refused, the machine runs on, and the table lacks visits.
            let _ = self.ways.await_entry(fd);
        }
    }
}

fn entry_name(rax: u64) -> String {
    match Entry::from_number(rax as u16) {
        Some(entry) => entry.row().name.into(),
        None => "no entry point".into(),
    }
}

/// Vector of calls.
pub const GATE_VECTOR: u64 = 6;

/// What a trap was for, by the frame at `rsp`: vector, error code, instruction pointer.
fn cause(memory: &Memory, rsp: u64, rax: u64) -> String {
    let word = |n: u64| {
        memory
            .get::<u64>(rsp.wrapping_sub(DIRECT_MAP) + n * 8)
            .unwrap_or(0)
    };
    match (word(0), word(2)) {
        (GATE_VECTOR, GATE) => entry_name(rax),
        (14, _) => "page fault".into(),
        (32.., _) => "interrupt".into(),
        _ => "exception".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_the_extremes_and_the_median() {
        let mut counts = Counts::default();
        for instructions in [9, 1, 5] {
            counts.add("thread_self".into(), instructions);
        }
        let row = &counts.rows()[0];
        assert_eq!((row.visits, row.min, row.median, row.max), (3, 1, 5, 9));
        assert_eq!(row.total, 15);
        assert!(table(&counts.rows()).contains("thread_self"));
    }
}
