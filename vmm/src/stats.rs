//! What happened in a run: exits by cause and vCPU, time by mode, the kernel's own counters.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use fluke_abi::boot::Extent;
use fluke_abi::stats::CpuStats;
use serde::Serialize;

use crate::memory::Memory;
use crate::point::Step;

/// Why a vCPU left the guest for this process. What KVM handles itself (interrupts, timers,
/// `hlt`) is not among these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Cause {
    /// A read of a port.
    PioRead,
    /// A write to a port.
    PioWrite,
    /// Of these, accesses to ports where nothing is.
    UnknownPort,
    /// An access to a physical address where no memory is.
    Mmio,
    /// A kick from another thread.
    Kick,
    /// A triple fault.
    Shutdown,
    /// KVM could not go on.
    InternalError,
    /// Anything else.
    Other,
}

/// Number of causes.
const CAUSES: usize = 8;

/// Counters of one vCPU, written by its thread alone.
#[derive(Debug, Default)]
pub struct VcpuCounters {
    exits: [AtomicU64; CAUSES],
    /// Samples that found the vCPU at CPL 3.
    pub user_samples: AtomicU64,
    /// Samples that found it at CPL 0.
    pub kernel_samples: AtomicU64,
    /// Samples that found it halted.
    pub idle_samples: AtomicU64,
    /// Instructions of the kernel's that were counted on the way to the last point.
    pub instructions: AtomicU64,
    /// All that were executed one by one.
    pub steps: AtomicU64,
    /// All of them, if they were noted.
    pub trace: Mutex<Vec<Step>>,
}

impl VcpuCounters {
    /// Counts an exit; returns how many of the cause there were before.
    pub fn count(&self, cause: Cause) -> u64 {
        self.exits[cause as usize].fetch_add(1, Ordering::Relaxed)
    }

    fn exits(&self, cause: Cause) -> u64 {
        self.exits[cause as usize].load(Ordering::Relaxed)
    }
}

/// Statistics of one vCPU.
#[derive(Clone, Debug, Default, Serialize)]
pub struct VcpuStats {
    /// Exits to the VMM by cause.
    pub exits: Exits,
    /// Where samples found the vCPU; all 0 without sampling.
    pub samples: Samples,
    /// What the kernel counted; all 0 for guests that do not count.
    pub kernel: KernelCounts,
}

/// Exits to the VMM by cause.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Exits {
    /// Reads of ports.
    pub pio_read: u64,
    /// Writes to ports.
    pub pio_write: u64,
    /// Of both, those of ports where nothing is.
    pub unknown_port: u64,
    /// Accesses to physical addresses where no memory is.
    pub mmio: u64,
    /// Kicks.
    pub kick: u64,
    /// Triple faults.
    pub shutdown: u64,
    /// KVM internal errors.
    pub internal_error: u64,
    /// Others.
    pub other: u64,
}

/// Where samples found a vCPU.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Samples {
    /// At CPL 3.
    pub user: u64,
    /// At CPL 0.
    pub kernel: u64,
    /// Halted.
    pub idle: u64,
}

/// [`CpuStats`], for output.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct KernelCounts {
    /// Entry points called, restarts included.
    pub calls: u64,
    /// Calls that were stopped and run again from their registers.
    pub restarts: u64,
    /// Switches from one thread to another.
    pub context_switches: u64,
    /// Page faults resolved from the mapping hierarchy.
    pub soft_faults: u64,
    /// Page faults sent to a keeper.
    pub hard_faults: u64,
    /// Other exceptions.
    pub exceptions: u64,
    /// Interprocessor interrupts sent.
    pub ipis_sent: u64,
    /// Timer interrupts taken.
    pub timer_interrupts: u64,
    /// Times a thread made way at a preemption point.
    pub preemptions: u64,
}

impl From<CpuStats> for KernelCounts {
    fn from(s: CpuStats) -> Self {
        Self {
            calls: s.calls,
            restarts: s.restarts,
            context_switches: s.context_switches,
            soft_faults: s.soft_faults,
            hard_faults: s.hard_faults,
            exceptions: s.exceptions,
            ipis_sent: s.ipis_sent,
            timer_interrupts: s.timer_interrupts,
            preemptions: s.preemptions,
        }
    }
}

