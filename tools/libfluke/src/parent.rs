//! The protocol of the port behind [`crate::startup::Startup::parent`].
//!
//! Requests are idempotent calls or reliable RPCs whose first word says what is wanted. The port
//! is also the keeper of the program's space, so the kernel's exception messages arrive there too;
//! they start with [`fluke_abi::ipc::EXCEPTION_MAGIC`].

use crate::{console, rpc, startup, sys};

/// `[EXIT, status]`: the program has ended. Never answered.
pub const EXIT: u64 = 1;
/// `[REGISTER, name]` and one reference to a port: reach me there. A reliable RPC.
pub const REGISTER: u64 = 2;

/// `[CHECKPOINT, number]`: write me to a file now. Numbers ascend from 1. The answer is 1 where that was done,
/// also to who is made again from the file, asks again, and is told so; otherwise 0, or nothing.
pub const CHECKPOINT: u64 = 3;

/// Exit status of a program that ended by a panic.
pub const STATUS_PANIC: u64 = 101;
/// Exit status when memory has run out.
pub const STATUS_NO_MEMORY: u64 = 125;
/// Exit status when a thread of the program raised an exception that nobody handles.
pub const STATUS_EXCEPTION: u64 = 126;

/// Ends the machine, when all is printed. Only for the root program.
pub fn exit_machine(status: u64) -> ! {
    console::flush();
    // SAFETY: the call has no pointers.
    unsafe { sys::machine_exit(status) };
    crate::thread::sleep_forever()
}

/// Asks to be written to a file; says whether there is somebody who does that. Returns again for
/// every time that the program is brought back from the file.
pub fn checkpoint(number: u64) -> bool {
    let mut answer = [0];
    let request = [CHECKPOINT, number];
    let words = rpc::call(&startup::startup().parent, &request, &mut answer);
    words.is_ok_and(|words| words == 1 && answer == [1])
}

/// Ends the program. The root program's end is the machine's.
pub fn exit(status: u64) -> ! {
    if let Some(startup) = startup::try_startup() {
        if startup.is_root == 1 {
            exit_machine(status);
        } else {
            let _ = rpc::call(&startup.parent, &[EXIT, status], &mut [0; 2]);
        }
    }
    crate::thread::sleep_forever()
}
