//! The boundary between user mode and handlers: one way in, one way on, one way out.
//!
//! ```text
//! trap --> enter: take the lock --> trap: what happened? --> run: make the pending call
//!                       ^                                      |            |
//!                       |                                  it stopped    it is done
//!                   user mode <-- leave: drop the lock <-------|------------+
//!                                                              v
//!                         schedule: choose another thread <-- model::park
//! ```

use fluke_abi::code::{Exception, Insanity};
use fluke_abi::layout::GATE;
use fluke_abi::port::{EVENT, Event};
use fluke_abi::state::Prot;

use crate::arch::apic::{self, KICK_VECTOR, TIMER_VECTOR};
use crate::arch::cpu::Cpu;
use crate::arch::entry::{GATE_VECTOR, KernelFrame, leave as leave_to_user, on_cpu_stack};
use crate::arch::instructions::{fault_address, out32, wait_for_interrupt};
use crate::call::{Call, Stop};
use crate::entry::dispatch;
use crate::kernel::Kernel;
use crate::mm::Fault;
use crate::model;
use crate::thread::Run;

pub mod lock {
    //! The kernel lock.

    use core::cell::UnsafeCell;
    use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use super::Kernel;

    /// How often [`offer`] looks whether a waiting CPU has taken the lock. One that its host has put
    /// aside must not keep everybody waiting.
    const OFFER_SPINS: u32 = 64;

    struct Locked {
        taken: AtomicBool,
        /// CPUs that wait for the lock.
        waiting: AtomicU32,
        kernel: UnsafeCell<Option<Kernel>>,
    }

    // SAFETY: the kernel is only reached by the CPU that has taken the lock.
    unsafe impl Sync for Locked {}

    static LOCKED: Locked = Locked {
        taken: AtomicBool::new(false),
        waiting: AtomicU32::new(0),
        kernel: UnsafeCell::new(None),
    };

    /// Takes the lock. Interrupts are off, so nothing on this CPU can want it too.
    #[inline]
    pub fn take() {
        if LOCKED.taken.swap(true, Ordering::Acquire) {
            LOCKED.waiting.fetch_add(1, Ordering::Relaxed);
            while LOCKED.taken.swap(true, Ordering::Acquire) {
                while LOCKED.taken.load(Ordering::Relaxed) {
                    core::hint::spin_loop();
                }
            }
            LOCKED.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Lets a CPU that waits for the lock, if there is one, have it first, and takes it again.
    pub fn offer() {
        if LOCKED.waiting.load(Ordering::Relaxed) == 0 {
            return;
        }
        release();
        for _ in 0..OFFER_SPINS {
            if LOCKED.taken.load(Ordering::Relaxed) {
                break;
            }
            core::hint::spin_loop();
        }
        take();
    }

    /// Drops the lock.
    #[inline]
    pub fn release() {
        LOCKED.taken.store(false, Ordering::Release);
    }

    /// Puts the kernel there, at boot.
    pub fn install(kernel: Kernel) {
        // SAFETY: the caller, the first CPU, has the lock.
        unsafe { *LOCKED.kernel.get() = Some(kernel) };
    }

    /// The kernel. The lock must be taken: by everything that runs between [`take`] at the
    /// boundary and [`release`] at the boundary, which is all code outside this file.
    #[inline]
    pub fn held_kernel() -> &'static mut Kernel {
        #[cfg(test)]
        return tests::kernel();
        #[cfg(not(test))]
        // SAFETY: the lock is held. References do not outlive a wait: handlers get theirs through
        // `Call::kernel`, which binds them to a borrow that `Call::wait` ends.
        match unsafe { &mut *LOCKED.kernel.get() } {
            Some(kernel) => kernel,
            None => panic!("kernel used before boot"),
        }
    }

    /// In tests each thread has a kernel of its own.
    #[cfg(test)]
    pub(crate) mod tests {
        use super::Kernel;
        use core::cell::Cell;
        use core::ptr::NonNull;
        use std::boxed::Box;

        thread_local! {
            static KERNEL: Cell<Option<NonNull<Kernel>>> = const { Cell::new(None) };
        }

        /// Puts the kernel there, for good.
        pub(crate) fn install(kernel: Kernel) {
            KERNEL.set(Some(NonNull::from(Box::leak(Box::new(kernel)))));
        }

        /// The kernel.
        pub(super) fn kernel() -> &'static mut Kernel {
            let kernel = KERNEL
                .get()
                .expect("a test that calls the kernel installs one");
            // SAFETY: leaked, and only this thread has it. References are used as in the kernel.
            unsafe { &mut *kernel.as_ptr() }
        }
    }
}

