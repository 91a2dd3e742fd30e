//! Faults on each pointer parameter of every entry point that passes its parameters in registers: made
//! from the table of entry points, with right values for all parameters.

use alloc::vec::Vec;
use core::ops::Range;
use core::ptr::null_mut;

use fluke_abi::code::Status;
use fluke_abi::entry::{Convention, Entry, Row, TABLE};
use fluke_abi::error::pointee;
use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::object::Type;
use fluke_abi::state::{
    Census, CondState, MappingState, MutexState, ObjectSpec, PortState, Prot, PsetState,
    RegionState, SavedState, TaskState, ThreadFlags, ThreadState,
};
use libfluke::object::{self, Cond, Mutex, Port, Pset, Ref, Region, Task, Thread};
use libfluke::startup::startup;
use libfluke::{sys, thread};

use super::Checks;
use super::pages::{Fault, Pages};
use crate::handler;

/// Pages of each parameter.
const EACH: usize = 2;
/// Where an object lies in its page.
const WITHIN: u64 = 0x140;
/// Hash of the object of a parameter.
const HASH: u64 = 0x5_0000;
/// Objects that `region_search` finds, and may find.
const FOUND: u64 = 2;
const FOUND_MAX: u64 = 4;
/// The most words that a state has.
const STATE_WORDS: usize = size_of::<ThreadState>() / 8;
/// What is in memory before.
const NOTHING: u8 = 0xa5;

/// How a call uses a parameter.
#[derive(Clone, Copy)]
enum Use {
    /// As a number.
    Number(u64),
    /// An object.
    Object(Type),
    /// Memory for an object.
    Room(Type),
    /// So many bytes to read, and to write.
    Input(u64),
    Output(u64),
}

impl Use {
    const fn access(self) -> Prot {
        match self {
            Self::Room(_) | Self::Output(_) => Prot::WRITE,
            _ => Prot::READ,
        }
    }

    const fn bytes(self) -> u64 {
        match self {
            Self::Input(bytes) | Self::Output(bytes) => bytes,
            _ => 1,
        }
    }

    /// Where in its pages a parameter is: a structure, half in each of them.
    const fn place(self) -> u64 {
        match self {
            Self::Input(bytes) | Self::Output(bytes) => PAGE_SIZE - bytes.div_ceil(2),
            _ => WITHIN,
        }
    }

    /// In each of its pages, the bytes that a call uses.
    fn extent(self) -> [Range<u64>; EACH] {
        let (start, end) = (self.place(), self.place() + self.bytes());
        match self {
            Self::Number(_) => [0..0, 0..0],
            _ => [start..end.min(PAGE_SIZE), 0..end.saturating_sub(PAGE_SIZE)],
        }
    }
}

fn object_type(ty: &str) -> Option<Type> {
    let name = pointee(ty)?;
    Type::ALL.into_iter().find(|kind| kind.name() == name)
}

/// The operation of an entry point on its object.
fn operation(row: &Row) -> &'static str {
    row.name.split_once('_').map_or("", |(_, rest)| rest)
}

/// The entry point for an operation on objects of a type.
fn entry(kind: Type, name: &str) -> &'static Row {
    let rows = TABLE.iter().filter(|row| row.object == kind.name());
    rows.into_iter()
        .find(|row| operation(row) == name)
        .unwrap_or_else(|| panic!("no {name} for {}", kind.name()))
}

/// How `row` uses its parameter `n`. `None`: as nothing that this module knows to make.
fn usage(row: &Row, n: usize) -> Option<Use> {
    let (name, ty) = row.parameters[n];
    let fresh = name == "new_addr" || name.starts_with("new_") && operation(row) != "reference";
    if name == "cur_thread" {
        return Some(Use::Number(0));
    }
    if let Some(kind) = object_type(ty) {
        return Some(match fresh {
            true => Use::Room(kind),
            false => Use::Object(kind),
        });
    }
    let bytes = match pointee(ty) {
        None => {
            return Some(Use::Number(match name {
                "size" => PAGE_SIZE,
                "prot" | "max_prot" => 3,
                _ => 0,
            }));
        }
        Some("u64") => 8,
        Some("SavedState") => size_of::<SavedState>() as u64,
        Some("ThreadState") => size_of::<ThreadState>() as u64,
        Some("TaskState") => size_of::<TaskState>() as u64,
        Some("RegionState") => size_of::<RegionState>() as u64,
        Some("MappingState") => size_of::<MappingState>() as u64,
        Some("PortState") => size_of::<PortState>() as u64,
        Some("PsetState") => size_of::<PsetState>() as u64,
        Some("MutexState") => size_of::<MutexState>() as u64,
        Some("CondState") => size_of::<CondState>() as u64,
        Some("Census") => size_of::<Census>() as u64,
        Some("ObjectSpec") => FOUND * size_of::<ObjectSpec>() as u64,
        Some(_) => return None,
    };
    Some(match ty.contains("const") {
        true => Use::Input(bytes),
        false => Use::Output(bytes),
    })
}

