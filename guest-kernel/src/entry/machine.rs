//! What Fluke leaves to servers that do not exist yet: clock, the end; and what drivers need.

use fluke_abi::code::Insanity;
use fluke_abi::port::{self, Event};

use crate::arch::cpu::Cpu;
use crate::arch::instructions::{out32, out32_with};
use crate::call::{Call, Done};
use crate::lock::scheduler;
use crate::pseudo;

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

/// Commit point: the function.
pub fn supervisor_call(call: &mut Call) -> Done {
    let (function, argument) = (call.argument(0), call.argument(1));
    let result = pseudo::call(call, function, argument)?;
    call.complete(result)
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

/// Trivial.
pub fn machine_tell(call: &mut Call) -> Done {
    let address = call.argument(0);
    out32_with(port::EVENT, Event::Told as u32, address);
    call.complete(0)
}

/// Commit point: none; sleeping changes nothing.
pub fn machine_listen(call: &mut Call) -> Done {
    let heard = call.argument(0);
    loop {
        if let Some(rings) = call.listen(heard)? {
            return call.complete(rings);
        }
    }
}
