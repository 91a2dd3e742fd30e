//! Pseudo-kernel threads (OSDI '99 5.6): drivers, in the process model whatever the kernel's is.
//!
//! A driver is a thread in *user mode in the kernel's address space*. So the kernel treats it as any
//! thread: it can be preempted and sleeps by system calls, on a stack of its own that is none of the
//! kernel's. What user mode may not do, it does by [`supervisor`], which calls a function in supervisor
//! mode that does not wait.
//!
//! A driver is a module here and a line in `DRIVERS`: a function that is given a [`Server`], from which
//! it gets its messages. The root program finds a reference to its port ([`fluke_abi::driver`]).
//!
//! Code that runs in user mode, here and in the drivers, uses what it is given, the image's constants
//! and its own memory: nothing of [`Kernel`], which is the supervisor's.

#[deny(unsafe_code)]
mod console;
#[deny(unsafe_code)]
mod store;

use core::arch::asm;
use core::cell::UnsafeCell;

use fluke_abi::boot::BootInfo;
use fluke_abi::code::Insanity;
use fluke_abi::driver::{Driver, MESSAGE_WORDS};
use fluke_abi::entry::Entry;
use fluke_abi::ipc::{CallWord, Flavour};
use fluke_abi::layout::{GATE, KERNEL_IMAGE, ROOT_OBJECTS};
use fluke_abi::object;
use fluke_abi::state::{PRIORITY_MAX, Prot};

use crate::arena::Id;
use crate::call::{Call, Stop};
use crate::ipc::{Port, Pset};
use crate::kernel::Kernel;
use crate::lock::scheduler;
use crate::mm::Space;
use crate::object::Link;
use crate::reference::Ref;
use crate::thread::{Raised, Thread};

/// All drivers.
static DRIVERS: [Pseudo; 2] = [
    Pseudo::new(Driver::Console, console::main),
    Pseudo::new(Driver::Store, store::main),
];

/// Bytes of a driver's stack.
const STACK_BYTES: usize = 8192;

/// A driver, and its memory.
struct Pseudo {
    driver: Driver,
    main: fn(Server) -> !,
    /// Names the port set that it serves.
    pset: object::Pset,
    memory: UnsafeCell<Memory>,
}

// SAFETY: the memory is the driver's alone.
unsafe impl Sync for Pseudo {}

#[repr(C, align(4096))]
struct Memory {
    stack: [u8; STACK_BYTES],
    message: [u64; MESSAGE_WORDS],
}

impl Pseudo {
    const fn new(driver: Driver, main: fn(Server) -> !) -> Self {
        Self {
            driver,
            main,
            pset: object::Pset::new(),
            memory: UnsafeCell::new(Memory {
                stack: [0; STACK_BYTES],
                message: [0; MESSAGE_WORDS],
            }),
        }
    }
}

/// Makes the kernel's own space, and the drivers in it, ready to run. References to their ports go to the
/// page of the root program's objects, at physical address `root_objects`.
pub fn start(kernel: &mut Kernel, boot: &BootInfo, root_objects: u64) {
    let own = kernel.create(None, Space::new).expect("pool for a space");
    let space = &mut kernel.spaces[own];
    space.page_table = boot.own_page_table;
    space.table = scheduler().add_own_table().expect("pool for a space");
    kernel.own_space = own;
    for driver in &DRIVERS {
        let reference = kernel.create(None, Ref::new);
        let reference = reference.expect("pool for a reference");
        let at = root_objects + (driver.driver.reference() - ROOT_OBJECTS);
        kernel.attach(reference, at);
        if driver.driver != Driver::Store || boot.store != 0 {
            let port = driver.start(kernel, own);
            kernel.refs[reference].link = Link::Port(port);
        }
    }
}

impl Pseudo {
    fn start(&'static self, kernel: &mut Kernel, own: Id<Space>) -> Id<Port> {
        let pset = kernel.create(None, Pset::new).expect("pool for a port set");
        let port = kernel.create(None, Port::new).expect("pool for a port");
        let thread = kernel.create_thread(None).expect("pool for a thread");
        let handle = self.pset.handle() as u64;
        kernel.attach(pset, handle - KERNEL_IMAGE);
        kernel.set_pset(port, Some(pset));
        kernel.set_space(thread, Some(own));
        let state = &mut kernel.threads[thread];
        state.priority = PRIORITY_MAX as u8;
        state.server_pset = handle;
        state.frame.rip = enter as *const () as u64;
        state.frame.rdi = core::ptr::from_ref(self) as u64;
        // As after a call: rsp + 8 is a multiple of 16.
        state.frame.rsp = self.memory.get() as u64 + STACK_BYTES as u64 - 8;
        kernel.make_ready(thread);
        port
    }
}

