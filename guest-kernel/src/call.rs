//! What a handler works with: the calling thread, its parameters, its memory, and waiting.
//!
//! A handler is a restartable function. It reads its parameters from the thread's saved registers
//! and, before anything that may wait or fault, has written its progress back to them. `?` is the
//! unwinding: a [`Stop`] takes the handler to the boundary, which makes the thread wait, take an
//! exception, or make the call again from its registers.

use core::ptr::NonNull;

use fluke_abi::code::{Exception, Insanity};
use fluke_abi::object::{OBJECT_SIZE, Type};
use fluke_abi::probe::Probe;
use fluke_abi::state::Prot;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::arch::cpu::{Cpu, Frame, count};
use crate::arena::Id;
use crate::ipc::{Port, Pset};
use crate::kernel::Kernel;
use crate::lock::{self, scheduler};
use crate::mm::access::View;
use crate::mm::{Mapping, Region, Space};
use crate::model;
use crate::object::{Link, Object};
use crate::probe::probe;
use crate::reference::Ref;
use crate::sched::Entity;
#[cfg(test)]
use crate::sched::Scheduler;
use crate::sync::{Cond, Mutex};
use crate::thread::{Raised, Run, Thread, Wait};

/// Why a handler stopped short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Look at the thread's registers again: it was put to sleep, its call has become another one,
    /// or another thread completed it.
    Restart,
    /// An access to the caller's memory needs a keeper: [`Kernel::fault`].
    Fault,
    /// The program is wrong.
    Insanity(Insanity),
}

impl From<Insanity> for Stop {
    fn from(insanity: Insanity) -> Self {
        Self::Insanity(insanity)
    }
}

/// Result of a handler.
pub type Done = Result<(), Stop>;

/// The kernel, on behalf of the thread that runs on this CPU.
pub struct Call {
    /// The calling thread.
    pub id: Id<Thread>,
    /// The same for the scheduler.
    pub entity: Id<Entity>,
    /// The thread with that id: it stays while it runs.
    thread: NonNull<Thread>,
}

/// Registers of the parameters, by position.
macro_rules! argument_register {
    ($frame:expr, $n:expr) => {
        match $n {
            0 => &mut $frame.rdi,
            1 => &mut $frame.rsi,
            2 => &mut $frame.rdx,
            3 => &mut $frame.r10,
            4 => &mut $frame.r8,
            5 => &mut $frame.r9,
            6 => &mut $frame.r12,
            _ => &mut $frame.r13,
        }
    };
}

impl Call {
    /// For the thread that runs on this CPU.
    #[inline]
    pub fn current() -> Self {
        // SAFETY: a thread that runs is there.
        unsafe { Self::of(Cpu::current_frame().cast()) }
    }

    /// For a thread that runs on this CPU.
    #[cfg(test)]
    pub(crate) fn new(scheduler: &Scheduler, id: Id<Entity>) -> Self {
        // SAFETY: as above.
        unsafe { Self::of(scheduler.entities[id].place) }
    }

    /// # Safety
    /// The thread must be there, and stay.
    #[inline]
    unsafe fn of(thread: NonNull<Thread>) -> Self {
        // SAFETY: the caller's. Names of threads do not change.
        let own = unsafe { thread.as_ref() };
        Self {
            id: own.id(),
            entity: own.entity,
            thread,
        }
    }

    /// Kernel state, which becomes the caller's until it waits or is done. Nothing of it can be held
    /// across [`Call::wait`]: the borrow checker sees to it.
    #[inline]
    pub fn kernel(&mut self) -> &mut Kernel {
        lock::take_kernel(self.entity);
        lock::held_kernel()
    }

    /// The calling thread, as part of the kernel's state.
    #[inline]
    pub fn thread(&mut self) -> &mut Thread {
        lock::take_kernel(self.entity);
        self.own()
    }

    /// What of the calling thread is nobody else's while it runs.
    #[inline]
    fn own(&mut self) -> &mut Thread {
        // SAFETY: a running thread is not destroyed, its place in the arena is fixed, and `&mut self`
        // keeps this from being held beside a borrow from `kernel`.
        unsafe { self.thread.as_mut() }
    }

    /// Its user registers.
    #[inline]
    pub fn frame(&mut self) -> &mut Frame {
        &mut self.own().frame
    }

    /// Whether its registers name a call that is being made.
    #[inline]
    pub fn in_call(&mut self) -> bool {
        self.own().in_call
    }

    /// Its registers name a call, which begins.
    #[inline]
    pub fn begin(&mut self) {
        self.own().in_call = true;
        probe::<{ Probe::Enter as usize }>(|| (self.own(), 0));
    }

