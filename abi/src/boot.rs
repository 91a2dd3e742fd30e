//! What the host hands over: [`BootInfo`] to the kernel, [`RootInfo`] to the root program, and
//! what a kernel image says of itself, [`ImageInfo`].
//!
//! # How a CPU starts
//! Every CPU enters the kernel image's entry point in 64-bit mode with paging on, interrupts off,
//! `CR0 = PE|MP|ET|NE|WP|AM|PG`, `CR4 = PAE|OSFXSR|OSXMMEXCPT` (+ `SMEP`, `SMAP` where CPUID has
//! them), `EFER = LME|LMA|NXE`, flat segments with the selectors below, `rdi` = number of the CPU,
//! `rsi` = virtual address of [`BootInfo`], `rsp` = top of stack slot `rdi`. The local APIC is
//! present and untouched.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Kernel code selector at entry and in the kernel's own GDT.
pub const KERNEL_CS: u16 = 0x08;
/// Kernel data selector.
pub const KERNEL_SS: u16 = 0x10;
/// User data selector. `sysret` wants it 8 below the code selector.
pub const USER_SS: u16 = 0x1b;
/// User code selector.
pub const USER_CS: u16 = 0x23;

/// Trap instruction in the gate page. The host decides by what the machine can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Gate {
    /// `ud2` (0F 0B): works everywhere.
    Ud2 = 0,
    /// `syscall` (0F 05): where it enters CPL 0 as it should.
    Syscall = 1,
}

/// A run of physical memory.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Extent {
    /// Physical address, page-aligned.
    pub start: u64,
    /// Bytes, whole pages.
    pub size: u64,
}

/// Memory that the root space has mapped from the start.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Segment {
    /// Virtual address in the root space, page-aligned.
    pub va: u64,
    /// Physical address, page-aligned.
    pub start: u64,
    /// Bytes, whole pages.
    pub size: u64,
    /// [`crate::state::Prot`] bits.
    pub prot: u64,
}

/// Most CPUs a kernel can use.
pub const CPUS_MAX: u32 = 1024;

/// Most segments a root space can start with.
pub const SEGMENTS_MAX: usize = 24;
/// Most boot modules.
pub const MODULES_MAX: usize = 14;
/// Bytes for the name of a module, NUL-padded.
pub const MODULE_NAME_BYTES: usize = 48;

/// [`BootInfo::magic`].
pub const BOOT_MAGIC: u64 = u64::from_le_bytes(*b"FLUKEVM1");

/// What the kernel needs to know of the machine. One page, in the direct map.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BootInfo {
    /// [`BOOT_MAGIC`].
    pub magic: u64,
    /// [`crate::ABI_VERSION`].
    pub abi_version: u32,
    /// CPUs that enter the kernel; their APIC ids are 0 to `cpus - 1`.
    pub cpus: u32,
    /// [`Gate`] number.
    pub gate: u32,
    /// Kernel stack slots at [`crate::layout::KERNEL_STACKS`]; the first `cpus` belong to the CPUs.
    pub stacks: u32,
    /// Whether the kernel has preemption points: 1 for preemption level `partial`, 0 for `none`.
    pub preemption_points: u32,
    /// Whether the machine has a store, [`crate::store`]: 1 or 0.
    pub store: u32,
    /// Frequency of the time-stamp counter, kHz.
    pub tsc_khz: u64,
    /// Frequency of the local APIC timer at divide by 1, kHz.
    pub apic_timer_khz: u64,
    /// What the clock shows at first, nanoseconds: it goes on from a checkpoint that is restored.
    pub clock: u64,
    /// All memory of the machine, bytes; it starts at physical address 0.
    pub memory_size: u64,
    /// Physical address of the top-level page table that every CPU starts with. Its upper half
    /// (direct map, stacks, image) is shared by all spaces.
    pub page_table: u64,
    /// Physical address of the page table of the kernel's own space: as `page_table`, but user mode has
    /// the gate page and all of the image that is not in a [`SUPERVISOR_SEGMENT`].
    pub own_page_table: u64,
    /// The kernel's pool, zeroed. The kernel never takes memory from anywhere else.
    pub pool: Extent,
    /// `cpus` blocks of [`crate::stats::CpuStats`], zeroed.
    pub stats: Extent,
    /// The gate page, filled in by the host.
    pub gate_page: u64,
    /// First instruction of the root program.
    pub root_entry: u64,
    /// Initial stack pointer of the root program.
    pub root_stack: u64,
    /// Entries used in `segments`.
    pub segment_count: u64,
    /// The root space's memory: program, stack, [`RootInfo`], the object page, modules, and all
    /// remaining memory at [`crate::layout::ROOT_MEMORY`].
    pub segments: [Segment; SEGMENTS_MAX],
    /// [`crate::mutant::Mutant`] number, for kernels that have such bugs.
    pub mutant: u64,
}