/// Objects that references link to, and what it takes to look at others.
struct Bench {
    pages: &'static Pages,
    thread: &'static Ref,
    task: &'static Ref,
    region: &'static Ref,
    port: &'static Ref,
    pset: &'static Ref,
    /// References to be filled.
    links: [&'static Ref; 5],
    /// A page with [`FOUND`] objects.
    found: u64,
}

impl Bench {
    fn new(pages: &'static Pages) -> Result<Self, Status> {
        let found = libfluke::heap::pages(PAGE_SIZE).ok_or(Status::NoMemory)?;
        for n in 0..FOUND {
            // SAFETY: the page is ours.
            sys::check(unsafe { sys::mutex_create((found + n * 64) as *mut _) })?;
        }
        Ok(Self {
            pages,
            thread: Ref::to(Thread::alloc()?)?,
            task: Ref::to(Task::alloc()?)?,
            region: Ref::to(Region::alloc()?)?,
            port: Ref::to(Port::alloc()?)?,
            pset: Ref::to(Pset::alloc()?)?,
            links: [
                Ref::alloc()?,
                Ref::alloc()?,
                Ref::alloc()?,
                Ref::alloc()?,
                Ref::alloc()?,
            ],
            found,
        })
    }

    /// What a reference that is parameter `name` links to.
    fn target(&self, name: &str) -> Option<&'static Ref> {
        Some(match name {
            "task" => self.task,
            "region" => self.region,
            "pset" => self.pset,
            "keeper" | "scheduler" => self.port,
            "owner" | "inheritor" | "client" | "server" => self.thread,
            "reference" | "first" | "second" | "source" | "old_addr" => self.thread,
            _ => return None,
        })
    }

    /// A state to set, of the structure that a parameter points to.
    fn state(&self, ty: &str, at: u64) {
        /// # Safety
        /// There is room for a `T`.
        unsafe fn put<T>(at: u64, value: T) {
            // SAFETY: the caller's promise.
            unsafe { (at as *mut T).write_unaligned(value) }
        }
        // SAFETY: the parameter's own memory.
        unsafe {
            match pointee(ty) {
                Some("SavedState") => put(
                    at,
                    SavedState {
                        rax: 1,
                        rcx: 2,
                        rdx: 3,
                        rip: 0x4000,
                        rflags: 0x202,
                    },
                ),
                Some("ThreadState") => {
                    let mut state = ThreadState {
                        thread_va: 0x5000,
                        sched_val: 6,
                        flags: ThreadFlags::STOPPED.bits(),
                        priority: 7,
                        ..ThreadState::default()
                    };
                    (state.registers.rbx, state.handlers.trap) = (8, 9);
                    put(at, state);
                }
                Some("RegionState") => put(
                    at,
                    RegionState {
                        hash: 0,
                        start_va: 0x1000_0000,
                        size: 4 * PAGE_SIZE,
                        prot: 3,
                    },
                ),
                Some("MappingState") => put(
                    at,
                    MappingState {
                        hash: 0,
                        region_off: PAGE_SIZE,
                        start_va: 0x2000_0000,
                        size: 2 * PAGE_SIZE,
                        prot: 1,
                    },
                ),
                Some("PortState") => put(at, PortState { hash: 0, alias: 10 }),
                Some("MutexState") => put(
                    at,
                    MutexState {
                        hash: 0,
                        flags: 11,
                        locked: 1,
                    },
                ),
                Some("CondState") => put(at, CondState { hash: 0, flags: 12 }),
                _ => put(at, 0u64),
            }
        }
    }

