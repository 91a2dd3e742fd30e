//! Per-CPU state that the entry stubs and the CPU itself read, and how a CPU is set up.

use core::arch::asm;
use core::mem::offset_of;
use core::ptr::NonNull;
use core::sync::atomic::{self, AtomicU32};

use fluke_abi::boot::{Gate, KERNEL_CS, KERNEL_SS};
use fluke_abi::stats::CpuStats;

use super::entry::{self, Stubs};
use super::instructions::{rdmsr, wrmsr};
use crate::sched::CpuState;

mod in_user;
#[cfg(test)]
mod shootdown_model;

pub use in_user::InUser;

/// User registers as a trap leaves them: pushed by the entry stub (the first fifteen), the stub or
/// the CPU (vector, error code), and the CPU. It is the start of the thread, so a trap from user
/// mode writes the thread's state straight to its place in both execution models. The CPU wants its end to be
/// aligned to 16 bytes (SDM vol. 3, 6.14.2).
#[derive(Clone, Copy, Default)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are the registers of that name")]
pub struct Frame {
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
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// Bytes of a [`Frame`].
pub const FRAME_BYTES: u64 = size_of::<Frame>() as u64;

/// What the stubs find at `gs:0`.
#[repr(C, align(64))]
pub struct Cpu {
    /// Address of this structure.
    pub this: *const Cpu,
    /// First byte of the running thread's [`Frame`].
    pub frame: u64,
    /// One past its last byte; equal to the task state segment's RSP0, unless that is `trapped`'s end.
    pub frame_end: u64,
    /// Top of this CPU's own kernel stack.
    pub stack: u64,
    /// Top of the stack on which a trap of the running thread is dealt with.
    pub entry_stack: u64,
    /// Room for the user's stack pointer during `syscall` entry.
    pub scratch: u64,
    /// Where it counts, in memory that the host reads.
    stats: *mut CpuStats,
    /// What the scheduler knows of it.
    state: *mut CpuState,
    /// How it comes from user mode in the space whose page table was loaded last, and goes back.
    pub stubs: Stubs,
    /// Number of the CPU, equal to its APIC id.
    pub number: u32,
    /// Whether the CPU runs user code; cleared by the entry stub once the frame is stored.
    pub in_user: InUser,
    tss: TaskState,
    gdt: [u64; 7],
    /// Where the CPU stores traps from user mode that are then copied to the thread, aligned as it does.
    trapped: Trapped,
}

/// What the CPU and a stub push in a trap.
#[repr(C, align(16))]
struct Trapped([u64; 8]);

/// Offsets that the stubs use.
pub mod offset {
    use super::{Cpu, offset_of};
    /// Of [`Cpu::frame`].
    pub const FRAME: usize = offset_of!(Cpu, frame);
    /// Of [`Cpu::frame_end`].
    pub const FRAME_END: usize = offset_of!(Cpu, frame_end);
    /// Of [`Cpu::stack`].
    pub const STACK: usize = offset_of!(Cpu, stack);
    /// Of [`Cpu::entry_stack`].
    pub const ENTRY_STACK: usize = offset_of!(Cpu, entry_stack);
    /// Of [`Cpu::scratch`].
    pub const SCRATCH: usize = offset_of!(Cpu, scratch);
    /// Of [`Cpu::stubs`].
    pub const STUBS: usize = offset_of!(Cpu, stubs);
    /// Of `Cpu::stats`.
    pub const STATS: usize = offset_of!(Cpu, stats);
    /// Of RSP0 in the task state segment.
    pub const TRAP_STACK: usize = offset_of!(Cpu, tss) + super::TaskState::RSP0 * 4;
    /// Of [`Cpu::in_user`].
    pub const IN_USER: usize = offset_of!(Cpu, in_user);
}

/// 64-bit task state segment (SDM vol. 3, figure 8-11), as 32-bit words to keep it packed.
#[repr(C)]
struct TaskState {
    words: [u32; 26],
}

impl TaskState {
    /// Word index of RSP0.
    const RSP0: usize = 1;
    /// Word index of IST1, the stack of double faults and NMIs.
    const IST1: usize = 9;
    /// Word index of the I/O map base; beyond the limit, so that user code has no ports.
    const IO_MAP: usize = 25;

