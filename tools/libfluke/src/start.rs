//! The first instructions of a program.

use core::arch::global_asm;

use fluke_abi::boot::{BOOT_MAGIC, RootInfo};
use fluke_abi::driver::Driver;
use fluke_abi::layout::{ROOT_INFO, ROOT_MEMORY, ROOT_OBJECTS};
use fluke_abi::object::OBJECT_SIZE;

use crate::heap::HEAP;
use crate::object::{Ref, Target, Task};
use crate::startup::{self, STARTUP_MAGIC, Startup};
use crate::{console, parent};

global_asm!(
    ".globl _start",
    ".type _start, @function",
    "_start:",
    // The end of the chain of frames, for backtraces.
    "xor ebp, ebp",
    "and rsp, -16",
    "call {start}",
    "ud2",
    start = sym fluke_start,
);

unsafe extern "Rust" {
    fn fluke_main() -> u64;
}

/// `startup` is null in the root program, which the kernel starts.
unsafe extern "C" fn fluke_start(startup: *const Startup) -> ! {
    // SAFETY: a parent passes the block that it has mapped for good.
    let startup = match unsafe { startup.as_ref() } {
        Some(startup) => startup,
        None => root_startup(),
    };
    startup::set(startup);
    assert!(
        startup.magic == STARTUP_MAGIC && startup.abi_version == fluke_abi::ABI_VERSION,
        "the program and its parent were built for different ABIs"
    );
    // SAFETY: the parent says that the heap is ours and zeroed.
    unsafe { HEAP.init(startup.heap_start, startup.heap_size) };
    // SAFETY: `program!` defines it.
    parent::exit(unsafe { fluke_main() })
}

/// The root program's startup block, made from what the host says.
fn root_startup() -> &'static Startup {
    static mut BLOCK: Startup = Startup::empty();
    // SAFETY: called once, by the only thread there is; the host fills in the page of information
    // and the kernel makes the objects in the object page before the program starts.
    unsafe {
        let info = &*(ROOT_INFO as *const RootInfo);
        let block = &raw mut BLOCK;
        let block = &mut *block;
        if info.magic != BOOT_MAGIC || info.abi_version != fluke_abi::ABI_VERSION {
            fail("the host was built for another ABI", parent::STATUS_PANIC);
        }
        block.magic = STARTUP_MAGIC;
        block.abi_version = info.abi_version;
        block.is_root = 1;
        block.cpus = info.cpus;
        block.tsc_khz = info.tsc_khz;
        block.heap_start = ROOT_MEMORY;
        block.heap_size = info.memory_size;
        if [&block.space, &block.console, &block.store]
            .into_iter()
            .any(|reference| reference.create().is_err())
        {
            fail(
                "the kernel has no room for its references",
                parent::STATUS_NO_MEMORY,
            );
        }
        let task = &*((ROOT_OBJECTS + OBJECT_SIZE) as *const Task);
        task.point(&block.space as &Ref);
        block.console.copy_from(console::of_root());
        block
            .store
            .copy_from(&*(Driver::Store.reference() as *const Ref));
        block
    }
}

/// Ends the machine before the root program has begun.
fn fail(why: &str, status: u64) -> ! {
    crate::println!("root: cannot start: {why}");
    parent::exit_machine(status)
}
