//! The boundary between user mode and handlers: one way in, one way on, one way out.
//!
//! ```text
//!      trap: what happened? --> run: make the pending call <-- start_thread
//!              ^                     |              |               ^
//!              |                 it is done   it makes way          | nothing on its stack
//!          user mode <---------- leave            park              |
//!                                                   |        model::resume
//!                     model::switch: drop or keep the stack         ^
//!                                                   v               |
//!                                               schedule: choose another thread
//! ```

use fluke_abi::code::{Exception, Insanity};
use fluke_abi::layout::GATE;
use fluke_abi::port::{DOORBELL_VECTOR, EVENT, Event};
use fluke_abi::probe::Probe;
use fluke_abi::state::Prot;

use crate::arch::apic::{self, KICK_VECTOR, TIMER_VECTOR};
use crate::arch::cpu::count;
use crate::arch::entry::{GATE_VECTOR, KernelFrame, on_cpu_stack};
use crate::arch::instructions::{fault_address, out32, wait_for_interrupt};
use crate::arena::Id;
use crate::call::{Call, Stop};
use crate::entry::dispatch;
use crate::kernel::Kernel;
use crate::lock::{self, held_scheduler, scheduler};
use crate::model;
use crate::mutant::mutant;
use crate::probe::probe;
use crate::sched::{Entity, Scheduler};
use crate::thread::{Run, Thread};

/// From the entry stub: deals with a trap from user mode.
pub extern "C" fn trap() -> ! {
    lock::enter();
    let mut call = Call::current();
    let frame = call.frame();
    let (vector, error) = (frame.vector, frame.error);
    let is_call = vector == GATE_VECTOR && frame.rip == GATE;
    let address = if vector == PAGE_FAULT {
        fault_address()
    } else {
        0
    };
    lock::open(call.entity);
    if is_call {
        call.begin();
        // What others want of the thread by now can wait until it is done or waits, as if they had come then.
        make_call(&mut call);
    } else if vector == PAGE_FAULT {
        page_fault(&mut call, address, error);
    } else if is_interrupt(vector) {
        interrupt(vector, &mut scheduler());
    } else {
        exception(&mut call, vector, error);
    }
    run(call)
}

const fn is_interrupt(vector: u64) -> bool {
    matches!(vector as u8, TIMER_VECTOR | KICK_VECTOR | DOORBELL_VECTOR)
}

/// Deals with an interrupt; one that only brings the CPU into the kernel has then done so.
fn interrupt(vector: u64, scheduler: &mut Scheduler) {
    apic::end_of_interrupt();
    match vector as u8 {
        TIMER_VECTOR => scheduler.timer_fired(),
        DOORBELL_VECTOR => scheduler.rung(),
        _ => {}
    }
}

/// Vector of page faults.
const PAGE_FAULT: u64 = 14;
/// Page-fault error code bits (SDM vol. 3, 4.7).
const FAULT_WRITE: u64 = 2;
const FAULT_FETCH: u64 = 16;

fn page_fault(call: &mut Call, address: u64, error: u64) {
    // Not every host tells a fetch by its error code; no data access is at its own instruction.
    let access = if error & FAULT_FETCH != 0 || address == call.frame().rip {
        Prot::EXECUTE
    } else if error & FAULT_WRITE != 0 {
        Prot::WRITE
    } else {
        Prot::READ
    };
    let id = call.id;
    let kernel = call.kernel();
    if kernel.fault_in(id, address, access).is_err() {
        kernel.take_fault(id);
    }
}

fn exception(call: &mut Call, vector: u64, error: u64) {
    count!(exceptions);
    match Exception::from_number(vector) {
        Some(code) if vector < 32 => call.raise(code, error),
        _ => call.raise(Exception::Other, vector),
    }
}

/// Where a thread without anything on its stack begins, on a CPU that has chosen it.
pub extern "C" fn start_thread() -> ! {
    lock::start();
    run(Call::current())
}

/// Runs the current thread: makes the calls that its registers name until it can go on in user
/// mode, or must make way.
#[inline(always)]
fn run(mut call: Call) -> ! {
    loop {
        if !call.in_call() {
            leave(&mut call);
        } else if call.goes_on() {
            make_call(&mut call);
            continue;
        }
        park(&mut call);
    }
}

/// The current thread sleeps, is stopped, or makes way for another. Returns when it runs again, if the
/// execution model has kept its stack; or at once, if what others wanted of it is dealt with here.
#[inline(never)]
pub fn park(call: &mut Call) {
    let entity = call.entity;
    let mut held = scheduler();
    // Looked at under the lock under which it goes off: who asks later finds it off.
    while held.take_attention(entity) {
        drop(held);
        let id = call.id;
        call.kernel().attend(id);
        if call.goes_on() {
            return;
        }
        held = scheduler();
    }
    let run = call.run();
    if !mutant!(kernel_mutex_kept) {
        lock::release_kernel_in(&mut held, entity);
    }
    if run == Run::Scheduled {
        return model::switch(held.make_way(entity));
    }
    let stack = held.block(entity);
    if run == Run::Stopped {
        // SAFETY: whoever lets the thread run again lets it begin from its registers.
        unsafe { on_cpu_stack(schedule) }
    }
    model::switch(stack);
}