    fn set(&mut self, word: usize, value: u64) {
        self.words[word] = value as u32;
        self.words[word + 1] = (value >> 32) as u32;
    }
}

/// Selector of the task state segment.
const TSS_SELECTOR: u16 = 0x28;

const MSR_EFER: u32 = 0xc000_0080;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_FMASK: u32 = 0xc000_0084;
const MSR_GS_BASE: u32 = 0xc000_0101;
const EFER_SCE: u64 = 1;
/// Flags cleared on `syscall`: AC, NT, IOPL, DF, IF, TF.
const SYSCALL_MASK: u64 = 0x4_7700;

impl Cpu {
    /// Sets this CPU up: segments, interrupts, the trap gate. `memory` becomes the CPU's state;
    /// `stack` is the top of its stack, of which `ist_bytes` at the top are set aside for faults
    /// that must not use the current stack; it counts in `stats`; what the scheduler will know of it is at
    /// `state`.
    ///
    /// # Safety
    /// Runs once on each CPU, before anything else; the memory is the CPU's alone, for ever.
    pub unsafe fn init(
        memory: *mut Self,
        number: u32,
        stack: u64,
        ist_bytes: u64,
        stats: *mut CpuStats,
        state: *mut CpuState,
        gate: Gate,
    ) {
        // SAFETY: the caller gives the memory, zeroed but for the stubs, which may not be null; no
        // reference to it outlives this block.
        let cpu = unsafe {
            (&raw mut (*memory).stubs).write(Stubs::COMMON);
            &mut *memory
        };
        cpu.this = memory;
        cpu.number = number;
        cpu.stack = stack - ist_bytes;
        (cpu.stats, cpu.state) = (stats, state);
        cpu.in_user = InUser(AtomicU32::new(0));
        cpu.tss.set(TaskState::IST1, stack);
        let trapped = &raw const cpu.trapped as u64;
        cpu.tss
            .set(TaskState::RSP0, trapped + size_of::<Trapped>() as u64);
        cpu.tss.words[TaskState::IO_MAP] = 0xffff_0000;
        let tss = &raw const cpu.tss as u64;
        let limit = size_of::<TaskState>() as u64 - 1;
        cpu.gdt = [
            0,
            0x00af_9a00_0000_ffff, // kernel code, 64-bit
            0x00cf_9200_0000_ffff, // kernel data
            0x00cf_f200_0000_ffff, // user data
            0x00af_fa00_0000_ffff, // user code, 64-bit
            0x8900 << 32 | (tss & 0xff_ffff) << 16 | (tss >> 24 & 0xff) << 56 | limit,
            tss >> 32,
        ];
        let gdt = Table {
            limit: size_of_val(&cpu.gdt) as u16 - 1,
            base: &raw const cpu.gdt as u64,
        };
        let idt = entry::idt();
        // SAFETY: the tables are complete and stay where they are. The code segment in use has the
        // same selector and meaning in the new table, so it need not be reloaded.
        unsafe {
            asm!("lgdt [{}]", "lidt [{}]", "ltr {:x}", in(reg) &raw const gdt, in(reg) &raw const idt,
                in(reg) TSS_SELECTOR, options(nostack));
            asm!("mov ss, {:x}", in(reg) KERNEL_SS, options(nostack));
            wrmsr(MSR_GS_BASE, memory as u64);
            if gate == Gate::Syscall {
                wrmsr(
                    MSR_STAR,
                    u64::from(KERNEL_SS | 3) << 48 | u64::from(KERNEL_CS) << 32,
                );
                wrmsr(MSR_LSTAR, entry::syscall_entry as *const () as u64);
                wrmsr(MSR_FMASK, SYSCALL_MASK);
                wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
            }
        }
    }

    /// Number of the CPU that executes this; on the host, where tests run, 0.
    #[inline]
    pub fn current_number() -> u32 {
        if cfg!(test) {
            return 0;
        }
        let number: u32;
        // SAFETY: GS points to this CPU's state whenever the kernel runs.
        unsafe {
            asm!("mov {:e}, gs:[{}]", out(reg) number, const offset_of!(Cpu, number),
                options(readonly, nostack, preserves_flags));
        }
        number
    }

    /// The user registers of the thread that runs on this CPU. Only such a thread may ask.
    #[inline]
    pub fn current_frame() -> NonNull<Frame> {
        let frame: *mut Frame;
        // SAFETY: GS points to this CPU's state whenever the kernel runs, and there is a thread's frame since
        // a thread was first chosen to run.
        unsafe {
            asm!("mov {}, gs:[{}]", out(reg) frame, const offset::FRAME,
                options(readonly, nostack, preserves_flags));
            NonNull::new_unchecked(frame)
        }
    }

    /// Makes traps from user mode on this CPU store to the [`Frame`] at `frame`, the start of the thread
    /// that runs on it from now on, and continue on the stack with the given top.
    #[inline]
    pub fn set_running(&mut self, frame: u64, stack: u64) {
        self.frame = frame;
        self.frame_end = frame + FRAME_BYTES;
        self.entry_stack = stack;
        if !cfg!(feature = "copied-frame") {
            self.tss.set(TaskState::RSP0, self.frame_end);
        }
    }
}

/// What the scheduler knows of the CPU that executes this, of what it knows of all; on the host, where tests
/// run, of the first.
#[inline]
pub fn own(all: &mut [CpuState]) -> &mut CpuState {
    if cfg!(test) {
        return &mut all[0];
    }
    let state: *mut CpuState;
    // SAFETY: GS points to this CPU's state, which names its element of the only such slice there is, and `all`
    // is the only way to that.
    unsafe {
        asm!("mov {}, gs:[{}]", out(reg) state, const offset_of!(Cpu, state),
            options(readonly, nostack, preserves_flags));
        &mut *state
    }
}

/// Adds 1 to the counter at that offset in the [`CpuStats`] of the CPU that executes this; see `count!`.
/// A thread that changes CPUs between the two instructions counts on the one it came from.
#[inline(always)]
pub fn count_at<const COUNTER: usize>() {
    if cfg!(test) {
        return;
    }
    // SAFETY: GS points to this CPU's state, which names its block of counters.
    unsafe {
        asm!("mov {block}, gs:[{stats}]", "inc qword ptr [{block} + {counter}]", block = out(reg) _,
            stats = const offset::STATS, counter = const COUNTER, options(nostack));
    }
}

/// Counts something, by the name of a field of [`CpuStats`].
macro_rules! count {
    ($counter:ident) => {
        $crate::arch::cpu::count_at::<{ core::mem::offset_of!(fluke_abi::stats::CpuStats, $counter) }>(
        )
    };
}
pub(crate) use count;

/// Operand of `lgdt` and `lidt`.
#[repr(C, packed(2))]
pub struct Table {
    /// Bytes minus one.
    pub limit: u16,
    /// Linear address.
    pub base: u64,
}
