//! All state of the kernel but the scheduler's, and how it is laid out at boot.
//!
//! There is one [`Kernel`], behind one lock (`lock.rs`): who has it, has all of it.

use core::ptr::NonNull;

use fluke_abi::boot::{BootInfo, Extent};
use fluke_abi::code::Status;
use fluke_abi::layout::{PAGE_SIZE, ROOT_OBJECTS};
use fluke_abi::object::OBJECT_SIZE;
use fluke_abi::state::{Census, Prot, ThreadFlags};

use crate::arch::memory::direct;
use crate::arena::{Arena, Id};
use crate::clock::Clock;
use crate::ipc::{Port, Pset};
use crate::lock::scheduler;
use crate::mm::{Fault, FramePool, Mapping, Region, Source, Space};
use crate::model;
use crate::object::{Object, ObjectTable};
use crate::pseudo;
use crate::reference::Ref;
use crate::sched::{CpuState, Entity, Scheduler, Table};
use crate::stacks::Stacks;
use crate::sync::{Cond, Mutex};
use crate::thread::Thread;

/// Everything.
pub struct Kernel {
    /// Threads.
    pub threads: Arena<Thread>,
    /// Spaces.
    pub spaces: Arena<Space>,
    /// Regions.
    pub regions: Arena<Region>,
    /// Mappings.
    pub mappings: Arena<Mapping>,
    /// Ports.
    pub ports: Arena<Port>,
    /// Port sets.
    pub psets: Arena<Pset>,
    /// Mutexes.
    pub mutexes: Arena<Mutex>,
    /// Condition variables.
    pub conds: Arena<Cond>,
    /// References.
    pub refs: Arena<Ref>,
    /// Which object is where in memory.
    pub objects: ObjectTable,
    /// Pages for page tables.
    pub frames: FramePool,
    /// Kernel stacks of threads.
    pub stacks: Stacks,
    /// Ports with requests for time whose servers are yet to be told: the first, which names the next
    /// in [`Port::announced`].
    pub announcements: Option<Id<Port>>,
    /// Somebody is telling them.
    pub announcing: bool,
    /// The last access that the hierarchy did not allow: what [`Stop::Fault`](crate::call::Stop) is about, for
    /// whoever gets that.
    pub fault: Fault,
    /// Time.
    pub clock: Clock,
    /// Whether long copies have preemption points: preemption level `partial`.
    pub preemption_points: bool,
    /// Page tables of destroyed spaces that some CPU still had loaded: the first; its first word names
    /// the next.
    pub husks: u64,
    /// Physical address of the gate page.
    pub gate_page: u64,
    /// Page table of no space.
    pub page_table: u64,
    /// The space that may end the machine.
    pub root: Option<Id<Space>>,
    /// The kernel's own space: that of the pseudo-kernel threads ([`crate::pseudo`]).
    pub own_space: Id<Space>,
    next_hash: u64,
}

/// How the pool is divided, in 1/64. What is left, about a third, is for page tables.
struct Shares;

impl Shares {
    const THREADS: u64 = 10;
    const SPACES: u64 = 2;
    const REGIONS: u64 = 2;
    const MAPPINGS: u64 = 16;
    const PORTS: u64 = 2;
    const PSETS: u64 = 1;
    const MUTEXES: u64 = 2;
    const CONDS: u64 = 2;
    const REFS: u64 = 4;
}

/// Hands out a run of zeroed memory from its start.
struct Carver {
    at: u64,
    end: u64,
}

impl Carver {
    fn take(&mut self, bytes: u64) -> u64 {
        let at = self.at;
        self.at += bytes.next_multiple_of(64);
        assert!(self.at <= self.end, "kernel pool too small");
        at
    }

    /// An arena with room for that many.
    fn arena_of<T>(&mut self, count: u64) -> Arena<T> {
        self.arena(count * Arena::<T>::STRIDE as u64)
    }

    fn arena<T>(&mut self, bytes: u64) -> Arena<T> {
        let at = self.take(bytes);
        // SAFETY: the pool is the kernel's and zero, and this part goes to nobody else.
        unsafe { Arena::new(NonNull::new_unchecked(direct(at)), bytes as usize) }
    }

    fn slice<T: Default>(&mut self, count: usize) -> &'static mut [T] {
        let at = direct::<T>(self.take((size_of::<T>() * count) as u64));
        for i in 0..count {
            // SAFETY: as in `arena`; the run is 64-aligned and large enough.
            unsafe { at.add(i).write(T::default()) };
        }
        // SAFETY: as above, and now initialised.
        unsafe { core::slice::from_raw_parts_mut(at, count) }
    }
}

