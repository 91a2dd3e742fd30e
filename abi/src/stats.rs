//! Counters that the kernel keeps for the host, one block for each CPU.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What happened on one CPU since boot. The kernel only adds; the host reads.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(64))]
pub struct CpuStats {
    /// Entry points called, restarts included.
    pub calls: u64,
    /// Calls that were stopped and run again from their registers.
    pub restarts: u64,
    /// Switches from one thread to another.
    pub context_switches: u64,
    /// Page faults (by user code or within a call) resolved from the mapping hierarchy.
    pub soft_faults: u64,
    /// Page faults sent to a keeper.
    pub hard_faults: u64,
    /// Exceptions other than page faults, insanities included.
    pub exceptions: u64,
    /// Interprocessor interrupts sent.
    pub ipis_sent: u64,
    /// Timer interrupts taken.
    pub timer_interrupts: u64,
    /// Times a thread made way at a preemption point.
    pub preemptions: u64,
    /// Room to the end of a cache line.
    pub reserved: [u64; 7],
}