    /// What there is to see of the object of a type at an address: its state and links. Nothing, if there
    /// is none.
    fn look(&self, kind: Type, at: u64) -> Vec<u64> {
        let hash = |reference: &Ref| {
            // SAFETY: an object.
            unsafe { sys::ref_hash(reference.handle()) }
        };
        let mut seen = Vec::new();
        if kind == Type::Ref {
            // SAFETY: whatever is there is no more than looked at.
            let found = unsafe { sys::ref_hash(at as *mut _) };
            seen.extend(handler::raised(found).is_none().then_some(found));
            return seen;
        }
        let row = entry(kind, "get_state");
        let mut state = [0u64; STATE_WORDS];
        let mut parameters = [at, state.as_mut_ptr() as u64, 0, 0, 0, 0, 0, 0];
        let links = &self.links[..row.parameters.len() - 2];
        for (parameter, link) in parameters[2..].iter_mut().zip(links) {
            *parameter = link.handle() as u64;
        }
        // SAFETY: a local and references of ours to be filled.
        let result = unsafe { sys::trap(row.number.into(), parameters) };
        if handler::raised(result).is_none() {
            seen.extend(state);
            seen.extend(links.iter().map(|link| hash(link)));
        }
        seen
    }

    /// Makes a call with all its parameters right, on pages that all have a fault, if there is one. Returns
    /// all there is to see afterwards, and whether each page was missed just once.
    fn run(&self, row: &Row, uses: &[Use], fault: Option<Fault>) -> (Vec<u64>, bool) {
        let alias = |n: usize| self.pages.alias(EACH * n) + uses[n].place();
        let mut parameters = [0; 8];
        for (n, &usage) in uses.iter().enumerate() {
            self.fill(row, n, usage, alias(n));
            parameters[n] = match usage {
                Use::Number(number) => number,
                usage => self.pages.address(EACH * n, fault.unwrap_or(Fault::Hard)) + usage.place(),
            };
        }
        let ringer = self.prepare(row, &alias);
        let used = || {
            uses.iter().enumerate().flat_map(|(n, &usage)| {
                (EACH * n..)
                    .zip(usage.extent())
                    .filter_map(move |(page, bytes)| {
                        (!bytes.is_empty()).then_some((page, bytes, usage))
                    })
            })
        };
        for (page, ..) in used() {
            match fault {
                Some(fault) => self.pages.spoil(page, fault),
                None => self.pages.touch(page),
            }
        }
        // SAFETY: all pointers are to pages made for this.
        let result = unsafe { sys::trap(row.number.into(), parameters) };
        let mut mended = true;
        for (page, bytes, usage) in used() {
            mended &=
                fault.is_none_or(|fault| self.pages.was_mended(page, fault, usage.access(), bytes));
        }
        let mut seen = alloc::vec![result];
        for (n, &usage) in uses.iter().enumerate() {
            self.gather(row, usage, alias(n), &mut seen);
        }
        if let Some(ringer) = ringer {
            ringer.join();
        }
        (seen, mended)
    }

    /// Puts what a parameter needs at an address.
    fn fill(&self, row: &Row, n: usize, usage: Use, at: u64) {
        let (name, ty) = row.parameters[n];
        match usage {
            Use::Number(_) | Use::Room(_) => {}
            Use::Object(Type::Ref) => {
                // SAFETY: memory made for it.
                unsafe {
                    sys::ref_create(at as *mut _);
                    if let Some(target) = self.target(name) {
                        sys::ref_copy(target.handle(), at as *mut _);
                    }
                }
            }
            Use::Object(kind) => {
                let mut hash = HASH + n as u64;
                let hash_at = &raw mut hash as u64;
                let number = entry(kind, "create_hash").number;
                // SAFETY: as above.
                unsafe { sys::trap(number.into(), [at, hash_at, 0, 0, 0, 0, 0, 0]) };
            }
            Use::Output(bytes) => {
                // SAFETY: as above.
                unsafe { (at as *mut u8).write_bytes(NOTHING, bytes as usize) };
                // What is read as well: a hash to give, an offset to begin at, room for objects.
                let before = match (operation(row), name) {
                    ("create_hash", "hash") => HASH,
                    ("search", "offset") => 0,
                    ("search", "found_size") => FOUND_MAX,
                    _ => return,
                };
                // SAFETY: as above.
                unsafe { (at as *mut u64).write_unaligned(before) };
            }
            Use::Input(_) => self.state(ty, at),
        }
    }

