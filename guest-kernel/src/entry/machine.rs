//! What Fluke leaves to servers that do not exist yet: clock, console, the end.

use fluke_abi::code::Insanity;
use fluke_abi::port;
use fluke_abi::state::Prot;

use crate::arch::cpu::Cpu;
use crate::arch::instructions::{out_bytes, out32};
use crate::arch::memory;
use crate::call::{Call, Done};
use crate::lock::scheduler;
use crate::mm::access::within_page;

/// Trivial.
pub fn clock_read(call: &mut Call) -> Done {
    let now = scheduler().clock.now();
    call.complete(now)
}

/// Trivial.
pub fn cpu_self(call: &mut Call) -> Done {
    let number = Cpu::current_number();
    call.complete(number.into())
}

/// Commit point: after each page, when both parameters have moved on. The rest is called for from
/// user mode, so that long text keeps nobody waiting.
pub fn console_write(call: &mut Call) -> Done {
    let (text, size) = (call.argument(0), call.argument(1));
    if size == 0 {
        return call.complete(0);
    }
    let physical = call.translate(text, Prot::READ)?;
    let len = within_page(text, size);
    out_bytes(port::CONSOLE, memory::bytes(physical, len as usize));
    call.set_argument(0, text.wrapping_add(len));
    call.set_argument(1, size - len);
    if size == len {
        return call.complete(0);
    }
    call.call_again();
    Ok(())
}

/// Commit point: the write.
pub fn machine_census(call: &mut Call) -> Done {
    let at = call.argument(0);
    let census = call.kernel().census();
    call.write(at, &census)?;
    call.complete(0)
}

/// Does not return.
pub fn machine_exit(call: &mut Call) -> Done {
    let status = call.argument(0);
    let space = call.thread().space;
    if space != call.kernel().root {
        return Err(Insanity::NotRoot.into());
    }
    out32(port::EXIT, status as u32);
    call.complete(0)
}