impl Kernel {
    /// Where [`new`](Self::new) puts what the scheduler knows of each CPU: first of all, so that those which come
    /// up before there is a kernel find theirs.
    pub fn cpu_states(boot: &BootInfo) -> *mut CpuState {
        direct(boot.pool.start)
    }

    /// Lays the kernel's state out in the pool that the host provides. `cpus` are the CPUs' own
    /// structures, in order.
    ///
    /// # Safety
    /// The boot information must be true; the pool becomes the kernel's.
    pub unsafe fn new(boot: &BootInfo) -> (Self, Scheduler) {
        let Extent { start, size } = boot.pool;
        let mut pool = Carver {
            at: start,
            end: start + size,
        };
        let cpus = boot.cpus as usize;
        let state: &'static mut [CpuState] = pool.slice(cpus);
        let heads = pool.take(ObjectTable::bytes(boot.memory_size));
        let unit = (pool.end - pool.at) / 64;
        let clock = Clock::new(boot.tsc_khz, boot.apic_timer_khz, boot.clock);
        let threads =
            unit * Shares::THREADS / (Arena::<Thread>::STRIDE + Arena::<Entity>::STRIDE) as u64;
        let spaces =
            unit * Shares::SPACES / (Arena::<Space>::STRIDE + Arena::<Table>::STRIDE) as u64;
        let scheduler = Scheduler::new(
            pool.arena_of(threads),
            pool.arena_of(spaces),
            boot.page_table,
            state,
            clock,
        );
        let kernel = Self {
            threads: pool.arena_of(threads),
            spaces: pool.arena_of(spaces),
            regions: pool.arena(unit * Shares::REGIONS),
            mappings: pool.arena(unit * Shares::MAPPINGS),
            ports: pool.arena(unit * Shares::PORTS),
            psets: pool.arena(unit * Shares::PSETS),
            mutexes: pool.arena(unit * Shares::MUTEXES),
            conds: pool.arena(unit * Shares::CONDS),
            refs: pool.arena(unit * Shares::REFS),
            // SAFETY: `heads` was carved for this.
            objects: unsafe { ObjectTable::new(heads, boot.memory_size) },
            frames: FramePool::new(pool.at.next_multiple_of(PAGE_SIZE), pool.end),
            stacks: Stacks::new(boot.cpus, boot.stacks),
            announcements: None,
            announcing: false,
            fault: Fault::own(0, Prot::empty()),
            clock,
            preemption_points: boot.preemption_points != 0,
            husks: 0,
            gate_page: boot.gate_page,
            page_table: boot.page_table,
            root: None,
            own_space: Id::NONE,
            next_hash: 1,
        };
        (kernel, scheduler)
    }

    /// Makes the root space and its thread, ready to run, as the boot information says.
    pub fn make_root(&mut self, boot: &BootInfo) {
        let space = self.create_space(None).expect("pool for the root space");
        self.root = Some(space);
        let segments = boot.segments.iter().take(boot.segment_count as usize);
        for segment in segments {
            let mut mapping = Mapping::new(0);
            mapping.start = segment.va;
            mapping.size = segment.size;
            mapping.prot = Prot::from_bits_truncate(segment.prot);
            mapping.source = Source::Physical(segment.start);
            let id = self
                .mappings
                .insert(mapping)
                .ok()
                .expect("pool for the root mappings");
            self.aim_mapping(id, space);
            if segment.va == ROOT_OBJECTS {
                let thread = self.create_thread(None).expect("pool for the root thread");
                self.attach(thread, segment.start);
                self.attach(space, segment.start + OBJECT_SIZE);
                self.set_space(thread, Some(space));
                let root = &mut self.threads[thread];
                root.set_flags(ThreadFlags::STOPPED, false);
                root.thread_va = ROOT_OBJECTS;
                root.frame.rip = boot.root_entry;
                root.frame.rsp = boot.root_stack;
                self.make_ready(thread);
                pseudo::start(self, boot, segment.start);
            }
        }
    }

    /// A hash for an object whose creator gives none.
    pub fn fresh_hash(&mut self) -> u64 {
        self.next_hash += 1;
        self.next_hash
    }

    /// Puts a new object into its arena, with a hash of its own or the one given.
    pub fn create<T: Object>(
        &mut self,
        hash: Option<u64>,
        new: fn(u64) -> T,
    ) -> Result<Id<T>, Status> {
        let hash = match hash {
            Some(hash) if hash != 0 => hash,
            _ => self.fresh_hash(),
        };
        T::arena(self)
            .insert(new(hash))
            .map_err(|_| Status::NoMemory)
    }

