//! Exported state of objects (`struct fluke_<type>_state`).
//!
//! The state of an object never records who refers to it. Links to other objects travel beside
//! these structures, through reference objects.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

bitflags! {
    /// Memory permissions (`fluke_prot_t`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Prot: u64 {
        /// Reading.
        const READ = 1;
        /// Writing.
        const WRITE = 2;
        /// Executing.
        const EXECUTE = 4;
    }
}

bitflags! {
    /// Flags in [`ThreadState::flags`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ThreadFlags: u64 {
        /// The thread had been stopped before its state was taken. `set_state` without it lets the thread run.
        const STOPPED = 1;
        /// As client of a connection, the thread is the sender.
        const CLIENT_SENDER = 2;
        /// As server of a connection, the thread is the sender.
        const SERVER_SENDER = 4;
        /// Exceptions go to the thread's own handlers.
        const EXCEPTION_ENABLE = 8;
        /// An interrupt is held back until exceptions are enabled.
        const INTERRUPT_PENDING = 16;
        /// A client alert is held back.
        const CLIENT_ALERT_PENDING = 32;
        /// A server alert is held back.
        const SERVER_ALERT_PENDING = 64;
    }
}

/// User-mode registers, in the order in which a trap pushes them.
///
/// `rip` is [`crate::layout::GATE`] for a thread whose call, named by `rax`, is still to be made.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are the registers of that name")]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rax: u64,
    pub rip: u64,
    pub rflags: u64,
    pub rsp: u64,
}

/// Addresses of a thread's exception handlers; 0 is none (fluke-api 3.1).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Handlers {
    /// Synchronous exceptions.
    pub trap: u64,
    /// Software interrupts.
    pub interrupt: u64,
    /// Alerts from the server of the thread's connection as client.
    pub client_alert: u64,
    /// Alerts from the client of the thread's connection as server.
    pub server_alert: u64,
}

/// Registers saved when a handler is entered (`fluke_thread_saved_state`), and reloaded by
/// `thread_return_from_exception`.
///
/// At entry `rax` is the thread's own address, `rdx` the exception code, `rcx` its subcode.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are the registers of that name")]
pub struct SavedState {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// Bytes of an `fxsave64` image.
pub const FPU_BYTES: usize = 512;

/// State of a thread (fluke-api 3.2, 13.3).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ThreadState {
    /// Hash of the object; ignored by `set_state`.
    pub hash: u64,
    /// Address of the thread object in the thread's own space.
    pub thread_va: u64,
    /// Identifier given to the thread by its scheduler; the kernel only keeps it.
    pub sched_val: u64,
    /// [`ThreadFlags`].
    pub flags: u64,
    /// Priority, 0 (lowest) to [`PRIORITY_MAX`]; the kernel's own scheduler runs the highest.
    pub priority: u64,
    /// Registers.
    pub registers: Registers,
    /// Exception handlers.
    pub handlers: Handlers,
    /// Registers saved at the last exception.
    pub saved: SavedState,
    /// Address of the port set that the thread serves, in its own space; 0 is none.
    pub server_pset: u64,
    /// x87 and SSE registers, as `fxsave64` stores them. Ignored by `set_state` if all zero.
    pub fpu: [u8; FPU_BYTES],
}

impl Default for ThreadState {
    fn default() -> Self {
        <Self as zerocopy::FromZeros>::new_zeroed()
    }
}

/// Highest priority of a thread.
pub const PRIORITY_MAX: u64 = 31;
/// Priority of a thread nobody gave one.
pub const PRIORITY_DEFAULT: u64 = 8;

/// State of a space. Link: keeper (port).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TaskState {
    /// Hash of the object.
    pub hash: u64,
}

/// State of a region. Links: space, keeper (port).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RegionState {
    /// Hash of the object.
    pub hash: u64,
    /// First address in the exporting space; page-aligned.
    pub start_va: u64,
    /// Bytes; whole pages.
    pub size: u64,
    /// Upper limit of permissions, [`Prot`].
    pub prot: u64,
}

/// State of a mapping. Links: region, space.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct MappingState {
    /// Hash of the object.
    pub hash: u64,
    /// Offset in the region, bytes; page-aligned.
    pub region_off: u64,
    /// First address in the destination space; page-aligned.
    pub start_va: u64,
    /// Bytes; whole pages.
    pub size: u64,
    /// Permissions, [`Prot`].
    pub prot: u64,
}

/// State of a port. Link: port set.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PortState {
    /// Hash of the object.
    pub hash: u64,
    /// Value handed to the server with each message.
    pub alias: u64,
}

/// State of a port set. No links.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PsetState {
    /// Hash of the object.
    pub hash: u64,
}

/// State of a mutex. Link: owner (thread).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct MutexState {
    /// Hash of the object.
    pub hash: u64,
    /// Attributes; kept, without effect.
    pub flags: u64,
    /// 1 if locked.
    pub locked: u64,
}

/// State of a condition variable. Link: inheritor (thread).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CondState {
    /// Hash of the object.
    pub hash: u64,
    /// Attributes; kept, without effect.
    pub flags: u64,
}

/// What `machine_census` stores: what the kernel's pool holds at this moment.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Census {
    /// Objects, by [`crate::object::Type`] in order of numbers.
    pub objects: [u64; 9],
    /// Pages in use for page tables.
    pub frames: u64,
}

/// What `region_search` stores for each object it finds (`fluke_obspec_t`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ObjectSpec {
    /// Address of the object in the region's space.
    pub object: u64,
    /// [`crate::object::Type`].
    pub kind: u64,
}
