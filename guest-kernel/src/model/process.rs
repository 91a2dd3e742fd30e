//! The process model: every thread has a kernel stack, and keeps it while it waits.

use core::arch::asm;

use crate::arch::cpu::offset;
use crate::boundary;
use crate::call::{Call, Stop};
use crate::stacks::Stacks;

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
pub fn prepare(stacks: &mut Stacks) -> Option<Stack> {
    let top = stacks.allocate()?;
    Some(Stack { top, pointer: 0 })
}

/// Takes the stack back.
pub fn release(stacks: &mut Stacks, stack: Stack) {
    stacks.free(stack.top);
}

/// Forgets what a thread that does not run was doing in the kernel. Its frames own nothing: a handler
/// holds no lock and no memory across a wait, so they can just be overwritten.
pub const fn abandon(stack: &mut Stack) {
    stack.pointer = 0;
}

/// Top of the stack for a thread that traps.
pub const fn entry_stack(stack: &Stack, _: u64) -> u64 {
    stack.top
}

/// The current thread makes way, and keeps its stack. Returns when it runs again; not with `Ok` if its
/// call was meanwhile completed by another thread.
pub fn make_way(call: &mut Call) -> Result<(), Stop> {
    boundary::park(call);
    if call.in_call() {
        Ok(())
    } else {
        Err(Stop::Restart)
    }
}

/// Leaves the current thread on its stack; returns when it is resumed.
#[inline(always)]
pub fn switch(stack: &mut Stack) {
    let pointer = &raw mut stack.pointer;
    // SAFETY: the place stays as long as the thread, which is not destroyed while it has something on
    // its stack, other than through `abandon`, which forgets the stored pointer. The spin lock stays
    // taken until another thread runs. All registers but these two are the compiler's to keep.
    unsafe {
        asm!(
            "push rbx",
            "push rbp",
            "lea rax, [rip + 2f]",
            "push rax",
            "mov [rdi], rsp",
            "mov rsp, gs:[{cpu_stack}]",
            "xor ebp, ebp",
            "call {schedule}",
            "2:",
            "pop rbp",
            "pop rbx",
            in("rdi") pointer,
            schedule = sym boundary::schedule,
            cpu_stack = const offset::STACK,
            out("r12") _,
            out("r13") _,
            out("r14") _,
            out("r15") _,
            clobber_abi("sysv64"),
        );
    }
}

/// Runs a thread that was chosen to run: from where it was left, or from its registers.
#[inline(always)]
pub fn resume(stack: &mut Stack) -> ! {
    let (pointer, top) = (core::mem::take(&mut stack.pointer), stack.top);
    // SAFETY: `pointer` was stored by `switch`, and what it points to is intact; without one,
    // the stack is empty and is the thread's alone.
    unsafe {
        if pointer == 0 {
            asm!(
                "mov rsp, {}",
                "xor ebp, ebp",
                "call {}",
                "ud2",
                in(reg) top,
                sym boundary::start_thread,
                options(noreturn)
            )
        } else {
            asm!("mov rsp, {}", "ret", in(reg) pointer, options(noreturn))
        }
    }
}
