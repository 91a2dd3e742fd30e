//! How the CPU enters and leaves the kernel.
//!
//! A trap from user mode finds the running thread's frame as its stack (RSP0), so the hardware
//! part and the registers pushed after it land in the thread itself, in either execution model.
//! The stub then goes on on the stack that the scheduler named when it chose the thread, which is the
//! only question that the models answer differently.
//!
//! With the feature `copied-frame`, for a table of OSDI '99, the hardware part lands in the CPU's structure, and
//! is copied to the thread and, to return, back.
//!
//! The kernel's own space has a page table in which the image belongs to user mode, so that the kernel
//! itself cannot run there (SMEP) nor use its data (SMAP). What is used of the image between a trap and
//! the change of the page table, and from there to the return, is in the sections `.text.entry` and
//! `.bss.cpu`, which stay the supervisor's: this module's stubs and table, and the CPUs' own structures.
//!
//! Traps from kernel mode are interrupts, of an idle CPU or at preemption level full of any kernel code,
//! and bugs.

use core::arch::{asm, naked_asm};
use core::mem::offset_of;
use core::sync::atomic::{AtomicBool, AtomicU64};

use fluke_abi::boot::{KERNEL_CS, USER_CS, USER_SS};
use fluke_abi::entry::Entry;
use fluke_abi::layout::{GATE, GATE_DONE, GATE_INSTRUCTION_BYTES};
use fluke_abi::port::DOORBELL_VECTOR;
use fluke_abi::probe::Probe;
use fluke_abi::stats::CpuStats;

use super::apic::{KICK_VECTOR, SPURIOUS_VECTOR, TIMER_VECTOR};
use super::cpu::{FRAME_BYTES, Frame, Table, offset};
use super::instructions::INTERRUPT_FLAG;
use crate::boundary;
use crate::probe::ARMED;
use crate::thread::Thread;

/// Vector stored for `syscall`, which has none: that of the other trap gate.
pub const GATE_VECTOR: u64 = 6;

/// Whether what the CPU pushes is copied to the thread and back; for `.if`.
const COPIED: usize = cfg!(feature = "copied-frame") as usize;

/// Vectors with a stub below the interrupts: the CPU's exceptions.
const EXCEPTIONS: usize = 32;
/// Vectors with a stub.
const VECTORS: usize = SPURIOUS_VECTOR as usize + 1;

/// One interrupt gate (SDM vol. 3, figure 6-8).
#[unsafe(link_section = ".bss.cpu")]
static IDT: [[AtomicU64; 2]; VECTORS] = [const { [const { AtomicU64::new(0) }; 2] }; VECTORS];

/// Physical address of the page table of no space.
#[unsafe(link_section = ".bss.cpu")]
static PAGE_TABLE: AtomicU64 = AtomicU64::new(0);
/// The same of the kernel's own space.
#[unsafe(link_section = ".bss.cpu")]
static OWN_PAGE_TABLE: AtomicU64 = AtomicU64::new(0);

/// How a CPU comes from user mode and goes back.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Stubs {
    /// Where [`enter`] goes on: has the kernel's page table loaded, and is [`boundary::trap`].
    trap: unsafe extern "C" fn() -> !,
    /// Where [`leave`] goes.
    leave: unsafe extern "C" fn() -> !,
}

impl Stubs {
    /// In a space whose page table the kernel can use too.
    pub const COMMON: Self = Self {
        trap: boundary::trap,
        leave: leave_to_user,
    };
    /// In the kernel's own space.
    pub const OWN: Self = Self {
        trap: trap_in_own_space,
        leave: leave_to_own_space,
    };
}

/// Fills the interrupt descriptor table, and keeps the page tables of no space and of the kernel's own.
pub fn init(page_table: u64, own_page_table: u64) {
    use core::sync::atomic::Ordering::Relaxed;
    PAGE_TABLE.store(page_table, Relaxed);
    OWN_PAGE_TABLE.store(own_page_table, Relaxed);
    let stubs = (exception_stubs as *const () as u64).next_multiple_of(STUB_BYTES as u64);
    let gate = |vector: usize, address: u64, ist: u64| {
        let low = address & 0xffff
            | u64::from(KERNEL_CS) << 16
            | ist << 32
            | 0x8e00 << 32
            | (address >> 16 & 0xffff) << 48;
        IDT[vector][0].store(low, Relaxed);
        IDT[vector][1].store(address >> 32, Relaxed);
    };
    for vector in 0..EXCEPTIONS {
        // NMI, double fault and machine check cannot trust the current stack.
        let ist = u64::from(matches!(vector, 2 | 8 | 18));
        gate(vector, stubs + (vector * STUB_BYTES) as u64, ist);
    }
    gate(TIMER_VECTOR.into(), timer as *const () as u64, 0);
    gate(KICK_VECTOR.into(), kick as *const () as u64, 0);
    gate(DOORBELL_VECTOR.into(), doorbell as *const () as u64, 0);
    gate(SPURIOUS_VECTOR.into(), spurious as *const () as u64, 0);
}

