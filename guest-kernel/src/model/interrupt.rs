//! The interrupt model: one stack for each CPU. A thread that waits has nothing but its registers.

use crate::arch::entry::on_cpu_stack;
use crate::boundary;
use crate::call::{Call, Stop};
use crate::stacks::Stacks;

/// Name of the model.
pub const NAME: &str = "interrupt";
/// Threads need no kernel stacks.
pub const STACK_PER_THREAD: bool = false;

/// What a thread keeps of the kernel: nothing.
#[derive(Default)]
pub struct Stack {}

/// Readies a new thread. Always possible.
pub fn prepare(_: &mut Stacks) -> Option<Stack> {
    Some(Stack {})
}

/// Takes back what `prepare` gave.
pub fn release(_: &mut Stacks, _: Stack) {}

/// Forgets what a thread that does not run was doing in the kernel.
pub fn abandon(_: &mut Stack) {}

/// Top of the stack for a thread that traps: that of the CPU.
pub fn entry_stack(_: &Stack, cpu_stack: u64) -> u64 {
    cpu_stack
}

/// The current thread makes way: unwind, and make the call again when it runs again.
#[inline]
pub fn make_way(_: &mut Call) -> Result<(), Stop> {
    Err(Stop::Restart)
}

/// Leaves the current thread: the next one gets an empty stack. Does not return.
pub fn switch(_: &mut Stack) {
    // SAFETY: nothing on the stack is of use any more.
    unsafe { on_cpu_stack(boundary::schedule) }
}

/// Runs a thread that was chosen to run.
pub fn resume(_: &mut Stack) -> ! {
    boundary::start_thread()
}
