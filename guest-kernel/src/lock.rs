//! The locks of the kernel. Only this module knows the preemption level.
//!
//! At levels *none* and *partial* there is one lock: a CPU takes it at the boundary, with interrupts
//! off, and has the whole kernel until it leaves to user mode, idles, or [`offer`]s it. The locks
//! below then cost nothing.
//!
//! At level *full* there are two, taken in this order:
//!
//! 1. The **kernel mutex** protects [`Kernel`]. It belongs to a thread, which can be preempted while it
//!    has it; who wants it sleeps, and lends its priority to the owner. A handler takes it with its
//!    first use of the kernel's state ([`take_kernel`], by `Call::kernel`), and gives it up when it
//!    waits or is done.
//! 2. The **core lock** protects [`Scheduler`]: a spin lock with interrupts off, held for a few hundred
//!    instructions at most ([`scheduler`]). Nothing is taken inside, and nobody sleeps, but by leaving the
//!    stack: then the next thread releases it.
//!
//! Everything else runs with interrupts on. Builds with the `lock-checker` feature check the order, and
//! that who uses the kernel's state has the mutex.

use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{self, AtomicBool, AtomicU32, Ordering};

use crate::arch::cpu::Cpu;
use crate::arch::entry;
use crate::arch::instructions::{disable_interrupts, enable_interrupts};
use crate::arena::Id;
use crate::kernel::Kernel;
use crate::model;
use crate::sched::{Entity, Scheduler};

mod owner;
#[cfg(test)]
mod owner_model;

use owner::Owner;

/// Preemption level *full*: the kernel can be preempted everywhere but under the core lock.
pub const FULL: bool = cfg!(feature = "full");
/// What the level adds to the name of an image.
pub const NAME: &str = if FULL { "-full" } else { "" };
/// The checks of a debug build.
const CHECK: bool = cfg!(feature = "lock-checker");

/// How often [`offer`] looks whether a waiting CPU has taken the lock. One that its host has put
/// aside must not keep everybody waiting.
const OFFER_SPINS: u32 = 64;

struct Locked {
    /// The spin lock: of everything, or at level full of the scheduler.
    taken: AtomicBool,
    /// CPUs that wait for it.
    waiting: AtomicU32,
    /// The CPU that has it, plus 1; for the checks.
    holder: AtomicU32,
    /// The owner of the kernel mutex.
    owner: Owner,
    kernel: UnsafeCell<Option<Kernel>>,
    scheduler: UnsafeCell<Option<Scheduler>>,
}

// SAFETY: kernel and scheduler are only reached by who has the lock.
unsafe impl Sync for Locked {}

static LOCKED: Locked = Locked {
    taken: AtomicBool::new(false),
    waiting: AtomicU32::new(0),
    holder: AtomicU32::new(0),
    owner: Owner(AtomicU32::new(0)),
    kernel: UnsafeCell::new(None),
    scheduler: UnsafeCell::new(None),
};

/// Takes the spin lock. Interrupts are off, so nothing on this CPU can want it too.
#[inline]
pub fn take() {
    check(!holds(), "the spin lock is taken twice");
    if LOCKED.taken.swap(true, Ordering::Acquire) {
        LOCKED.waiting.fetch_add(1, Ordering::Relaxed);
        while LOCKED.taken.swap(true, Ordering::Acquire) {
            while LOCKED.taken.load(Ordering::Relaxed) {
                core::hint::spin_loop();
            }
        }
        LOCKED.waiting.fetch_sub(1, Ordering::Relaxed);
    }
    if CHECK {
        let holder = Cpu::current_number() + 1;
        LOCKED.holder.store(holder, Ordering::Relaxed);
    }
}

/// Whether this CPU has the spin lock, as far as the checks know.
fn holds() -> bool {
    CHECK && LOCKED.holder.load(Ordering::Relaxed) == Cpu::current_number() + 1
}

#[inline]
fn check(right: bool, wrong: &str) {
    if CHECK && !right {
        panic!("lock order: {wrong}");
    }
}

/// Drops the spin lock.
#[inline]
pub fn release() {
    check(holds(), "the spin lock is released by who has it not");
    if CHECK {
        LOCKED.holder.store(0, Ordering::Relaxed);
    }
    LOCKED.taken.store(false, Ordering::Release);
}

/// Drops the spin lock, and leaves to the thread that has this CPU. It need not be the one whose stack this is,
/// which is not used any more when the lock is free.
///
/// # Safety
/// As for [`entry::leave`].
#[inline]
pub unsafe fn leave() -> ! {
    check(holds(), "user mode without the spin lock");
    if CHECK {
        LOCKED.holder.store(0, Ordering::Relaxed);
    }
    // SAFETY: the caller's.
    unsafe { entry::leave(&LOCKED.taken) }
}

/// A trap from user mode has come to the kernel.
#[inline]
pub fn enter() {
    if !FULL {
        take();
    }
}

/// What the trap left in the CPU's registers has been read: from here on the thread may be preempted.
#[inline]
pub fn open(id: Id<Entity>) {
    if FULL {
        check(!CHECK || !owns(id), "user code had the kernel mutex");
        enable_interrupts();
    }
}

/// A thread starts on an empty stack, chosen to run by a CPU that has the core lock.
#[inline]
pub fn start() {
    if FULL {
        release();
        enable_interrupts();
    }
}

/// The scheduler, with the core lock, which drops with this.
pub struct Held {
    scheduler: &'static mut Scheduler,
    interrupts: bool,
}

impl Deref for Held {
    type Target = Scheduler;

    #[inline]
    fn deref(&self) -> &Scheduler {
        self.scheduler
    }
}