impl VcpuStats {
    /// The statistics of vCPU `id` so far.
    pub(crate) fn collect(
        id: u32,
        counters: &VcpuCounters,
        memory: &Memory,
        stats: Option<Extent>,
    ) -> Self {
        let kernel = stats
            .map(|s| s.start + u64::from(id) * size_of::<CpuStats>() as u64)
            .and_then(|at| memory.get::<CpuStats>(at).ok())
            .map(KernelCounts::from)
            .unwrap_or_default();
        let samples = |s: &AtomicU64| s.load(Ordering::Relaxed);
        Self {
            exits: Exits {
                pio_read: counters.exits(Cause::PioRead),
                pio_write: counters.exits(Cause::PioWrite),
                unknown_port: counters.exits(Cause::UnknownPort),
                mmio: counters.exits(Cause::Mmio),
                kick: counters.exits(Cause::Kick),
                shutdown: counters.exits(Cause::Shutdown),
                internal_error: counters.exits(Cause::InternalError),
                other: counters.exits(Cause::Other),
            },
            samples: Samples {
                user: samples(&counters.user_samples),
                kernel: samples(&counters.kernel_samples),
                idle: samples(&counters.idle_samples),
            },
            kernel,
        }
    }
}

/// The statistics of all vCPUs as a table for people.
pub fn table(vcpus: &[VcpuStats]) -> String {
    /// A row: its name, and its value for a vCPU.
    type Row = (&'static str, fn(&VcpuStats) -> u64);
    const ROWS: [Row; 20] = [
        ("exits: port read", |s| s.exits.pio_read),
        ("exits: port write", |s| s.exits.pio_write),
        ("  of these, unknown port", |s| s.exits.unknown_port),
        ("exits: mmio", |s| s.exits.mmio),
        ("exits: kick", |s| s.exits.kick),
        ("exits: triple fault", |s| s.exits.shutdown),
        ("exits: internal error", |s| s.exits.internal_error),
        ("exits: other", |s| s.exits.other),
        ("samples: CPL 3", |s| s.samples.user),
        ("samples: CPL 0", |s| s.samples.kernel),
        ("samples: halted", |s| s.samples.idle),
        ("kernel: calls", |s| s.kernel.calls),
        ("kernel: restarts", |s| s.kernel.restarts),
        ("kernel: context switches", |s| s.kernel.context_switches),
        ("kernel: soft faults", |s| s.kernel.soft_faults),
        ("kernel: hard faults", |s| s.kernel.hard_faults),
        ("kernel: exceptions", |s| s.kernel.exceptions),
        ("kernel: IPIs sent", |s| s.kernel.ipis_sent),
        ("kernel: timer interrupts", |s| s.kernel.timer_interrupts),
        ("kernel: preemptions", |s| s.kernel.preemptions),
    ];
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    let ids = (0..vcpus.len()).map(|id| format!("vcpu{id}"));
    table.set_header(["".into(), "all".into()].into_iter().chain(ids));
    for (name, value) in ROWS {
        let values: Vec<u64> = vcpus.iter().map(value).collect();
        let total: u64 = values.iter().sum();
        let cells = values.iter().map(u64::to_string);
        table.add_row([name.into(), total.to_string()].into_iter().chain(cells));
    }
    format!("{table}\n{}", share(vcpus))
}

/// The share of time at CPL 0 in one line.
fn share(vcpus: &[VcpuStats]) -> String {
    let sum = |f: fn(&Samples) -> u64| vcpus.iter().map(|s| f(&s.samples)).sum::<u64>();
    let (user, kernel) = (sum(|s| s.user), sum(|s| s.kernel));
    match user + kernel {
        0 => "CPL 0 share of busy time: no samples".into(),
        busy => format!(
            "CPL 0 share of busy time: {:.1} % ({busy} samples)",
            100.0 * kernel as f64 / busy as f64
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_has_its_counter_and_row() {
        let counters = VcpuCounters::default();
        assert_eq!(counters.count(Cause::Other), 0);
        assert_eq!(counters.count(Cause::Other), 1);
        counters.kernel_samples.store(1, Ordering::Relaxed);
        counters.user_samples.store(3, Ordering::Relaxed);
        let memory = Memory::new(4096).unwrap();
        let stats = VcpuStats::collect(0, &counters, &memory, None);
        assert_eq!(stats.exits.other, 2);
        let text = table(&[stats.clone(), stats]);
        assert!(text.contains("25.0 % (8 samples)"), "{text}");
        assert!(text.contains("vcpu1"), "{text}");
    }
}
