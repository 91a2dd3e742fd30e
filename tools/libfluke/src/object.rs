//! The nine kinds of kernel object.
//!
//! Each type here is the memory that names an object. An object does not move with its memory's
//! value, so active objects live in statics or in leaked allocations ([`Mutex::alloc`] and so on);
//! nothing is destroyed by going out of scope. A call on memory that holds no active object is the
//! insanity `NoObject`, an exception of the calling thread.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::alloc::Layout;
use core::ptr::{NonNull, from_ref, null, null_mut};

use fluke_abi::code::{Status, Wakeup};
use fluke_abi::object::{self, Type};
use fluke_abi::state::{
    MappingState, MutexState, ObjectSpec, PortState, Prot, RegionState, TaskState, ThreadFlags,
    ThreadState,
};

use crate::sys;

macro_rules! objects {
    ($($(#[$doc:meta])* $name:ident $create:ident $destroy:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Default)]
        #[repr(transparent)]
        pub struct $name(object::$name);

        impl $name {
            /// Memory for an object, which [`create`](Self::create) makes.
            pub const fn new() -> Self {
                Self(object::$name::new())
            }

            /// The address that names the object in this space.
            pub const fn handle(&self) -> *mut object::$name {
                self.0.handle()
            }

            /// Makes the object.
            pub fn create(&self) -> Result<(), Status> {
                // SAFETY: the memory is reserved for the object and used for nothing else.
                sys::check(unsafe { sys::$create(self.handle()) })
            }

            /// Makes an object in memory of its own, for good.
            pub fn alloc() -> Result<&'static Self, Status> {
                // Not a `Box`, because a program that runs out of memory here can go on.
                let memory = NonNull::new(
                    // SAFETY: an object has a size.
                    unsafe { alloc::alloc::alloc(Layout::new::<Self>()) }.cast::<Self>(),
                );
                let Some(memory) = memory else { return Err(Status::NoMemory) };
                // SAFETY: the memory is the object's from here on.
                let object = unsafe {
                    memory.write(Self::new());
                    memory.as_ref()
                };
                object.create()?;
                Ok(object)
            }

            /// Unmakes the object; its memory may be used for another.
            pub fn destroy(&self) {
                // SAFETY: as in `create`.
                unsafe { sys::$destroy(self.handle()) };
            }
        }
    )*};
}

objects! {
    /// A flow of control, attached to a space.
    Thread thread_create thread_destroy;
    /// An address space.
    Task task_create task_destroy;
    /// A range of a space's memory that may be mapped elsewhere.
    Region region_create region_destroy;
    /// A range of memory imported into a space from a region.
    Mapping mapping_create mapping_destroy;
    /// The server side end point of IPC.
    Port port_create port_destroy;
    /// A group of ports that server threads wait on.
    Pset pset_create pset_destroy;
    /// A lock.
    Mutex mutex_create mutex_destroy;
    /// A condition variable.
    Cond cond_create cond_destroy;
    /// A link to another object, or null.
    Ref ref_create ref_destroy;
}

/// Unmakes the object of that type at an address.
///
/// # Safety
/// There is an object of that type, and nobody uses it any more.
pub unsafe fn destroy(kind: Type, at: u64) {
    // SAFETY: the types are names for the address; the rest is the caller's promise.
    unsafe {
        match kind {
            Type::Null => {}
            Type::Thread => (*(at as *const Thread)).stop_and_destroy(),
            Type::Task => (*(at as *const Task)).destroy(),
            Type::Region => (*(at as *const Region)).destroy(),
            Type::Mapping => (*(at as *const Mapping)).destroy(),
            Type::Port => (*(at as *const Port)).destroy(),
            Type::Pset => (*(at as *const Pset)).destroy(),
            Type::Mutex => {
                // A locked one cannot be unmade.
                let free = MutexState::default();
                sys::mutex_set_state(at as *mut _, &raw const free, null_mut());
                (*(at as *const Mutex)).destroy();
            }
            Type::Cond => (*(at as *const Cond)).destroy(),
            Type::Ref => (*(at as *const Ref)).destroy(),
        }
    }
}

