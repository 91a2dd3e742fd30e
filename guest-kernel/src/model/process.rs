//! The process model: every thread has a kernel stack, and keeps it while it waits.

use core::arch::naked_asm;

use crate::arch::entry::on_cpu_stack;
use crate::boundary;
use crate::call::{Call, Stop};
use crate::stacks::Stacks;
use crate::thread::{Thread, Wait};

/// Name of the model.
pub const NAME: &str = "process";
/// Every thread needs a kernel stack.
pub const STACK_PER_THREAD: bool = true;

/// A thread's kernel stack.
#[derive(Default)]
pub struct Stack {
    /// Top of the stack.
    top: u64,
    /// Stack pointer while the thread does not run; 0 if it has nothing on the stack.
    pointer: u64,
}

/// Readies a new thread: gives it a stack, if there is one.
pub fn prepare(stacks: &mut Stacks, thread: &mut Thread) -> Option<()> {
    thread.kernel_stack = Stack {
        top: stacks.allocate()?,
        pointer: 0,
    };
    Some(())
}

/// Takes the stack back.
pub fn release(stacks: &mut Stacks, thread: &mut Thread) {
    stacks.free(thread.kernel_stack.top);
}

/// Forgets what a waiting thread was doing in the kernel. Its frames own nothing: a handler holds
/// no lock and no memory across a wait, so they can just be overwritten.
pub fn abandon(thread: &mut Thread) {
    thread.kernel_stack.pointer = 0;
}

/// Top of the stack for a thread that traps.
pub fn entry_stack(thread: &Thread, _: u64) -> u64 {
    thread.kernel_stack.top
}

/// Puts the current thread to sleep, on its stack. Returns when it is woken; not with `Ok` if its
/// call was meanwhile completed by another thread.
pub fn wait(call: &mut Call, wait: Wait) -> Result<(), Stop> {
    call.sleep(wait);
    preempt(call)
}

/// Makes way at a preemption point, as in a wait: the stack is kept.
pub fn preempt(call: &mut Call) -> Result<(), Stop> {
    park(call);
    if call.thread().in_call {
        Ok(())
    } else {
        Err(Stop::Restart)
    }
}

/// The current thread cannot run on: another gets the CPU until this one can.
pub fn park(call: &mut Call) {
    let pointer = &raw mut call.thread().kernel_stack.pointer;
    // SAFETY: the thread is not destroyed while it has something on its stack but waits, other
    // than through `abandon`, which forgets the stored pointer. The kernel lock stays taken.
    unsafe { switch_away(pointer) };
}

/// Runs a thread that was chosen to run: from where it parked, or from its registers.
pub fn resume(call: &mut Call) -> ! {
    let stack = &mut call.thread().kernel_stack;
    let (pointer, top) = (core::mem::take(&mut stack.pointer), stack.top);
    // SAFETY: `pointer` was stored by `switch_away`, and what it points to is intact; without one,
    // the stack is empty and is the thread's alone.
    unsafe {
        if pointer == 0 {
            start_on(top, boundary::run)
        } else {
            switch_back(pointer)
        }
    }
}

/// Keeps the registers that a function call preserves, and leaves for the CPU's own stack.
#[unsafe(naked)]
unsafe extern "C" fn switch_away(pointer: *mut u64) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi], rsp",
        "lea rdi, [rip + {schedule}]",
        "jmp {on_cpu_stack}",
        schedule = sym boundary::schedule,
        on_cpu_stack = sym on_cpu_stack,
    );
}

/// Returns from `switch_away`, later and perhaps on another CPU.
#[unsafe(naked)]
unsafe extern "C" fn switch_back(pointer: u64) -> ! {
    naked_asm!(
        "mov rsp, rdi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    );
}

/// Calls `run` on an empty stack.
#[unsafe(naked)]
unsafe extern "C" fn start_on(top: u64, run: extern "C" fn() -> !) -> ! {
    naked_asm!("mov rsp, rdi", "xor ebp, ebp", "call rsi", "ud2");
}
