//! I/O ports of the machine. Only the kernel can reach them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// First port of the console, a 16550 serial port; a byte written to it is printed.
pub const CONSOLE: u16 = 0x3f8;
/// Number of console ports.
pub const CONSOLE_PORTS: u16 = 8;
/// Kernel log: bytes for the host's log, one line at a time.
pub const KERNEL_LOG: u16 = 0xe9;
/// Exit: a 32-bit write ends the machine with that status.
pub const EXIT: u16 = 0xf4;
/// Kernel event: a 32-bit write of an [`Event`] number.
pub const EVENT: u16 = 0xf8;

/// Vector of the interrupt by which the host rings the doorbell (`machine_listen`), on any CPU.
pub const DOORBELL_VECTOR: u8 = 0x22;

/// Probe: a 32-bit write of the number of a [`Probe`](crate::probe::Probe) whose point was come to.
pub const PROBE: u16 = 0xfc;

/// Store: a 32-bit write of the physical address of a [`StoreBlock`] makes the request in it.
pub const STORE: u16 = 0x600;

/// A request to the store, and its answer, as the host reads and writes them ([`crate::store`]).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct StoreBlock {
    /// Which request.
    pub request: u64,
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Bytes to be read or written, or of the file.
    pub size: u64,
    /// Physical address of the bytes.
    pub address: u64,
    /// Out: number of the [`crate::store::Answer`].
    pub answer: u64,
    /// Out: bytes read.
    pub done: u64,
}

/// What the kernel tells the host through [`EVENT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Event {
    /// The first thread is about to run its first user-mode instruction.
    FirstUser = 1,
    /// The kernel cannot go on; the message went to [`KERNEL_LOG`]. The host prints a backtrace
    /// from the writing CPU's registers and ends the machine.
    Panic = 2,
    /// Every CPU is idle, no thread can run, and nothing can wake one.
    Deadlock = 3,
    /// A program tells of something, in `machine_tell`: where, in its own space, is in `rdi` of the writing
    /// CPU.
    Told = 4,
}

impl Event {
    /// The event with number `n`, if there is one.
    pub const fn from_number(n: u32) -> Option<Self> {
        match n {
            1 => Some(Self::FirstUser),
            2 => Some(Self::Panic),
            3 => Some(Self::Deadlock),
            4 => Some(Self::Told),
            _ => None,
        }
    }
}
