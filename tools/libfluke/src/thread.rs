//! Threads of the program's own space.

use alloc::boxed::Box;
use core::arch::global_asm;
use core::sync::atomic::{AtomicBool, Ordering};

use fluke_abi::code::Status;
use fluke_abi::state::ThreadFlags;

use crate::heap;
use crate::object::{Cond, Mutex, Thread};
use crate::startup::startup;
use crate::sys;

/// Bytes of a thread's stack, if not said otherwise.
pub const STACK_BYTES: u64 = 64 << 10;

global_asm!(
    ".globl fluke_thread_start",
    ".type fluke_thread_start, @function",
    "fluke_thread_start:",
    // The end of the chain of frames, for backtraces.
    "xor ebp, ebp",
    "call {main}",
    "ud2",
    main = sym thread_main,
);

unsafe extern "C" {
    fn fluke_thread_start();
}

/// What a thread and whoever waits for it share.
struct Packet {
    body: Option<Box<dyn FnOnce() + Send>>,
    mutex: Mutex,
    cond: Cond,
    done: AtomicBool,
}

unsafe extern "C" fn thread_main(packet: *mut Packet) -> ! {
    // SAFETY: `spawn` passes a packet that lives until `join`, and nobody else uses `body`.
    let body = unsafe { (*packet).body.take() };
    if let Some(body) = body {
        body();
    }
    // SAFETY: as above; from here on both sides only share it.
    let packet = unsafe { &*packet };
    packet.mutex.lock();
    packet.done.store(true, Ordering::Release);
    packet.cond.signal();
    packet.mutex.unlock();
    // A thread cannot destroy itself: it waits for `join` to do it.
    sleep_forever()
}

/// A thread that can be waited for.
pub struct Handle {
    thread: &'static Thread,
    packet: *mut Packet,
    stack: u64,
    stack_bytes: u64,
}

// SAFETY: the packet is made to be shared with another thread.
unsafe impl Send for Handle {}

/// Starts a thread that runs `body`.
pub fn spawn(body: impl FnOnce() + Send + 'static) -> Result<Handle, Status> {
    spawn_with_stack(STACK_BYTES, body)
}

/// Starts a thread with a stack of `stack_bytes`.
pub fn spawn_with_stack(
    stack_bytes: u64,
    body: impl FnOnce() + Send + 'static,
) -> Result<Handle, Status> {
    let packet = Box::leak(Box::new(Packet {
        body: Some(Box::new(body)),
        mutex: Mutex::new(),
        cond: Cond::new(),
        done: AtomicBool::new(false),
    }));
    packet.mutex.create()?;
    packet.cond.create()?;
    let thread = Thread::alloc()?;
    let stack = heap::pages(stack_bytes).ok_or(Status::NoMemory)?;
    let packet: *mut Packet = packet;
    // SAFETY: the stack is the thread's own, and the start code calls `thread_main` with the
    // packet. Its `call` makes the alignment what the ABI wants.
    unsafe {
        thread.start(
            &startup().space,
            thread.handle() as u64,
            fluke_thread_start as *const () as u64,
            stack + stack_bytes,
            packet as u64,
        );
    }
    Ok(Handle {
        thread,
        packet,
        stack,
        stack_bytes,
    })
}

impl Handle {
    /// The thread object.
    pub fn thread(&self) -> &'static Thread {
        self.thread
    }

    /// Sets the thread's priority: stops it, and lets it go on with another.
    pub fn set_priority(&self, priority: u64) {
        let mut state = self.thread.state(None);
        state.priority = priority;
        state.flags &= !ThreadFlags::STOPPED.bits();
        // SAFETY: the registers are the thread's own.
        unsafe { self.thread.set_state(Some(&state), None, None, None) };
    }

    /// Says that the thread goes on as another thread object, made from its state.
    pub fn replace(&mut self, thread: &'static Thread) {
        self.thread = thread;
    }

    /// Whether the thread's function has returned.
    pub fn is_done(&self) -> bool {
        // SAFETY: the packet lives until `join`.
        unsafe { (*self.packet).done.load(Ordering::Acquire) }
    }

    /// Waits until the thread's function has returned, and unmakes the thread.
    pub fn join(self) {
        // SAFETY: the packet lives until the end of this function.
        let packet = unsafe { &*self.packet };
        packet.mutex.lock();
        while !packet.done.load(Ordering::Acquire) {
            packet.cond.wait(&packet.mutex);
        }
        packet.mutex.unlock();
        self.end();
        packet.cond.destroy();
        packet.mutex.destroy();
        // SAFETY: the thread is gone; what it shared, its stack and its object are ours alone.
        unsafe {
            drop(Box::from_raw(self.packet));
            heap::free_pages(self.stack, self.stack_bytes);
            drop(Box::from_raw(core::ptr::from_ref(self.thread).cast_mut()));
        }
    }

    /// Stops and unmakes the thread wherever it is; what it owned is leaked.
    pub fn destroy(self) {
        self.end();
    }

    fn end(&self) {
        self.thread.stop_and_destroy();
    }
}

/// The calling thread's object.
pub fn current() -> u64 {
    // SAFETY: the call has no parameters.
    unsafe { sys::thread_self() }
}

/// The CPU that the calling thread runs on, at this moment.
pub fn cpu() -> u64 {
    // SAFETY: the call has no parameters.
    unsafe { sys::cpu_self() }
}

/// Sleeps for `ns` nanoseconds.
pub fn sleep(ns: u64) {
    // SAFETY: the calls have no pointers.
    unsafe { sys::thread_sleep(sys::clock_read().saturating_add(ns)) };
}

/// Enters the kernel for a moment, in which other threads may get a turn.
pub fn pause() {
    // On the host, tests run without a kernel.
    #[cfg(feature = "guest")]
    sleep(20_000);
}

/// Does nothing ever again.
pub fn sleep_forever() -> ! {
    loop {
        // SAFETY: the call has no pointers.
        unsafe { sys::thread_sleep(u64::MAX) };
    }
}