    /// Does what the call of an entry point needs besides its parameters.
    fn prepare(&self, row: &Row, alias: &dyn Fn(usize) -> u64) -> Option<thread::Handle> {
        // SAFETY: objects made for it.
        unsafe {
            match Entry::from_number(row.number)? {
                Entry::mutex_unlock => {
                    sys::mutex_lock(alias(0) as *mut _);
                }
                Entry::cond_wait => {
                    let (cond, mutex) = (alias(0), alias(1));
                    sys::mutex_lock(mutex as *mut _);
                    // It gets the mutex when the caller sleeps, and no sooner.
                    let ringer = thread::spawn(move || {
                        let (cond, mutex) = (cond as *const Cond, mutex as *const Mutex);
                        (*mutex).lock();
                        (*cond).signal();
                        (*mutex).unlock();
                    });
                    return ringer.ok();
                }
                Entry::region_search => {
                    let region = alias(0) as *const Region;
                    (*region).set(self.found, PAGE_SIZE, Prot::READ, &startup().space, None);
                }
                _ => {}
            }
        }
        None
    }

    /// Adds what there is to see of a parameter, and unmakes it.
    fn gather(&self, row: &Row, usage: Use, at: u64, seen: &mut Vec<u64>) {
        match usage {
            Use::Number(_) => {}
            Use::Object(kind) | Use::Room(kind) => {
                let mut state = self.look(kind, at);
                let exists = !state.is_empty();
                if exists && operation(row) == "create" {
                    // The hash is one that nothing else has had.
                    state[0] = 0;
                }
                seen.push(exists.into());
                seen.extend(state);
                if exists {
                    // SAFETY: the object is there, and nobody else's.
                    unsafe { object::destroy(kind, at) };
                }
            }
            Use::Input(bytes) | Use::Output(bytes) => {
                for word in 0..bytes / 8 {
                    // SAFETY: within the structure.
                    seen.push(unsafe { ((at + word * 8) as *const u64).read_unaligned() });
                }
            }
        }
        match Entry::from_number(row.number) {
            Some(Entry::thread_set_saved_state) => {
                let mut saved = SavedState::default();
                // SAFETY: a local to be written.
                unsafe { sys::thread_get_saved_state(null_mut(), &raw mut saved) };
                seen.extend([saved.rax, saved.rcx, saved.rdx, saved.rip, saved.rflags]);
            }
            Some(Entry::thread_set_client) => {
                // SAFETY: the call has no parameters.
                seen.push(unsafe { sys::ipc_server_disconnect() });
            }
            Some(Entry::thread_set_server) => {
                // SAFETY: the call has no parameters.
                seen.push(unsafe { sys::ipc_client_disconnect() });
            }
            _ => {}
        }
    }
}

/// Gives the caller something to read as the registers of its last exception.
fn forget_exceptions() {
    let saved = SavedState {
        rip: 0x1000,
        rflags: 0x202,
        ..SavedState::default()
    };
    // SAFETY: null is the caller; a local to be read. No exception is being handled.
    unsafe { sys::thread_set_saved_state(null_mut(), &raw const saved) };
}

pub fn test(pages: &'static Pages, checks: &mut Checks) -> Result<(), Status> {
    let bench = Bench::new(pages)?;
    let registers = |row: &&Row| row.built && row.convention == Convention::Registers;
    for row in TABLE.iter().filter(registers) {
        let uses: Option<Vec<Use>> = (0..row.parameters.len()).map(|n| usage(row, n)).collect();
        let Some(uses) = uses else { continue };
        if uses.iter().all(|usage| matches!(usage, Use::Number(_))) {
            continue;
        }
        forget_exceptions();
        let (undisturbed, _) = bench.run(row, &uses, None);
        for fault in Fault::ALL {
            forget_exceptions();
            let (mut seen, mended) = bench.run(row, &uses, Some(fault));
            checks.that(mended, format_args!("{}: {fault:?} faults", row.name));
            if fault == Fault::Orphan && row.number == Entry::thread_get_saved_state as u16 {
                // What it reads is the exception.
                seen[1..].copy_from_slice(&undisturbed[1..]);
            }
            let differs = (0..seen.len()).find(|&n| undisturbed.get(n) != Some(&seen[n]));
            checks.that(
                differs.is_none() && seen.len() == undisturbed.len(),
                format_args!("{} after {fault:?} faults, word {differs:?}", row.name),
            );
        }
    }
    Ok(())
}