/// An object that a reference can link to.
pub trait Target {
    /// Makes `reference` link to the object.
    fn point(&self, reference: &Ref);
}

macro_rules! targets {
    ($($name:ident $reference:ident)*) => {$(
        impl Target for $name {
            fn point(&self, reference: &Ref) {
                // SAFETY: both are objects' memory, which only the kernel uses.
                unsafe { sys::$reference(self.handle(), reference.handle()) };
            }
        }
    )*};
}

targets! {
    Thread thread_reference
    Task task_reference
    Region region_reference
    Mapping mapping_reference
    Port port_reference
    Pset pset_reference
    Mutex mutex_reference
    Cond cond_reference
}

fn handle_of(reference: Option<&Ref>) -> *mut object::Ref {
    reference.map_or(null_mut(), Ref::handle)
}

impl Ref {
    /// Makes a reference to `target`, for good.
    pub fn to(target: &impl Target) -> Result<&'static Self, Status> {
        let reference = Self::alloc()?;
        target.point(reference);
        Ok(reference)
    }

    /// Whether the reference links to a live object.
    pub fn is_live(&self) -> bool {
        // SAFETY: objects' memory.
        unsafe { sys::ref_check(self.handle()) == 1 }
    }

    /// Whether both link to the same object, or both to none.
    pub fn same(&self, other: &Self) -> bool {
        // SAFETY: objects' memory.
        unsafe { sys::ref_compare(self.handle(), other.handle()) == 1 }
    }

    /// Type of the object that the reference links to.
    pub fn kind(&self) -> Type {
        // SAFETY: objects' memory.
        Type::from_number(unsafe { sys::ref_type(self.handle()) }).unwrap_or(Type::Null)
    }

    /// Hash of the object that the reference links to; 0 if it links to none.
    pub fn hash(&self) -> u64 {
        // SAFETY: objects' memory.
        unsafe { sys::ref_hash(self.handle()) }
    }

    /// Makes this reference link to what `source` links to.
    pub fn copy_from(&self, source: &Self) {
        // SAFETY: objects' memory.
        unsafe { sys::ref_copy(source.handle(), self.handle()) };
    }
}

impl Mutex {
    /// Sleeps until the calling thread owns the mutex.
    pub fn lock(&self) {
        // SAFETY: objects' memory.
        unsafe { sys::mutex_lock(self.handle()) };
    }

    /// Takes the mutex if it is free, and says whether.
    pub fn try_lock(&self) -> bool {
        // SAFETY: objects' memory.
        sys::status(unsafe { sys::mutex_trylock(self.handle()) }) == Status::Success
    }

    /// Releases the mutex.
    pub fn unlock(&self) {
        // SAFETY: objects' memory.
        unsafe { sys::mutex_unlock(self.handle()) };
    }

    /// Runs `f` while holding the mutex.
    pub fn with<R>(&self, f: impl FnOnce() -> R) -> R {
        self.lock();
        let result = f();
        self.unlock();
        result
    }
}

impl Cond {
    /// Releases `mutex`, sleeps until woken (or without cause), locks `mutex` again.
    pub fn wait(&self, mutex: &Mutex) {
        // SAFETY: objects' memory.
        unsafe { sys::cond_wait(self.handle(), mutex.handle()) };
    }

    /// Wakes one waiter.
    pub fn signal(&self) {
        // SAFETY: objects' memory.
        unsafe { sys::cond_signal(self.handle()) };
    }

    /// Wakes all waiters.
    pub fn broadcast(&self) {
        // SAFETY: objects' memory.
        unsafe { sys::cond_broadcast(self.handle()) };
    }
}