impl Kernel {
    /// Whether a thread is one of the kernel's own.
    pub fn is_own(&self, id: Id<Thread>) -> bool {
        self.threads[id].space == Some(self.own_space)
    }

    /// Nobody keeps the kernel's own space: what is wrong there is wrong with the kernel.
    pub fn check_own(&self, id: Id<Thread>, raised: &Raised) {
        assert!(
            !self.is_own(id),
            "a driver raised exception {} ({:#x}) at rip {:#x}",
            raised.code as u64,
            raised.subcode,
            self.threads[id].frame.rip
        );
    }
}

/// A driver's first instructions, in user mode.
extern "C" fn enter(driver: &'static Pseudo) -> ! {
    // SAFETY: this thread is the only one that uses the driver's memory, and comes here once; the stack
    // below the message is in use, but not by reference.
    let message = unsafe { &mut (*driver.memory.get()).message };
    (driver.main)(Server { message })
}

/// A driver's port, in user mode.
pub struct Server {
    message: &'static mut [u64; MESSAGE_WORDS],
}

impl Server {
    /// The message, where the answer to it can be written too.
    pub fn message(&mut self) -> &mut [u64; MESSAGE_WORDS] {
        self.message
    }

    /// Answers the last message with as many words of what stands in its place now, if it wants an answer,
    /// and waits for the next. Returns its words.
    pub fn answer_and_wait(&mut self, answer: usize) -> usize {
        loop {
            let mut word = CallWord(Entry::ipc_reply_wait_receive as u64).0;
            let mut left = MESSAGE_WORDS;
            // SAFETY: the gate page is mapped in every space, and its stub returns; the kernel reads the
            // answer, and then writes to the message.
            unsafe {
                asm!(
                    "mov r11d, {gate}",
                    "call r11",
                    gate = const GATE,
                    inout("rax") word,
                    inout("rsi") self.message.as_ptr() => _,
                    inout("rdx") answer => _,
                    inout("r10") self.message.as_mut_ptr() => _,
                    inout("r8") left,
                    out("rcx") _,
                    out("r11") _,
                    out("r15") _,
                );
            }
            // None: who is to be answered was gone, and there is nothing new yet.
            if Flavour::from_number(CallWord(word).flavour()) != Flavour::None {
                return MESSAGE_WORDS - left;
            }
        }
    }
}

/// Physical address of something in the image.
pub fn physical<T>(at: &T) -> u64 {
    core::ptr::from_ref(at) as u64 - KERNEL_IMAGE
}

/// From user mode, calls a function in supervisor mode. It runs as a handler does, but may not wait, and
/// should be short.
pub fn supervisor<A>(function: extern "C" fn(&A) -> u64, argument: &A) -> u64 {
    let mut result = Entry::supervisor_call as u64;
    // SAFETY: the gate page is mapped in every space, and its stub returns. The argument has the same
    // address in supervisor mode.
    unsafe {
        asm!(
            "mov r11d, {gate}",
            "call r11",
            gate = const GATE,
            inout("rax") result,
            in("rdi") function,
            in("rsi") argument,
            out("rcx") _,
            out("r11") _,
        );
    }
    result
}

/// The supervisor's part of [`supervisor`]: only for threads of the kernel, and functions of the image.
pub fn call(call: &mut Call, function: u64, argument: u64) -> Result<u64, Stop> {
    let id = call.id;
    if !call.kernel().is_own(id) {
        return Err(Insanity::NotKernel.into());
    }
    if function < KERNEL_IMAGE {
        return Err(Insanity::InvalidAddress.into());
    }
    call.translate(function, Prot::EXECUTE)?;
    // SAFETY: the kernel's own threads use `supervisor`, which sees to it that the function is one that
    // takes such an argument.
    let function: extern "C" fn(u64) -> u64 = unsafe { core::mem::transmute(function) };
    Ok(function(argument))
}

/// Whether this runs in user mode.
pub fn in_user_mode() -> bool {
    let selector: u64;
    // SAFETY: no side effect.
    unsafe { asm!("mov {}, cs", out(reg) selector, options(nomem, nostack, preserves_flags)) };
    selector & 3 != 0
}