/// The current thread sleeps, and another that has slept goes on in user mode: at once, if it is its turn on
/// this CPU; what either was doing in the kernel is then forgotten. Else it is queued. As
/// [`Call::wait`](Call::wait), it returns only if the execution model has kept the stack.
#[inline(always)]
pub fn hand_over(call: &mut Call, (to, priority): (Id<Entity>, u8)) -> Result<(), Stop> {
    let from = call.entity;
    let mut held = scheduler();
    // Who waits for the kernel's state may have to run before.
    if !lock::is_wanted() && held.hand_over(from, to, priority) {
        lock::release_kernel_in(&mut held, from);
        Call::current().leaves();
        // SAFETY: the frame is that of the thread that has been handed the CPU, and `in_user` is set.
        unsafe { lock::leave() }
    }
    held.make_ready(to, priority);
    drop(held);
    model::make_way(call)
}

#[inline(always)]
fn make_call(call: &mut Call) {
    count!(calls);
    match dispatch(call) {
        Ok(()) => {}
        Err(Stop::Restart) => count!(restarts),
        Err(Stop::Fault) => {
            let id = call.id;
            call.kernel().take_fault(id);
        }
        Err(Stop::Insanity(insanity)) => insane(call, insanity),
    }
}

fn insane(call: &mut Call, insanity: Insanity) {
    count!(exceptions);
    call.raise(Exception::Insanity, insanity as u64);
}

/// Leaves to user mode, unless it may not go on.
#[inline(always)]
fn leave(call: &mut Call) {
    lock::release_kernel(call.entity);
    if call.run() != Run::Scheduled {
        return;
    }
    let mut held = scheduler();
    if !held.prepare_user(call.entity) {
        return;
    }
    call.leaves();
    // SAFETY: the frame is that of the current thread, and `prepare_user` has set `in_user`.
    unsafe { lock::leave() }
}

/// On the CPU's own stack, the spin lock taken: gives the CPU to the next thread.
pub extern "C" fn schedule() -> ! {
    let scheduler = held_scheduler();
    scheduler.take_off();
    match scheduler.choose() {
        Some(stack) => model::resume(stack),
        None => idle(),
    }
}

/// Waits until there may be somebody to give the CPU to.
#[cold]
fn idle() -> ! {
    if held_scheduler().prepare_idle() {
        out32(EVENT, Event::Deadlock as u32);
    }
    lock::release();
    wait_for_interrupt();
    lock::take();
    held_scheduler().cpu().idle = false;
    // SAFETY: nothing on the stack is of further use.
    unsafe { on_cpu_stack(schedule) }
}

/// A trap from kernel mode: an interrupt, or a bug in the kernel. Interrupts are off. What it
/// interrupts is an idle CPU's `hlt`; or any kernel code of a thread, which can then be made to wait.
pub extern "C" fn trap_in_kernel(frame: &KernelFrame) {
    if !is_interrupt(frame.vector) {
        panic!(
            "trap {} in the kernel, error {:#x}, rip {:#x}, cr2 {:#x}",
            frame.vector,
            frame.error,
            frame.rip,
            fault_address()
        );
    }
    lock::take();
    let scheduler = held_scheduler();
    interrupt(frame.vector, scheduler);
    if scheduler.must_make_way()
        && let Some(id) = scheduler.current()
    {
        count!(preemptions);
        model::switch(scheduler.stack(id));
    }
    lock::release();
}

/// Where a fault inside a call or in user code goes.
impl Kernel {
    /// Sends the last fault that the mapping hierarchy did not resolve to whoever can.
    pub fn take_fault(&mut self, id: Id<Thread>) {
        count!(hard_faults);
        let fault = self.fault;
        probe::<{ Probe::HardFault as usize }>(|| (&self.threads[id], fault.address));
        // Without its keeper a region has just no memory there.
        match fault
            .keeper
            .filter(|&keeper| self.ports.get(keeper).is_some())
        {
            Some(keeper) => self.send_exception(id, Some(keeper), fault.raised()),
            None => self.raise(id, fault.raised()),
        }
    }
}

/// How a CPU comes up; see `fluke_abi::boot`.
pub mod start {
    use core::sync::atomic::{AtomicBool, Ordering};

    use fluke_abi::ABI_VERSION;
    use fluke_abi::boot::{BOOT_MAGIC, BootInfo, CPUS_MAX, Gate};
    use fluke_abi::stats::CpuStats;

    use super::{EVENT, Event, apic, held_scheduler, lock, out32, schedule, wait_for_interrupt};
    use crate::arch::cpu::Cpu;
    use crate::arch::entry;
    use crate::arch::memory::direct;
    use crate::kernel::Kernel;
    use crate::mutant;

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

    #[unsafe(link_section = ".bss.cpu")]
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
        entry::init(boot.page_table, boot.own_page_table);
        // SAFETY: the element is this CPU's alone.
        let cpu = unsafe { CPUS.0.get().cast::<Cpu>().add(number as usize) };
        let stats = boot.stats.start + u64::from(number) * size_of::<CpuStats>() as u64;
        let state = Kernel::cpu_states(boot).wrapping_add(number as usize);
        // SAFETY: once on this CPU, first thing; `stack` is its own.
        unsafe { Cpu::init(cpu, number, stack, IST_BYTES, direct(stats), state, gate) };
        apic::init();
        ONLINE[number as usize].store(true, Ordering::Release);
        if number == 0 {
            mutant::choose(boot.mutant);
            // Nobody else is awake yet.
            // SAFETY: the host's word, checked as far as it can be.
            let (kernel, scheduler) = unsafe { Kernel::new(boot) };
            lock::install(kernel, scheduler);
            lock::held_kernel().make_root(boot);
            out32(EVENT, Event::FirstUser as u32);
        } else {
            // Nobody sends an interrupt before there is a kernel.
            wait_for_interrupt();
        }
        lock::take();
        let state = held_scheduler().cpu();
        // SAFETY: the only reference from here on.
        state.hardware = Some(unsafe { &mut *cpu });
        state.idle = false;
        schedule()
    }
}