const _: () = assert!(size_of::<BootInfo>() <= 4096);

/// What a boot module is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum ModuleKind {
    /// An ELF program; the first one is the program to run.
    Program = 0,
    /// A file handed over with `--file`.
    File = 1,
}

/// A boot module.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Module {
    /// Name, NUL-padded UTF-8.
    pub name: [u8; MODULE_NAME_BYTES],
    /// [`ModuleKind`] number.
    pub kind: u64,
    /// Virtual address in the root space, page-aligned; the rest of the last page is zero.
    pub va: u64,
    /// Bytes.
    pub size: u64,
}

/// What the root program needs to know. One page at [`crate::layout::ROOT_INFO`], read-only.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RootInfo {
    /// [`BOOT_MAGIC`].
    pub magic: u64,
    /// [`crate::ABI_VERSION`].
    pub abi_version: u32,
    /// CPUs of the machine.
    pub cpus: u32,
    /// Frequency of the time-stamp counter, kHz.
    pub tsc_khz: u64,
    /// Bytes of memory at [`crate::layout::ROOT_MEMORY`].
    pub memory_size: u64,
    /// Entries used in `modules`.
    pub module_count: u64,
    /// Boot modules.
    pub modules: [Module; MODULES_MAX],
    /// Bytes used in `args`.
    pub args_size: u64,
    /// The program's name and arguments, each ended by a NUL.
    pub args: [u8; ARGS_BYTES],
}

/// Most bytes of arguments.
pub const ARGS_BYTES: usize = 2048;

const _: () = assert!(size_of::<RootInfo>() <= 4096);

/// Flag of a kernel image's segment, beside its permissions: what the CPU and the stubs need at a trap,
/// before they have left the kernel's own space. User mode never reaches it. (One of those that ELF
/// leaves to the operating system.)
pub const SUPERVISOR_SEGMENT: u32 = 0x10_0000;

/// Section of a kernel image that holds its [`ImageInfo`].
pub const IMAGE_SECTION: &str = ".fluke.image";

/// [`ImageInfo::magic`].
pub const IMAGE_MAGIC: u64 = u64::from_le_bytes(*b"FLUKEIMG");

/// What a kernel image says of itself, in the section [`IMAGE_SECTION`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ImageInfo {
    /// [`IMAGE_MAGIC`].
    pub magic: u64,
    /// [`crate::ABI_VERSION`].
    pub abi_version: u32,
    /// Whether every thread needs a kernel stack slot of its own, beside those of the CPUs.
    pub stack_per_thread: u32,
    /// Bytes of a kernel stack. Slot `i` is the `2 * stack_bytes` from
    /// `KERNEL_STACKS + i * 2 * stack_bytes`; its lower half is left unmapped.
    pub stack_bytes: u64,
    /// Name of the execution model, NUL-padded, such as `interrupt`.
    pub config: [u8; 16],
}
