//! Exception handlers after which everything goes on as if nothing had happened: the registers are as
//! before, and a call that was about to be made, or slept, is made. What cannot be mended ends the call
//! with the exception as its result, as with [`crate::handler`].
//!
//! A handler runs at any point of the program, so it allocates nothing and prints nothing.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::Exception;
use fluke_abi::entry::Entry;
use fluke_abi::layout::{GATE, GATE_DONE};
use fluke_abi::state::{Handlers, SavedState};
use libfluke::sys;

use crate::handler;

/// Interrupts and alerts taken, by exception, from [`Exception::Interrupt`] on.
static TAKEN: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

global_asm!(
    // At entry rdx is the code and rcx the subcode; rax, rcx, rdx, rip and rflags are saved by the
    // kernel. Below the red zone: where to go on, and what neither the kernel nor Rust keeps.
    ".globl resume_handler",
    "resume_handler:",
    "lea rsp, [rsp - 136]",
    "push r11",
    "push rdi",
    "push rsi",
    "push r8",
    "push r9",
    "push r10",
    "push rbp",
    "mov rbp, rsp",
    "and rsp, -16",
    "sub rsp, 512",
    "fxsave64 [rsp]",
    "mov rdi, rdx",
    "mov rsi, rcx",
    "lea rdx, [rbp + 56]",
    "call {mend}",
    "fxrstor64 [rsp]",
    "mov rsp, rbp",
    "xor edi, edi",
    "mov eax, {resume}",
    "mov r11d, {gate}",
    "jmp r11",
    // Where the saved registers go on: with the rest of them.
    ".globl resume_rest",
    "resume_rest:",
    "pop rbp",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rsi",
    "pop rdi",
    "pop r11",
    "ret 128",
    mend = sym mend,
    resume = const Entry::thread_return_from_exception as u64,
    gate = const GATE,
);

unsafe extern "C" {
    fn resume_handler();
    fn resume_rest();
}

unsafe extern "C" fn mend(code: u64, subcode: u64, rip: *mut u64) {
    let mut saved = SavedState::default();
    // SAFETY: null is the caller; a local to be written.
    unsafe { sys::thread_get_saved_state(core::ptr::null_mut(), &raw mut saved) };
    let asynchronous = code.checked_sub(Exception::Interrupt as u64);
    if let Some(taken) = asynchronous.and_then(|n| TAKEN.get(n as usize)) {
        taken.fetch_add(1, Relaxed);
    } else if code != Exception::PageFault as u64 || !crate::faults::pages::mend(subcode) {
        saved.rax = handler::result(code, subcode);
        if saved.rip == GATE {
            saved.rip = GATE_DONE;
        }
    }
    // SAFETY: the handler's slot, from which `resume_rest` returns; and a local to be read.
    unsafe {
        rip.write(saved.rip);
        saved.rip = resume_rest as *const () as u64;
        sys::thread_set_saved_state(core::ptr::null_mut(), &raw const saved);
    }
}

/// How often threads have taken this asynchronous exception.
pub fn taken(code: Exception) -> u64 {
    let n = code as u64 - Exception::Interrupt as u64;
    TAKEN[n as usize].load(Relaxed)
}

/// The handlers' addresses.
pub fn handlers() -> Handlers {
    let address = resume_handler as *const () as u64;
    Handlers {
        trap: address,
        interrupt: address,
        client_alert: address,
        server_alert: address,
    }
}

/// Makes the handlers those of the calling thread.
pub fn install() {
    handler::set(handlers());
}
