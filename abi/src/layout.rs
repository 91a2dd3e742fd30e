//! Virtual addresses that host, kernel and programs agree on.
//!
//! ```text
//! 0x0000_0000_0000_1000  VM_MIN            lowest address a program may map
//! 0x0000_0000_0400_0000  ENTRY_MIN         entry-point area: gate page (Fluke's own x86 address)
//! 0x0000_0000_0440_0000  ENTRY_MAX
//! 0x0000_0000_1000_0000  PROGRAM_BASE      programs are linked here
//! 0x0000_0001_0000_0000  ROOT_MEMORY       the root program sees all user memory here
//! 0x0000_7fff_ffff_f000  VM_MAX
//! 0xffff_8000_0000_0000  DIRECT_MAP        all physical memory but the kernel's text; RW, NX
//! 0xffff_ff00_0000_0000  KERNEL_STACKS     kernel stacks, each above an unmapped guard page
//! 0xffff_ffff_8000_0000  KERNEL_IMAGE      kernel image: physical address + KERNEL_IMAGE
//! ```

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;

/// Lowest virtual address that a space may use (`FLUKE_VM_MIN`).
pub const VM_MIN: u64 = 0x1000;
/// End of the virtual addresses that a space may use (`FLUKE_VM_MAX`), exclusive. The page above
/// stays unmapped, so that no instruction pointer runs into the non-canonical hole.
pub const VM_MAX: u64 = 0x7fff_ffff_f000;

/// Start of the entry-point area (`FLUKE_ENTRY_MIN`). No region or mapping may overlap it.
pub const ENTRY_MIN: u64 = 0x0400_0000;
/// End of the entry-point area (`FLUKE_ENTRY_MAX`), exclusive.
pub const ENTRY_MAX: u64 = 0x0440_0000;

/// The gate page: its first three bytes are the trap instruction (`ud2` or `syscall`) and `ret`.
pub const GATE: u64 = ENTRY_MIN;
/// Bytes of the trap instruction. A saved instruction pointer of [`GATE`] means that the call in
/// the registers is still to be made; [`GATE_DONE`] means that it is complete.
pub const GATE_INSTRUCTION_BYTES: u64 = 2;
/// Instruction pointer of a thread whose call is complete.
pub const GATE_DONE: u64 = GATE + GATE_INSTRUCTION_BYTES;

/// Programs are linked from here.
pub const PROGRAM_BASE: u64 = 0x1000_0000;

/// The root program's read-only [`crate::boot::RootInfo`].
pub const ROOT_INFO: u64 = 0x0800_0000;
/// Boot modules, each on pages of its own, read-only, in the root program.
pub const ROOT_MODULES: u64 = 0x40_0000_0000;
/// The page with the root program's own objects: its thread, its space, and then references to the
/// kernel's drivers ([`crate::driver`]).
pub const ROOT_OBJECTS: u64 = 0x0900_0000;
/// Top of the root program's stack, exclusive.
pub const ROOT_STACK_TOP: u64 = 0x0a00_0000;
/// All user memory as the root program sees it: readable, writable, not executable, zeroed.
pub const ROOT_MEMORY: u64 = 0x1_0000_0000;

/// Direct map of physical memory in the kernel. Of the 2 MiB pages that hold the kernel image there are
/// only its constants, read-only, and its data: no writable alias of kernel text exists.
pub const DIRECT_MAP: u64 = 0xffff_8000_0000_0000;
/// First kernel stack slot.
pub const KERNEL_STACKS: u64 = 0xffff_ff00_0000_0000;
/// Virtual minus physical address of the kernel image.
pub const KERNEL_IMAGE: u64 = 0xffff_ffff_8000_0000;
/// Physical address at which the kernel image starts.
pub const KERNEL_PHYSICAL: u64 = 0x20_0000;