impl Port {
    /// Puts the port into a port set; its messages carry `alias`.
    pub fn set(&self, alias: u64, pset: &Ref) {
        let state = PortState { hash: 0, alias };
        // SAFETY: objects' memory, and a state to be read.
        unsafe { sys::port_set_state(self.handle(), &raw const state, pset.handle()) };
    }

    /// Makes a port in a port set.
    pub fn in_set(pset: &Pset, alias: u64) -> Result<&'static Self, Status> {
        let port = Self::alloc()?;
        let reference = Ref::new();
        reference.create()?;
        pset.point(&reference);
        port.set(alias, &reference);
        reference.destroy();
        Ok(port)
    }
}

impl Task {
    /// Sends the exceptions of the space's threads to the port behind `keeper`.
    pub fn set_keeper(&self, keeper: &Ref) {
        let state = TaskState::default();
        // SAFETY: objects' memory, and a state to be read.
        unsafe { sys::task_set_state(self.handle(), &raw const state, keeper.handle()) };
    }
}

impl Region {
    /// The objects in `size` bytes at `offset` of the region: type and address, both the region's
    /// owner's.
    pub fn objects(&self, offset: u64, size: u64) -> Vec<(Type, u64)> {
        const ROOM: usize = 64;
        let mut objects = Vec::new();
        let (mut at, end) = (offset, offset + size);
        while at < end {
            let mut found = [ObjectSpec::default(); ROOM];
            let mut room = ROOM as u64;
            // SAFETY: all pointers are to locals.
            unsafe {
                sys::region_search(
                    self.handle(),
                    &raw mut at,
                    end - at,
                    found.as_mut_ptr(),
                    &raw mut room,
                );
            }
            let found = found.iter().take(ROOM - room as usize);
            objects.extend(found.filter_map(|spec| {
                let kind = Type::from_number(spec.kind)?;
                Some((kind, spec.object))
            }));
        }
        objects
    }

    /// Ties the region to `size` bytes at `start` of the space behind `space`.
    pub fn set(&self, start: u64, size: u64, prot: Prot, space: &Ref, keeper: Option<&Ref>) {
        let state = RegionState {
            hash: 0,
            start_va: start,
            size,
            prot: prot.bits(),
        };
        // SAFETY: objects' memory, and a state to be read.
        unsafe {
            sys::region_set_state(
                self.handle(),
                &raw const state,
                space.handle(),
                handle_of(keeper),
            );
        }
    }
}

impl Mapping {
    /// Maps `size` bytes from `offset` of the region behind `region` at `start` of the space
    /// behind `space`.
    pub fn set(&self, region: &Ref, offset: u64, size: u64, prot: Prot, space: &Ref, start: u64) {
        let state = MappingState {
            hash: 0,
            region_off: offset,
            start_va: start,
            size,
            prot: prot.bits(),
        };
        // SAFETY: objects' memory, and a state to be read. The range was unmapped before, so no
        // memory that anybody uses changes.
        unsafe {
            sys::mapping_set_state(
                self.handle(),
                &raw const state,
                region.handle(),
                space.handle(),
            );
        }
    }
}

/// The links that come with a thread's state.
#[derive(Debug, Default)]
pub struct ThreadLinks {
    /// Its space.
    pub task: Ref,
    /// Its scheduler's port.
    pub scheduler: Ref,
    /// What it waits for.
    pub waiting_for: Ref,
    /// The client of the connection in which it is server.
    pub client: Ref,
    /// The server of the connection in which it is client.
    pub server: Ref,
}

impl ThreadLinks {
    /// Null references to be filled, for good.
    pub fn alloc() -> Result<&'static Self, Status> {
        let links: &'static Self = Box::leak(Box::default());
        for reference in [
            &links.task,
            &links.scheduler,
            &links.waiting_for,
            &links.client,
            &links.server,
        ] {
            reference.create()?;
        }
        Ok(links)
    }
}