use lock::held_kernel;

/// From the entry stub, on the CPU's own stack: takes the lock and says on which stack to go on.
pub extern "C" fn enter() -> u64 {
    lock::take();
    let kernel = held_kernel();
    let cpu_stack = kernel
        .cpu()
        .hardware
        .as_ref()
        .map_or(0, |hardware| hardware.stack);
    match kernel.cpu().current {
        Some(id) => model::entry_stack(&kernel.threads[id], cpu_stack),
        None => cpu_stack,
    }
}

/// From the entry stub: deals with a trap from user mode.
pub extern "C" fn trap() -> ! {
    let kernel = held_kernel();
    if let Some(id) = kernel.cpu().current {
        let mut call = Call::new(kernel, id);
        let frame = &call.thread().frame;
        let (vector, error) = (frame.vector, frame.error);
        match vector {
            GATE_VECTOR if frame.rip == GATE => call.thread().in_call = true,
            14 => page_fault(&mut call, fault_address(), error),
            vector if vector == u64::from(TIMER_VECTOR) => {
                apic::end_of_interrupt();
                kernel.timer_fired();
            }
            vector if vector == u64::from(KICK_VECTOR) => apic::end_of_interrupt(),
            vector => exception(&mut call, vector, error),
        }
    }
    run()
}

/// Page-fault error code bits (SDM vol. 3, 4.7).
const FAULT_WRITE: u64 = 2;
const FAULT_FETCH: u64 = 16;

fn page_fault(call: &mut Call, address: u64, error: u64) {
    // Not every host tells a fetch by its error code; no data access is at its own instruction.
    let access = if error & FAULT_FETCH != 0 || address == call.thread().frame.rip {
        Prot::EXECUTE
    } else if error & FAULT_WRITE != 0 {
        Prot::WRITE
    } else {
        Prot::READ
    };
    let id = call.id;
    if let Err(fault) = call.kernel().translate(id, address, access) {
        call.kernel().take_fault(id, fault);
    }
}

fn exception(call: &mut Call, vector: u64, error: u64) {
    call.kernel().stats().count(|stats| &mut stats.exceptions);
    match Exception::from_number(vector) {
        Some(code) if vector < 32 => call.raise(code, error),
        _ => call.raise(Exception::Other, vector),
    }
}

/// Runs the current thread: makes the calls that its registers name until it can go on in user
/// mode, or must make way.
pub extern "C" fn run() -> ! {
    loop {
        let kernel = held_kernel();
        let Some(id) = kernel.cpu().current else {
            // SAFETY: the thread was stopped before it could trap; nothing on the stack is of use.
            unsafe { on_cpu_stack(schedule) }
        };
        let mut call = Call::new(kernel, id);
        while call.thread().in_call && runs(&mut call) {
            make_call(&mut call);
        }
        if runs(&mut call) {
            leave(&mut call);
        }
        model::park(&mut call);
    }
}

/// Whether the thread still has its CPU.
pub fn runs(call: &mut Call) -> bool {
    let thread = call.thread();
    let running = matches!(thread.run, Run::Running(_)) && !thread.stop_requested;
    running && !call.kernel().cpu().reschedule
}

fn make_call(call: &mut Call) {
    call.kernel().stats().count(|stats| &mut stats.calls);
    match dispatch(call) {
        Ok(()) => {}
        Err(Stop::Restart) => call.kernel().stats().count(|stats| &mut stats.restarts),
        Err(Stop::Fault(fault)) => {
            let id = call.id;
            call.kernel().take_fault(id, fault);
        }
        Err(Stop::Insanity(insanity)) => insane(call, insanity),
    }
}

fn insane(call: &mut Call, insanity: Insanity) {
    call.kernel().stats().count(|stats| &mut stats.exceptions);
    call.raise(Exception::Insanity, insanity as u64);
}

/// Leaves to user mode, unless an exception that was held back can be taken first.
fn leave(call: &mut Call) {
    let id = call.id;
    if !call.thread().pending.is_empty() {
        call.kernel().deliver_pending(id);
    }
    let kernel = call.kernel();
    kernel.prepare_user(id);
    if let Some(hardware) = &kernel.cpu().hardware {
        hardware
            .in_user
            .store(1, core::sync::atomic::Ordering::SeqCst);
    }
    lock::release();
    // SAFETY: the frame is that of the current thread, and the stack is of no further use: a trap
    // starts at its top.
    unsafe { leave_to_user() }
}