/// The interrupt descriptor table.
pub fn idt() -> Table {
    Table {
        limit: size_of_val(&IDT) as u16 - 1,
        base: (&raw const IDT) as u64,
    }
}

/// Bytes of a [`Frame`] below those that [`enter`] finds: the registers that calls preserve.
const PRESERVED: usize = offset_of!(Frame, r11);

/// Bytes between two exception stubs.
const STUB_BYTES: usize = 16;

/// One stub for each exception: makes the frame uniform by an error code of 0 where the CPU pushes
/// none, and adds the vector.
#[unsafe(naked)]
#[unsafe(link_section = ".text.entry")]
unsafe extern "C" fn exception_stubs() {
    naked_asm!(
        ".set vector, 0",
        ".rept {exceptions}",
        ".balign {stub_bytes}",
        // 8, 10-14, 17, 21, 29 and 30 come with an error code (SDM vol. 3, table 6-1).
        ".if vector != 8 && (vector < 10 || vector > 14) && vector != 17 && vector != 21 && vector != 29 && vector != 30",
        "push 0",
        ".endif",
        "push vector",
        ".byte 0xe9",
        // NMI, double fault and machine check come on stacks of their own: no thread's frame.
        ".if vector == 2 || vector == 8 || vector == 18",
        ".long {from_anywhere} - . - 4",
        ".else",
        ".long {trap} - . - 4",
        ".endif",
        ".set vector, vector + 1",
        ".endr",
        exceptions = const EXCEPTIONS,
        stub_bytes = const STUB_BYTES,
        trap = sym trap,
        from_anywhere = sym from_anywhere,
    );
}

/// An interrupt's stub. Nothing interrupts code that has interrupts off; but an emulation of SVM has been
/// seen to deliver a timer interrupt once more at the first instruction of its own stub. That one is
/// dropped, without EOI, before it uses the stack: that is a thread's frame, which is to be filled.
macro_rules! interrupt {
    ($name:ident, $vector:expr) => {
        #[unsafe(naked)]
        #[unsafe(link_section = ".text.entry")]
        unsafe extern "C" fn $name() {
            naked_asm!(
                "test dword ptr [rsp + 16], {interrupts}",
                "jz {spurious}",
                "push 0",
                "push {vector}",
                "jmp {trap}",
                interrupts = const INTERRUPT_FLAG,
                spurious = sym spurious,
                vector = const $vector,
                trap = sym trap,
            );
        }
    };
}

interrupt!(timer, TIMER_VECTOR);
interrupt!(kick, KICK_VECTOR);
interrupt!(doorbell, DOORBELL_VECTOR);

#[unsafe(naked)]
#[unsafe(link_section = ".text.entry")]
unsafe extern "C" fn spurious() {
    naked_asm!("iretq");
}

/// Common part: `rsp` points to vector, error code, and what the CPU pushed.
#[unsafe(naked)]
#[unsafe(link_section = ".text.entry")]
unsafe extern "C" fn trap() {
    naked_asm!(
        "test byte ptr [rsp + 24], 3",
        "jz {from_kernel}",
        "swapgs",
        ".if {copied}",
        "mov gs:[{scratch}], rax",
        "mov rax, rsp",
        "mov rsp, gs:[{frame_end}]",
        "push [rax + 48]",
        "push [rax + 40]",
        "push [rax + 32]",
        "push [rax + 24]",
        "push [rax + 16]",
        "push [rax + 8]",
        "push [rax]",
        "mov rax, gs:[{scratch}]",
        ".endif",
        "push rax",
        "push rcx",
        "push rdx",
        "push rsi",
        "push rdi",
        "push r8",
        "push r9",
        "push r10",
        "push r11",
        "jmp {enter}",
        copied = const COPIED,
        scratch = const offset::SCRATCH,
        frame_end = const offset::FRAME_END,
        from_kernel = sym from_kernel,
        enter = sym enter,
    );
}

