//! Panics end the program, with a message and a backtrace of addresses.

use core::arch::asm;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::parent::{STATUS_PANIC, exit};
use crate::println;
use crate::startup;

/// Most frames shown.
const FRAMES: usize = 24;

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    static PANICKING: AtomicBool = AtomicBool::new(false);
    // A panic while printing one, or in a second thread: say no more.
    if !PANICKING.swap(true, Ordering::AcqRel) {
        let name = startup::try_startup()
            .and_then(|_| startup::args().next())
            .unwrap_or("root");
        println!("{name}: {info}");
        backtrace();
    }
    exit(STATUS_PANIC)
}

/// Prints the return addresses of the chain of frames. Programs are compiled with frame pointers,
/// and the first frame of a thread has none before it.
fn backtrace() {
    let mut frame: u64;
    // SAFETY: only reads a register.
    unsafe { asm!("mov {}, rbp", out(reg) frame, options(nomem, nostack, preserves_flags)) };
    for _ in 0..FRAMES {
        if frame == 0 || !frame.is_multiple_of(8) {
            break;
        }
        // SAFETY: the start code of each thread ends the chain with 0, and each frame before
        // holds its caller's frame and the return address.
        let (next, back) = unsafe { (*(frame as *const u64), *(frame as *const u64).add(1)) };
        println!("  at {back:#x}");
        if next <= frame {
            break;
        }
        frame = next;
    }
}
