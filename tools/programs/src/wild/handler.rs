//! A trap handler that makes a call return what went wrong with it.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::entry::Entry;
use fluke_abi::layout::{GATE, GATE_DONE};
use fluke_abi::object::Thread;
use fluke_abi::state::SavedState;
use libfluke::sys;

/// Result of a call that raised an exception: this, the code and the subcode.
const RAISED: u64 = 0xbad0 << 48;

/// Exceptions taken.
pub static TAKEN: AtomicU64 = AtomicU64::new(0);

global_asm!(
    // The kernel saved rax, rcx, rdx, rip and rflags; the interrupted code may use the rest, and
    // SSE registers, beyond the call that raised the exception.
    ".globl wild_handler",
    "wild_handler:",
    "push rbp",
    "mov rbp, rsp",
    "push rdi; push rsi; push rbx; push r8; push r9; push r10",
    "push r11; push r12; push r13; push r14; push r15",
    "push rax",
    "sub rsp, 528",
    "and rsp, -16",
    "fxsave64 [rsp]",
    "mov rdi, rax",
    "mov rsi, rdx",
    "mov rdx, rcx",
    "call {handle}",
    "fxrstor64 [rsp]",
    "lea rsp, [rbp - 96]",
    "pop rax",
    "pop r15; pop r14; pop r13; pop r12; pop r11",
    "pop r10; pop r9; pop r8; pop rbx; pop rsi; pop rdi",
    "pop rbp",
    // `thread_return_from_exception(cur_thread)`. All traps of this library may change rdi.
    "mov rdi, rax",
    "mov eax, {leave}",
    "mov r11d, {gate}",
    "jmp r11",
    handle = sym handle,
    leave = const Entry::thread_return_from_exception as u64,
    gate = const GATE,
);

unsafe extern "C" {
    fn wild_handler();
}

/// Makes the call in which the exception was raised return.
unsafe extern "C" fn handle(thread: *mut Thread, code: u64, subcode: u64) {
    TAKEN.fetch_add(1, Relaxed);
    let state = SavedState {
        rax: RAISED | (code & 0xffff) << 32 | subcode & 0xffff_ffff,
        // Past the trap instruction, where the gate returns to whoever called it, and where the
        // registers rcx and rdx no longer matter.
        rip: GATE_DONE,
        rflags: 0x202,
        ..SavedState::default()
    };
    // SAFETY: the kernel passes the thread's own address.
    unsafe { sys::thread_set_saved_state(thread, &raw const state) };
}

/// Makes the handler that of the calling thread, `thread`.
pub fn install(thread: *mut Thread) {
    let handler = wild_handler as *const () as u64;
    // SAFETY: the handler keeps to what the kernel expects of one.
    unsafe {
        sys::thread_set_handlers(thread, handler, 0, 0, 0);
        sys::thread_enable_exceptions(thread);
    }
}

/// The exception's code and subcode, if the result of a call says that there was one.
pub const fn raised(result: u64) -> Option<(u64, u64)> {
    if result >> 48 == RAISED >> 48 {
        Some((result >> 32 & 0xffff, result & 0xffff_ffff))
    } else {
        None
    }
}