/// On the CPU's own stack, the lock taken: gives the CPU to the next thread.
pub extern "C" fn schedule() -> ! {
    held_kernel().take_off();
    loop {
        let kernel = held_kernel();
        if let Some(id) = kernel.choose() {
            model::resume(&mut Call::new(kernel, id));
        }
        // A page table that is going away must not stay loaded.
        kernel.leave_dead_space();
        if kernel.prepare_idle() {
            out32(EVENT, Event::Deadlock as u32);
        }
        lock::release();
        wait_for_interrupt();
        lock::take();
        held_kernel().cpu().idle = false;
    }
}

/// A trap from kernel mode: the end of an idle CPU's `hlt`, or a bug in the kernel.
pub extern "C" fn trap_in_kernel(frame: &KernelFrame) {
    if frame.vector == u64::from(TIMER_VECTOR) {
        apic::end_of_interrupt();
        lock::take();
        held_kernel().timer_fired();
        lock::release();
    } else if frame.vector == u64::from(KICK_VECTOR) {
        apic::end_of_interrupt();
    } else {
        panic!(
            "trap {} in the kernel, error {:#x}, rip {:#x}, cr2 {:#x}",
            frame.vector,
            frame.error,
            frame.rip,
            fault_address()
        );
    }
}

/// Where a fault inside a call or in user code goes.
impl Kernel {
    /// Sends a fault that the mapping hierarchy does not resolve to whoever can.
    pub fn take_fault(&mut self, id: crate::arena::Id<crate::thread::Thread>, fault: Fault) {
        self.stats().count(|stats| &mut stats.hard_faults);
        match fault.keeper {
            Some(keeper) => self.send_exception(id, Some(keeper), fault.message()),
            None => self.raise(id, fault.message()),
        }
    }
}

/// How a CPU comes up; see `fluke_abi::boot`.
pub mod start {
    use core::sync::atomic::{AtomicBool, Ordering};

    use fluke_abi::ABI_VERSION;
    use fluke_abi::boot::{BOOT_MAGIC, BootInfo, CPUS_MAX, Gate};

    use super::{
        Cpu, EVENT, Event, Kernel, apic, held_kernel, lock, out32, schedule, wait_for_interrupt,
    };
    use crate::arch::entry;

    /// Bytes at the top of a CPU's stack that faults use which must not use the current stack.
    const IST_BYTES: u64 = 2048;

    /// Which CPUs can be brought into the kernel by an interrupt. They need not be awake for it: a
    /// CPU that has nothing to do from the start costs nothing.
    static ONLINE: [AtomicBool; CPUS_MAX as usize] =
        [const { AtomicBool::new(false) }; CPUS_MAX as usize];

    /// Whether a CPU has come up.
    pub fn is_online(number: u32) -> bool {
        ONLINE[number as usize].load(Ordering::Acquire)
    }

    /// Structures of the CPUs.
    struct Cpus(core::cell::UnsafeCell<[core::mem::MaybeUninit<Cpu>; CPUS_MAX as usize]>);

    // SAFETY: each CPU uses its own element only.
    unsafe impl Sync for Cpus {}

    static CPUS: Cpus = Cpus(core::cell::UnsafeCell::new(
        [const { core::mem::MaybeUninit::zeroed() }; CPUS_MAX as usize],
    ));

    /// Entry of every CPU.
    ///
    /// # Safety
    /// Called once on each CPU by the image's entry point, in the state that the host promises.
    pub unsafe fn start(number: u32, boot: &'static BootInfo, stack: u64) -> ! {
        let gate = if boot.gate == Gate::Syscall as u32 {
            Gate::Syscall
        } else {
            Gate::Ud2
        };
        assert!(
            boot.magic == BOOT_MAGIC && boot.abi_version == ABI_VERSION,
            "foreign host"
        );
        assert!(boot.cpus <= CPUS_MAX, "too many CPUs");
        entry::init();
        // SAFETY: the element is this CPU's alone.
        let cpu = unsafe { CPUS.0.get().cast::<Cpu>().add(number as usize) };
        // SAFETY: once on this CPU, first thing; `stack` is its own.
        unsafe { Cpu::init(cpu, number, stack, IST_BYTES, gate) };
        apic::init();
        ONLINE[number as usize].store(true, Ordering::Release);
        if number == 0 {
            lock::take();
            // SAFETY: the host's word, checked as far as it can be.
            lock::install(unsafe { Kernel::new(boot) });
            held_kernel().make_root(boot);
            out32(EVENT, Event::FirstUser as u32);
        } else {
            // Nobody sends an interrupt before there is a kernel.
            wait_for_interrupt();
            lock::take();
        }
        let state = held_kernel().cpu();
        // SAFETY: the only reference from here on.
        state.hardware = Some(unsafe { &mut *cpu });
        state.idle = false;
        schedule()
    }
}