/// `syscall` entry, where the host's CPU has a usable one. Builds the frame that the other gate's
/// trap would leave: instruction pointer at the trap instruction, because the call is not done yet.
///
/// # Safety
/// Only the CPU goes here, from user mode.
#[unsafe(naked)]
#[unsafe(link_section = ".text.entry")]
pub unsafe extern "C" fn syscall_entry() {
    naked_asm!(
        "swapgs",
        "mov gs:[{scratch}], rsp",
        "mov rsp, gs:[{frame_end}]",
        "push {user_ss}",
        "push qword ptr gs:[{scratch}]",
        "push r11",
        "push {user_cs}",
        "sub rcx, {gate_bytes}",
        "push rcx",
        "push 0",
        "push {vector}",
        "push rax",
        "push rcx",
        "push rdx",
        "push rsi",
        "push rdi",
        "push r8",
        "push r9",
        "push r10",
        "push r11",
        "jmp {enter}",
        scratch = const offset::SCRATCH,
        frame_end = const offset::FRAME_END,
        user_ss = const USER_SS,
        user_cs = const USER_CS,
        gate_bytes = const GATE_INSTRUCTION_BYTES,
        vector = const GATE_VECTOR,
        enter = sym enter,
    );
}

/// What all that comes from user mode goes through: `rsp` points to the registers that calls may change, and all
/// others are the program's. Stores the remaining registers and runs the kernel.
///
/// But for `thread_self`, which only reads what is the thread's own: that is done at once, without entering the
/// kernel. To other CPUs it is an instruction of the program's: it takes no lock and needs no stack, and what they
/// want of this CPU meanwhile it hears of back in user mode, by the interrupt that they have sent. While probe
/// points are armed it goes the long way, where the points are.
#[unsafe(naked)]
#[unsafe(link_section = ".text.entry")]
unsafe extern "C" fn enter() {
    naked_asm!(
        "cmp rax, {thread_self}",
        "jne 2f",
        "cmp qword ptr [rsp + {vector}], {gate_vector}",
        "jne 2f",
        "cmp qword ptr [rsp + {rip}], {gate}",
        "jne 2f",
        "cmp byte ptr [rip + {armed} + {enter}], 0",
        "jne 2f",
        "mov rax, gs:[{stats}]",
        "inc qword ptr [rax + {calls}]",
        "mov rax, [rsp + {thread_va}]",
        "mov [rsp + {rax}], rax",
        "mov qword ptr [rsp + {rip}], {done}",
        "jmp fluke_leave_with_preserved",
        "2:",
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "cld",
        "mov rsp, gs:[{entry_stack}]",
        // From here on other CPUs may use the frame.
        "mov dword ptr gs:[{in_user}], 0",
        "xor ebp, ebp",
        "call qword ptr gs:[{trap}]",
        "ud2",
        thread_self = const Entry::thread_self as u64,
        vector = const offset_of!(Frame, vector) - PRESERVED,
        rip = const offset_of!(Frame, rip) - PRESERVED,
        rax = const offset_of!(Frame, rax) - PRESERVED,
        thread_va = const offset_of!(Thread, thread_va) - PRESERVED,
        gate_vector = const GATE_VECTOR,
        gate = const GATE,
        done = const GATE_DONE,
        armed = sym ARMED,
        enter = const Probe::Enter as usize,
        stats = const offset::STATS,
        calls = const offset_of!(CpuStats, calls),
        entry_stack = const offset::ENTRY_STACK,
        in_user = const offset::IN_USER,
        trap = const offset::STUBS + offset_of!(Stubs, trap),
    );
}

/// From the kernel's own space, whose page table is still loaded.
#[unsafe(naked)]
#[unsafe(link_section = ".text.entry")]
unsafe extern "C" fn trap_in_own_space() -> ! {
    naked_asm!(
        "mov rax, [rip + {page_table}]",
        "mov cr3, rax",
        "jmp {trap}",
        page_table = sym PAGE_TABLE,
        trap = sym boundary::trap,
    );
}

