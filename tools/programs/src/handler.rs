//! Exception handlers for programs that make calls which cannot work: a call that raises an exception
//! returns, with what went wrong as its result.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::audit::{LOST, RAISED};
use fluke_abi::entry::Entry;
use fluke_abi::layout::{GATE, GATE_DONE};
use fluke_abi::object::Thread;
use fluke_abi::state::Handlers;
use libfluke::{sys, thread};

/// Exceptions taken.
static TAKEN: AtomicU64 = AtomicU64::new(0);

global_asm!(
    // At entry rdx is the code and rcx the subcode. The exception was raised in a call through the
    // gate, whose caller expects no register but rbx, rbp and rsp to keep its value, and whose
    // return address is on the stack: so the handler can return in its place.
    ".globl trap_handler",
    "trap_handler:",
    "lock inc qword ptr [rip + {taken}]",
    "push rdx",
    "push rcx",
    "push rbp",
    "xor ebp, ebp", // the mark of `call_marked`: the handlers' calls have none
    "xor edi, edi",
    "mov eax, {enable}",
    "mov r11d, {gate}",
    "call r11",
    "pop rbp",
    "pop rcx",
    "pop rdx",
    "movzx eax, dx",
    "shl rax, 32",
    "mov ecx, ecx",
    "or rax, rcx",
    "mov rcx, {raised}",
    "or rax, rcx",
    "ret",
    // Interrupts and alerts come anywhere: everything must be as before, also below the stack
    // pointer. A call that was about to be made, or slept, is left out.
    ".globl interrupt_handler",
    "interrupt_handler:",
    "lea rsp, [rsp - 128]",
    "push r11",
    "push rdi",
    "push rsi",
    "push rbp",
    "xor ebp, ebp",
    "sub rsp, 40", // a SavedState: rax, rcx, rdx, rip, rflags
    "mov rsi, rsp",
    "xor edi, edi",
    "mov eax, {get_saved}",
    "mov r11d, {gate}",
    "call r11",
    "cmp qword ptr [rsp + 24], {gate}",
    "jne 2f",
    "mov qword ptr [rsp + 24], {gate_done}",
    "2:",
    "xor edi, edi",
    "mov eax, {enable}",
    "mov r11d, {gate}",
    "call r11",
    "mov r11, [rsp + 24]",
    "xchg r11, [rsp + 64]",
    "pop rax",
    "pop rcx",
    "pop rdx",
    "lea rsp, [rsp + 8]",
    "popfq",
    "pop rbp",
    "pop rsi",
    "pop rdi",
    "ret 128",
    // Reads memory until it is not zero. A fault returns in its place, as of a call.
    ".globl peek_handled",
    "peek_handled:",
    "mov rax, [rdi]",
    "test rax, rax",
    "jz peek_handled",
    "ret",
    taken = sym TAKEN,
    enable = const Entry::thread_enable_exceptions as u64,
    get_saved = const Entry::thread_get_saved_state as u64,
    gate = const GATE,
    gate_done = const GATE_DONE,
    raised = const RAISED,
);

unsafe extern "C" {
    fn trap_handler();
    fn interrupt_handler();
    fn peek_handled(address: u64) -> u64;
}

/// Reads a word of memory, again and again in user mode, until it is not zero or not there; the word, or what was
/// [`raised`].
///
/// # Safety
/// The caller has the handlers installed.
pub unsafe fn peek(address: u64) -> u64 {
    // SAFETY: it only reads, and the handler returns as a function does.
    unsafe { peek_handled(address) }
}

/// Exceptions taken by all threads.
pub fn taken() -> u64 {
    TAKEN.load(Relaxed)
}

/// The handlers' addresses.
pub fn handlers() -> Handlers {
    let interrupt = interrupt_handler as *const () as u64;
    Handlers {
        trap: trap_handler as *const () as u64,
        interrupt,
        client_alert: interrupt,
        server_alert: interrupt,
    }
}

/// Makes the handlers those of the calling thread.
pub fn install() {
    set(handlers());
}

/// Gives the calling thread handlers, and enables exceptions.
pub fn set(handlers: Handlers) {
    let thread = thread::current() as *mut Thread;
    let Handlers {
        trap,
        interrupt,
        client_alert,
        server_alert,
    } = handlers;
    // SAFETY: the handlers keep to what the kernel expects of them.
    unsafe {
        sys::thread_set_handlers(thread, trap, interrupt, client_alert, server_alert);
        sys::thread_enable_exceptions(thread);
    }
}

/// Makes a call with any registers: `rax`, and `rdi rsi rdx r10 r8 r9 r12 r13 r14`, which are all that
/// any call has. Returns what it leaves in `rax`; see [`raised`].
///
/// # Safety
/// The kernel may write wherever the registers point. The caller has the handlers installed, if the
/// call can raise an exception.
pub unsafe fn call(rax: u64, mut rest: [u64; 9]) -> u64 {
    // SAFETY: the caller's.
    unsafe { call_marked(rax, &mut rest, 0) }
}

/// As [`call`], with that in `rbp`, `rbx` and `xmm15`, which no call uses; [`LOST`] if it is not there afterwards. The
/// parameters are then what is left of them, but for the first, which the handlers use.
///
/// # Safety
/// As of [`call`].
pub unsafe fn call_marked(rax: u64, rest: &mut [u64; 9], mark: u64) -> u64 {
    let (result, rbx, xmm15): (u64, u64, u64);
    // SAFETY: the caller's promise; the gate returns, after an exception too.
    unsafe {
        asm!(
            "push rbp",
            "push rbx",
            "mov rbp, r11",
            "mov rbx, r11",
            "mov r11d, {gate}",
            "call r11",
            "mov r11, rbx",
            "pop rbx",
            "pop rbp",
            gate = const GATE,
            inout("rax") rax => result,
            inout("rdi") rest[0] => _,
            inout("rsi") rest[1] => rest[1],
            inout("rdx") rest[2] => rest[2],
            inout("r10") rest[3] => rest[3],
            inout("r8") rest[4] => rest[4],
            inout("r9") rest[5] => rest[5],
            inout("r12") rest[6] => rest[6],
            inout("r13") rest[7] => rest[7],
            inout("r14") rest[8] => rest[8],
            inout("r15") 0u64 => _,
            inout("r11") mark => rbx,
            inout("xmm15") mark => xmm15,
            out("rcx") _,
        );
    }
    if rbx == mark && xmm15 == mark {
        result
    } else {
        LOST
    }
}

/// Result of a call that raised that exception.
pub const fn result(code: u64, subcode: u64) -> u64 {
    RAISED | (code & 0xffff) << 32 | subcode & 0xffff_ffff
}

/// The exception's code and subcode, if the result of a call says that there was one.
pub const fn raised(result: u64) -> Option<(u64, u64)> {
    if result >> 48 == RAISED >> 48 {
        Some((result >> 32 & 0xffff, result & 0xffff_ffff))
    } else {
        None
    }
}