    /// It goes on in user mode.
    #[inline(always)]
    pub fn leaves(&mut self) {
        probe::<{ Probe::Exit as usize }>(|| (self.own(), 0));
    }

    /// Whether it may go on on this CPU.
    #[inline]
    pub fn goes_on(&mut self) -> bool {
        self.own().run == Run::Scheduled && scheduler().goes_on()
    }

    /// Why it makes way, if it does not go on.
    pub fn run(&mut self) -> Run {
        self.own().run
    }

    /// Parameter `n` (0 to 7), a register.
    #[inline]
    pub fn argument(&mut self, n: usize) -> u64 {
        *argument_register!(self.frame(), n)
    }

    /// Writes a parameter back: progress that a restarted call starts from.
    #[inline]
    pub fn set_argument(&mut self, n: usize, value: u64) {
        *argument_register!(self.thread().frame, n) = value;
    }

    /// The call is done, with a value for the user.
    #[inline]
    pub fn complete(&mut self, value: u64) -> Done {
        // Under the core lock, because nobody may see half of it.
        let held = scheduler();
        self.own().complete(value);
        drop(held);
        Ok(())
    }

    /// The thread is to make the rest of the call itself, from user mode: between the two, interrupts
    /// are taken and others get their turn.
    pub fn call_again(&mut self) {
        self.thread().in_call = false;
    }

    /// Sleeps. The only way to, but for the clock: it returns `Ok` when the thread is woken and the
    /// handler can go on, or unwinds, and the call starts again from the registers. The execution model
    /// decides.
    #[inline]
    pub fn wait(&mut self, wait: Wait) -> Result<(), Stop> {
        let id = self.id;
        self.kernel().sleep(id, wait);
        model::make_way(self)
    }

    /// Sleeps until a time, nanoseconds since boot, or before that. As [`Call::wait`]; but the clock is
    /// the scheduler's, and who wakes by it need not wait for the kernel's state.
    pub fn sleep_until(&mut self, deadline: u64) -> Result<(), Stop> {
        let id = self.id;
        // It has to ask for time when it wakes.
        let scheduled = self.own().scheduler.is_some();
        scheduler().sleep_until(self.entity, deadline, scheduled);
        probe::<{ Probe::Wait as usize }>(|| (self.own(), 0));
        if scheduled {
            self.kernel().rest(id);
        }
        model::make_way(self)
    }

    /// Sleeps until the host rings, or before that. As [`Call::sleep_until`]; unless the host has rung other
    /// than `heard` times: how often.
    pub fn listen(&mut self, heard: u64) -> Result<Option<u64>, Stop> {
        let id = self.id;
        let scheduled = self.own().scheduler.is_some();
        let rung = scheduler().listen(self.entity, heard, scheduled);
        if rung.is_some() {
            return Ok(rung);
        }
        probe::<{ Probe::Wait as usize }>(|| (self.own(), 0));
        if scheduled {
            self.kernel().rest(id);
        }
        model::make_way(self)?;
        Ok(None)
    }

    /// A place in the middle of a call where the thread can make way: lets other CPUs into the kernel,
    /// looks whether the timer has fired, and goes on, unless somebody else is to have the CPU. All
    /// progress must be in the registers, and everything else must be looked at again.
    ///
    /// Interrupts stay off. What they would say is known without them: the timer by the clock, another
    /// CPU's wish by `reschedule`; and a host that emulates CPL 0 may take a hundred instructions to
    /// deliver one.
    pub fn preemption_point(&mut self) -> Result<(), Stop> {
        probe::<{ Probe::PreemptionPoint as usize }>(|| (self.own(), 0));
        lock::offer(self.entity);
        scheduler().poll_timer();
        if self.goes_on() {
            return Ok(());
        }
        count!(preemptions);
        model::make_way(self)
    }

    /// Physical address of a byte of the caller's memory.
    #[inline]
    pub fn translate(&mut self, address: u64, access: Prot) -> Result<u64, Stop> {
        let view = self.view();
        self.kernel().translate_in(view, address, access)
    }