impl Thread {
    /// The memory of a thread object at an address that somebody else chose.
    ///
    /// # Safety
    /// The address is aligned, and holds a thread object for as long as the program runs.
    pub unsafe fn at(address: u64) -> &'static Self {
        // SAFETY: the caller's promise; the type is only a name for the address.
        unsafe { &*(address as *const Self) }
    }

    /// Stops the thread and returns its state. It stays stopped.
    pub fn state(&self, links: Option<&ThreadLinks>) -> ThreadState {
        let mut state = ThreadState::default();
        let link =
            |choose: fn(&ThreadLinks) -> &Ref| links.map_or(null_mut(), |l| choose(l).handle());
        // SAFETY: objects' memory, and a state to be written.
        unsafe {
            sys::thread_get_state(
                self.handle(),
                &raw mut state,
                link(|l| &l.task),
                link(|l| &l.scheduler),
                link(|l| &l.waiting_for),
                link(|l| &l.client),
                link(|l| &l.server),
            );
        }
        state
    }

    /// Sets the state of a stopped thread; it runs if `STOPPED` is clear.
    ///
    /// # Safety
    /// The thread will do whatever the registers in `state` say.
    pub unsafe fn set_state(
        &self,
        state: Option<&ThreadState>,
        task: Option<&Ref>,
        client: Option<&Ref>,
        server: Option<&Ref>,
    ) {
        // SAFETY: objects' memory, and a state to be read; the rest is the caller's promise.
        unsafe {
            sys::thread_set_state(
                self.handle(),
                state.map_or(null(), from_ref),
                handle_of(task),
                null_mut(),
                null_mut(),
                handle_of(client),
                handle_of(server),
            );
        }
    }

    /// Lets the thread run from where it is, or was stopped.
    pub fn go_on(&self) {
        let mut state = self.state(None);
        state.flags &= !ThreadFlags::STOPPED.bits();
        // SAFETY: the state is the thread's own.
        unsafe { self.set_state(Some(&state), None, None, None) };
    }

    /// Stops the thread, and lets it go on scheduled by whoever serves the port behind `scheduler`,
    /// where it is known as `value`.
    pub fn set_scheduler(&self, scheduler: &Ref, value: u64) {
        let mut state = self.state(None);
        state.sched_val = value;
        state.flags &= !ThreadFlags::STOPPED.bits();
        // SAFETY: objects' memory, and a state to be read: the thread's own.
        unsafe {
            sys::thread_set_state(
                self.handle(),
                &raw const state,
                null_mut(),
                scheduler.handle(),
                null_mut(),
                null_mut(),
                null_mut(),
            );
        }
    }

    /// Donates the calling thread's time to this one. Returns `Success` when a message waits on
    /// `port`, or `TimeUnused` when this thread has no use for the time and `wakeup` says so.
    pub fn schedule(&self, port: &Port, wakeup: Wakeup) -> Status {
        // SAFETY: objects' memory.
        sys::status(unsafe { sys::thread_schedule(self.handle(), port.handle(), wakeup as u64) })
    }

    /// Starts a new thread in the space behind `space`.
    ///
    /// # Safety
    /// `rip`, `rsp` and `rdi` make sense in that space, where the thread object appears at
    /// `thread_va`.
    pub unsafe fn start(&self, space: &Ref, thread_va: u64, rip: u64, rsp: u64, rdi: u64) {
        let mut state = ThreadState {
            thread_va,
            flags: ThreadFlags::empty().bits(),
            priority: fluke_abi::state::PRIORITY_DEFAULT,
            ..ThreadState::default()
        };
        state.registers.rip = rip;
        state.registers.rsp = rsp;
        state.registers.rdi = rdi;
        state.registers.rflags = 0x202; // interrupts enabled, and the bit that is always set
        // SAFETY: the caller's promise.
        unsafe { self.set_state(Some(&state), Some(space), None, None) };
    }

    /// Stops and unmakes the thread.
    pub fn stop_and_destroy(&self) {
        let _ = self.state(None);
        self.destroy();
    }
}