    /// A stopped thread with all that the execution model needs.
    pub fn create_thread(&mut self, hash: Option<u64>) -> Result<Id<Thread>, Status> {
        let id = self.create(hash, Thread::new)?;
        let thread = &mut self.threads[id];
        let (place, priority) = (NonNull::from(&mut *thread), thread.priority);
        let entity = model::prepare(&mut self.stacks)
            .and_then(|stack| scheduler().create(place, stack, priority));
        match entity {
            Some(entity) => {
                thread.header().set_id(id);
                thread.entity = entity;
                Ok(id)
            }
            None => {
                self.threads.remove(id);
                Err(Status::NoMemory)
            }
        }
    }

    /// Puts a stopped thread into a space, or into none.
    pub fn set_space(&mut self, id: Id<Thread>, space: Option<Id<Space>>) {
        let table = space.map(|space| self.spaces[space].table);
        let thread = &mut self.threads[id];
        thread.space = space;
        scheduler().entities[thread.entity].table = table;
    }

    /// What the pool holds.
    pub fn census(&mut self) -> Census {
        let objects = [
            self.threads.live(),
            self.spaces.live(),
            self.regions.live(),
            self.mappings.live(),
            self.ports.live(),
            self.psets.live(),
            self.mutexes.live(),
            self.conds.live(),
            self.refs.live(),
        ];
        Census {
            objects: objects.map(u64::from),
            frames: self.frames.live() - self.reap_husks(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::arch::memory::tests::SIZE;
    use fluke_abi::object::Type;
    use zerocopy::FromZeros;

    /// A kernel in pretended physical memory: pool in the upper half, one CPU that is this thread.
    pub(crate) fn kernel() -> Kernel {
        let mut boot = BootInfo::new_zeroed();
        boot.cpus = 1;
        boot.memory_size = SIZE as u64;
        boot.tsc_khz = 1_000_000;
        boot.pool = Extent {
            start: SIZE as u64 / 2,
            size: SIZE as u64 / 2,
        };
        boot.stats = Extent {
            start: 0x2000,
            size: PAGE_SIZE,
        };
        boot.page_table = 0x3000;
        boot.gate_page = 0x4000;
        let pool: *mut u8 = direct(boot.pool.start);
        // SAFETY: the pool lies within the pretended memory, which is this thread's.
        let (kernel, scheduler) = unsafe {
            pool.write_bytes(0, boot.pool.size as usize);
            Kernel::new(&boot)
        };
        crate::lock::tests::install_scheduler(scheduler);
        kernel
    }

    #[test]
    fn objects_are_found_by_frame_and_offset() {
        let mut kernel = kernel();
        let at = 0x10_0040;
        let mutex = kernel.create(None, Mutex::new).unwrap();
        let cond = kernel.create(Some(7), Cond::new).unwrap();
        let port = kernel.create(None, Port::new).unwrap();
        kernel.attach(mutex, at);
        kernel.attach(cond, at + OBJECT_SIZE);
        kernel.attach(port, at + PAGE_SIZE);
        let kind = |kernel: &mut Kernel, at| kernel.type_at(at);
        assert_eq!(kind(&mut kernel, at), Type::Mutex);
        assert_eq!(kind(&mut kernel, at + OBJECT_SIZE), Type::Cond);
        assert_eq!(kind(&mut kernel, at + 2 * OBJECT_SIZE), Type::Null);
        assert_eq!(kind(&mut kernel, at + PAGE_SIZE), Type::Port);
        assert_eq!(
            kernel.next_object(at + 1),
            Some((at + OBJECT_SIZE, Type::Cond))
        );
        kernel.detach(mutex);
        assert_eq!(kind(&mut kernel, at), Type::Null);
        assert_eq!(kind(&mut kernel, at + OBJECT_SIZE), Type::Cond);
        assert_eq!(kernel.conds[cond].header().hash, 7);
    }

    #[test]
    fn a_full_pool_is_an_error_and_leaves_nothing_behind() {
        let mut kernel = kernel();
        let frames = kernel.frames.live();
        let mut spaces = Vec::new();
        while let Ok(space) = kernel.create_space(None) {
            spaces.push(space);
        }
        assert!(!spaces.is_empty());
        let count = spaces.len();
        for space in spaces {
            kernel.destroy_space(space);
        }
        assert_eq!((kernel.spaces.live(), kernel.frames.live()), (0, frames));
        assert_eq!(
            core::iter::from_fn(|| kernel.create_space(None).ok()).count(),
            count
        );
    }
}