    /// Reads a structure.
    pub fn read<T: FromBytes + IntoBytes>(&mut self, address: u64) -> Result<T, Stop> {
        let mut value = T::new_zeroed();
        let id = self.id;
        self.kernel().copy_in(id, address, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Writes a structure, all of it or, on a fault, a part that will be written again.
    pub fn write<T: IntoBytes + Immutable>(&mut self, address: u64, value: &T) -> Result<(), Stop> {
        let id = self.id;
        self.kernel().copy_out(id, value.as_bytes(), address)
    }

    /// Makes sure that a structure at `address` can be written, so that writing it after the
    /// commit point cannot fail. Null is fine: nothing will be written.
    pub fn prepare_write<T>(&mut self, address: u64) -> Result<(), Stop> {
        if address == 0 {
            return Ok(());
        }
        let last = address.wrapping_add(size_of::<T>() as u64 - 1);
        self.translate(address, Prot::WRITE)?;
        self.translate(last, Prot::WRITE)?;
        Ok(())
    }

    /// The object of type `T` that parameter `n` names.
    #[inline]
    pub fn object<T: Typed>(&mut self, n: usize) -> Result<Id<T>, Stop> {
        let handle = self.argument(n);
        let view = self.view();
        self.kernel().object_in(view, handle)
    }

    /// The caller's memory.
    #[inline]
    fn view(&mut self) -> View {
        let (id, space) = (self.id, self.thread().space);
        self.kernel().view_in(id, space)
    }

    /// The thread that parameter `n` names, which must not be the caller.
    pub fn other_thread(&mut self, n: usize) -> Result<Id<Thread>, Stop> {
        let id = self.object::<Thread>(n)?;
        if id == self.id {
            Err(Insanity::CurrentThread.into())
        } else {
            Ok(id)
        }
    }

    /// Checks that parameter 0 of a \[self\] call is the caller's own address, or null.
    pub fn check_self(&mut self) -> Result<(), Stop> {
        let own = self.thread().thread_va;
        match self.argument(0) {
            0 => Ok(()),
            address if address == own => Ok(()),
            _ => Err(Insanity::NotCurrentThread.into()),
        }
    }

    /// The reference that parameter `n` names; `None` for a null pointer.
    pub fn reference(&mut self, n: usize) -> Result<Option<Id<Ref>>, Stop> {
        if self.argument(n) == 0 {
            return Ok(None);
        }
        self.object::<Ref>(n).map(Some)
    }

    /// The link in the reference that parameter `n` names, checked to be null or to a live object
    /// of the type that `pick` picks. `None` for a null pointer: leave unchanged.
    pub fn link<T>(
        &mut self,
        n: usize,
        wrong: Insanity,
        pick: fn(Link) -> Option<Id<T>>,
    ) -> Result<Option<Option<Id<T>>>, Stop> {
        let Some(reference) = self.reference(n)? else {
            return Ok(None);
        };
        match self.kernel().link(reference) {
            Link::Null => Ok(Some(None)),
            link => match pick(link) {
                Some(id) => Ok(Some(Some(id))),
                None => Err(wrong.into()),
            },
        }
    }

    /// Points a reference, if there is one, at something.
    pub fn set_link(&mut self, reference: Option<Id<Ref>>, link: Link) {
        if let Some(reference) = reference {
            self.kernel().refs[reference].link = link;
        }
    }

    /// Raises an exception in the caller.
    pub fn raise(&mut self, code: Exception, subcode: u64) {
        let id = self.id;
        self.kernel().raise(id, Raised::new(code, subcode));
    }
}

impl Kernel {
    /// The object of type `T` at an address of a thread's.
    #[inline]
    pub fn object<T: Typed>(&mut self, id: Id<Thread>, handle: u64) -> Result<Id<T>, Stop> {
        let view = self.view(id);
        self.object_in(view, handle)
    }

    /// The same, where a thread's memory is known.
    #[inline]
    pub fn object_in<T: Typed>(&mut self, view: View, handle: u64) -> Result<Id<T>, Stop> {
        if !handle.is_multiple_of(OBJECT_SIZE) {
            return Err(Insanity::NotAligned.into());
        }
        let physical = self.translate_in(view, handle, Prot::READ)?;
        match self.find_object(physical) {
            Some(id) => Ok(id),
            None => Err(self.not_there::<T>(physical)),
        }
    }

    #[cold]
    fn not_there<T: Typed>(&self, physical: u64) -> Stop {
        match self.type_at(physical) {
            Type::Null => Insanity::NoObject.into(),
            _ => T::NOT.into(),
        }
    }
}

/// A type of object that a handle parameter can ask for.
pub trait Typed: Object {
    /// The insanity of naming something else.
    const NOT: Insanity;
}

macro_rules! typed {
    ($($ty:ident $not:ident;)*) => {$(
        impl Typed for $ty {
            const NOT: Insanity = Insanity::$not;
        }
    )*};
}

typed! {
    Thread NotThread;
    Space NotTask;
    Region NotRegion;
    Mapping NotMapping;
    Port NotPort;
    Pset NotPset;
    Mutex NotMutex;
    Cond NotCond;
    Ref NotRef;
}
