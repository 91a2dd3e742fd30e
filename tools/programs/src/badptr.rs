//! Writes through a wild pointer; its parent ends it with a line that says so. With the argument
//! `call` it passes a wild pointer to the kernel, with `jump` it goes there, with `stack` it uses
//! more stack than it has. With `kernel` it reads the kernel's text, with `enter` it goes there, and with
//! `supervisor` it asks the kernel to.

use core::hint::black_box;

use fluke_abi::layout::{KERNEL_IMAGE, KERNEL_PHYSICAL};
use libfluke::{println, startup, sys};

/// Where nothing is ever mapped: below the lowest address that a space may use.
const NOWHERE: u64 = 0x10;

/// Start of the kernel's image, which is text.
const KERNEL: u64 = KERNEL_IMAGE + KERNEL_PHYSICAL;

/// The program.
pub fn main() -> u64 {
    match startup::args().nth(1) {
        // SAFETY: the point of this program is that it is not sound.
        Some("call") => unsafe {
            sys::mutex_lock(NOWHERE as *mut _);
        },
        // SAFETY: as above.
        Some("jump") => unsafe {
            core::mem::transmute::<u64, extern "C" fn()>(NOWHERE)();
        },
        Some("stack") => {
            black_box(deeper(0));
        }
        // SAFETY: as above.
        Some("kernel") => unsafe {
            black_box((KERNEL as *const u64).read_volatile());
        },
        // SAFETY: as above.
        Some("enter") => unsafe {
            core::mem::transmute::<u64, extern "C" fn()>(KERNEL)();
        },
        // SAFETY: as above.
        Some("supervisor") => unsafe {
            sys::supervisor_call(KERNEL, 0);
        },
        // SAFETY: as above.
        _ => unsafe { (NOWHERE as *mut u8).write_volatile(1) },
    }
    println!("badptr: still here");
    crate::FAILED
}

fn deeper(depth: u64) -> u64 {
    let frame = black_box([depth; 64]);
    if frame[0] == u64::MAX {
        0
    } else {
        deeper(depth + 1) + frame[63]
    }
}