impl DerefMut for Held {
    #[inline]
    fn deref_mut(&mut self) -> &mut Scheduler {
        self.scheduler
    }
}

impl Drop for Held {
    #[inline]
    fn drop(&mut self) {
        if FULL {
            release();
            if self.interrupts {
                enable_interrupts();
            }
        }
    }
}

/// Takes the core lock. To be held for one expression, and never twice.
#[inline]
pub fn scheduler() -> Held {
    let interrupts = FULL && disable_interrupts();
    if FULL {
        take();
    }
    Held {
        scheduler: held_scheduler(),
        interrupts,
    }
}

/// The scheduler. The spin lock must be taken.
#[inline]
pub fn held_scheduler() -> &'static mut Scheduler {
    #[cfg(test)]
    return tests::scheduler();
    #[cfg(not(test))]
    // SAFETY: the lock is held; a reference lives for an expression under [`Held`], or on a CPU's own
    // stack, where nothing else uses one. CPUs that come up after `install` are the first to ask.
    unsafe {
        (*LOCKED.scheduler.get()).as_mut().unwrap_unchecked()
    }
}

/// Puts kernel and scheduler there, at boot, before any other CPU runs.
pub fn install(kernel: Kernel, scheduler: Scheduler) {
    // SAFETY: only the first CPU runs.
    unsafe {
        *LOCKED.kernel.get() = Some(kernel);
        *LOCKED.scheduler.get() = Some(scheduler);
    }
}

/// The kernel. It must be the caller's: by the spin lock, or at level full by the kernel mutex.
#[inline]
pub fn held_kernel() -> &'static mut Kernel {
    #[cfg(test)]
    return tests::kernel();
    #[cfg(not(test))]
    // SAFETY: the kernel is the caller's. References do not outlive a wait: handlers get theirs
    // through `Call::kernel`, which binds them to a borrow that `Call::wait` ends. As for the scheduler,
    // nobody asks before `install`.
    unsafe {
        (*LOCKED.kernel.get()).as_mut().unwrap_unchecked()
    }
}

/// Whether the running thread has the kernel mutex.
#[inline]
fn owns(id: Id<Entity>) -> bool {
    LOCKED.owner.is(id.offset())
}

/// Makes sure that the running thread has the kernel mutex; sleeps until it does.
#[inline]
pub fn take_kernel(id: Id<Entity>) {
    check(
        !FULL || !holds(),
        "the kernel mutex is wanted under the core lock",
    );
    if FULL && !owns(id) {
        acquire(id);
    }
}

/// Apart from the rest, which keeps more on the stack.
#[inline(never)]
fn acquire(id: Id<Entity>) {
    if !LOCKED.owner.try_take(id.offset()) {
        wait_for_kernel(id);
    }
}

#[cold]
fn wait_for_kernel(id: Id<Entity>) {
    let mut held = scheduler();
    let Some(owner) = LOCKED.owner.contend(id.offset()) else {
        return;
    };
    held.wait_for_kernel(id, owner);
    model::switch(held.stack(id));
    check(owns(id), "a thread woke without the kernel mutex");
}

/// Whether somebody waits for the kernel mutex. Under the core lock, it stays so.
#[inline]
pub fn is_wanted() -> bool {
    FULL && LOCKED.owner.is_contended()
}

/// The running thread gives the kernel mutex up, if it has it.
#[inline]
pub fn release_kernel(id: Id<Entity>) {
    if FULL && owns(id) && !LOCKED.owner.try_release(id.offset()) {
        release_kernel_in(&mut scheduler(), id);
    }
}

/// As [`release_kernel`], under the core lock.
#[inline(always)]
pub fn release_kernel_in(held: &mut Held, id: Id<Entity>) {
    if FULL {
        LOCKED.owner.pass_on(id.offset(), || {
            let (next, more) = held.next_for_kernel(id);
            (next.map(Id::offset), more)
        });
    }
}

/// A place in a long call where others may have the kernel first: a CPU that waits for the lock, or at
/// level full a thread that waits for the mutex.
pub fn offer(id: Id<Entity>) {
    if FULL {
        if is_wanted() {
            release_kernel(id);
        }
        return;
    }
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

/// In tests each thread has a kernel and a scheduler of its own.
#[cfg(test)]
pub(crate) mod tests {
    use super::{Kernel, Scheduler};
    use core::cell::Cell;
    use core::ptr::NonNull;
    use std::boxed::Box;

    thread_local! {
        static KERNEL: Cell<Option<NonNull<Kernel>>> = const { Cell::new(None) };
        static SCHEDULER: Cell<Option<NonNull<Scheduler>>> = const { Cell::new(None) };
    }

    /// Puts the kernel there, for good.
    pub(crate) fn install(kernel: Kernel) {
        KERNEL.set(Some(NonNull::from(Box::leak(Box::new(kernel)))));
    }

    /// The same with the scheduler, which all tests need.
    pub(crate) fn install_scheduler(scheduler: Scheduler) {
        SCHEDULER.set(Some(NonNull::from(Box::leak(Box::new(scheduler)))));
    }

    /// The kernel.
    pub(super) fn kernel() -> &'static mut Kernel {
        let kernel = KERNEL
            .get()
            .expect("a test that calls the kernel installs one");
        // SAFETY: leaked, and only this thread has it. References are used as in the kernel.
        unsafe { &mut *kernel.as_ptr() }
    }

    /// The scheduler.
    pub(super) fn scheduler() -> &'static mut Scheduler {
        let scheduler = SCHEDULER
            .get()
            .expect("a test that schedules installs a scheduler");
        // SAFETY: as in `kernel`.
        unsafe { &mut *scheduler.as_ptr() }
    }
}