/// Clears `taken`, by which a lock is dropped, and leaves to the running thread. Nothing of the stack is used from
/// then on: a trap starts at the top of one.
///
/// # Safety
/// The CPU's frame must be that of its current thread, `in_user` set, and what has the lock be in order.
#[inline]
pub unsafe fn leave(taken: &AtomicBool) -> ! {
    // SAFETY: the caller's. A store is a release. The stub is that of the space whose page table was loaded last.
    unsafe {
        asm!(
            "mov byte ptr [{taken}], 0",
            "jmp qword ptr gs:[{leave}]",
            taken = in(reg) taken.as_ptr(),
            leave = const offset::STUBS + offset_of!(Stubs, leave),
            options(noreturn),
        )
    }
}

/// As [`leave`], to the kernel's own space.
#[unsafe(naked)]
#[unsafe(link_section = ".text.entry")]
unsafe extern "C" fn leave_to_own_space() -> ! {
    naked_asm!(
        "mov rax, [rip + {page_table}]",
        "mov cr3, rax",
        "jmp {leave}",
        page_table = sym OWN_PAGE_TABLE,
        leave = sym leave_to_user,
    );
}

#[unsafe(naked)]
#[unsafe(link_section = ".text.entry")]
unsafe extern "C" fn leave_to_user() -> ! {
    naked_asm!(
        "mov rsp, gs:[{frame}]",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        // Here with the registers that calls preserve already the program's.
        ".globl fluke_leave_with_preserved",
        "fluke_leave_with_preserved:",
        "pop r11",
        "pop r10",
        "pop r9",
        "pop r8",
        "pop rdi",
        "pop rsi",
        "pop rdx",
        "pop rcx",
        "pop rax",
        "add rsp, 16",
        ".if {copied}",
        "mov gs:[{scratch}], rax",
        "mov rax, rsp",
        "mov rsp, gs:[{trap_stack}]",
        "push [rax + 32]",
        "push [rax + 24]",
        "push [rax + 16]",
        "push [rax + 8]",
        "push [rax]",
        "mov rax, gs:[{scratch}]",
        ".endif",
        "swapgs",
        "iretq",
        copied = const COPIED,
        scratch = const offset::SCRATCH,
        trap_stack = const offset::TRAP_STACK,
        frame = const offset::FRAME,
    );
}

/// A trap that comes on a stack of its own, whatever page table is loaded. None is expected.
#[unsafe(naked)]
#[unsafe(link_section = ".text.entry")]
unsafe extern "C" fn from_anywhere() {
    naked_asm!(
        "push rax",
        "mov rax, [rip + {page_table}]",
        "mov cr3, rax",
        "pop rax",
        "jmp {from_kernel}",
        page_table = sym PAGE_TABLE,
        from_kernel = sym from_kernel,
    );
}

/// A trap from kernel mode: an interrupt returns; anything else is a bug.
#[unsafe(naked)]
#[unsafe(link_section = ".text.entry")]
unsafe extern "C" fn from_kernel() {
    naked_asm!(
        "push rax",
        "push rcx",
        "push rdx",
        "push rsi",
        "push rdi",
        "push r8",
        "push r9",
        "push r10",
        "push r11",
        "mov rdi, rsp",
        "push rbp",
        "mov rbp, rsp",
        "and rsp, -16",
        "call {handler}",
        "mov rsp, rbp",
        "pop rbp",
        "pop r11",
        "pop r10",
        "pop r9",
        "pop r8",
        "pop rdi",
        "pop rsi",
        "pop rdx",
        "pop rcx",
        "pop rax",
        "add rsp, 16",
        "iretq",
        handler = sym boundary::trap_in_kernel,
    );
}

/// What [`boundary::trap_in_kernel`] is shown.
#[derive(Debug)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are the registers of that name")]
pub struct KernelFrame {
    pub registers: [u64; 9],
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// Continues on the top of this CPU's own stack, with nothing on it.
///
/// # Safety
/// Whatever is on the current stack above must be of no further use, or be saved.
#[unsafe(naked)]
pub unsafe extern "C" fn on_cpu_stack(run: extern "C" fn() -> !) -> ! {
    naked_asm!(
        "mov rsp, gs:[{stack}]",
        "xor ebp, ebp",
        "call rdi",
        "ud2",
        stack = const offset::STACK,
    );
}

const _: () = assert!(FRAME_BYTES == 22 * 8 && FRAME_BYTES.is_multiple_of(16));
