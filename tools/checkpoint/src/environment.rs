//! A child with all that is below it, as its checkpointer sees it.

use alloc::vec::Vec;

use fluke_abi::code::Status;
use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::object::Type;
use fluke_abi::state::{ThreadFlags, ThreadState};
use libfluke::object::{Ref, Thread};
use libfluke::space::{Error, Export};
use libfluke::supervisor::{Job, Supervisor};
use libfluke::{startup, sys};
use zerocopy::{FromBytes, IntoBytes};

use crate::format::{External, Part, Place};
use crate::kinds::{Kind, kind_of};

/// Memory of the checkpointer's that the child can read and execute: its image, its files.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// First address, of a page.
    pub address: u64,
    /// Bytes; whole pages.
    pub size: u64,
    /// The memory that it lies in.
    pub export: &'static Export,
}

/// A child that can be written to a file.
pub struct Environment {
    /// Its supervisor.
    pub supervisor: Supervisor,
    /// What it can read and execute.
    pub sources: Vec<Source>,
    /// The last of its requests for a checkpoint that was fulfilled.
    pub requests: u64,
}

/// A run of the child's own memory.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// What it is to the child.
    pub place: Place,
    /// Its address in the checkpointer's space.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

impl Environment {
    /// Starts a program.
    pub fn start(job: &Job<'_>, sources: Vec<Source>) -> Result<Self, Error> {
        Ok(Self {
            supervisor: Supervisor::start(job)?,
            sources,
            requests: 0,
        })
    }

    /// All memory of the child that is no source.
    pub fn memory(&mut self) -> Vec<Memory> {
        let given =
            (0..)
                .zip(self.supervisor.child().memory())
                .map(|(number, &(address, size))| Memory {
                    place: Place {
                        part: Part::Given(number),
                        offset: 0,
                    },
                    address,
                    size,
                });
        let mut memory: Vec<_> = given.collect();
        memory.extend(self.supervisor.chunks().iter().map(|chunk| Memory {
            place: Place {
                part: Part::Heap,
                offset: chunk.start,
            },
            address: chunk.memory,
            size: chunk.size,
        }));
        memory
    }

    /// The checkpointer's link to something outside the child.
    pub fn external(&mut self, external: External) -> &'static Ref {
        match external {
            External::Space => self.supervisor.child().space(),
            External::Parent => self.supervisor.parent(),
            External::Console => &startup::startup().console,
        }
    }
}

/// An object at an address of the checkpointer's own.
#[derive(Clone, Copy, Debug)]
pub struct Object {
    /// The calls of its type.
    pub kind: &'static Kind,
    /// Its address.
    pub at: u64,
}

impl Object {
    /// The object of a type at an address; none if there is no such type.
    pub fn new(kind: Type, at: u64) -> Option<Self> {
        kind_of(kind).map(|kind| Self { kind, at })
    }

    /// Makes the object, with a hash if it has one.
    pub fn create(self, mut hash: u64) -> Result<(), Status> {
        let mut parameters = [self.at, 0, 0, 0, 0, 0, 0, 0];
        if self.kind.state != 0 {
            parameters[1] = &raw mut hash as u64;
        }
        // SAFETY: the memory is the child's, which has an object there; the hash is a local.
        sys::check(unsafe { sys::trap(self.kind.create as u64, parameters) })
    }

    /// Makes a reference link to the object; false if nothing can link to it.
    pub fn point(self, reference: &Ref) -> bool {
        let Some(entry) = self.kind.reference else {
            return false;
        };
        let parameters = [self.at, reference.handle() as u64, 0, 0, 0, 0, 0, 0];
        // SAFETY: both are objects' memory, which only the kernel uses.
        unsafe { sys::trap(entry as u64, parameters) };
        true
    }

    /// Takes the state, and the links into references, in order. A thread is stopped by it.
    pub fn get(self, state: &mut [u8], links: &[&Ref]) {
        let parameters = self.parameters(state.as_mut_ptr() as u64, links);
        // SAFETY: objects' memory, and a state of the size that the type has.
        unsafe { sys::trap(self.kind.get as u64, parameters) };
    }

    /// Gives it a state, and links from references.
    pub fn set(self, state: &[u8], links: &[&Ref]) {
        let mut parameters = self.parameters(state.as_ptr() as u64, links);
        if self.kind.kind == Type::Ref {
            // A copy goes from the first to the second.
            parameters.swap(0, 1);
        }
        // SAFETY: objects' memory, and a state that the kernel checks. What a thread then does it does to
        // the child.
        unsafe { sys::trap(self.kind.set as u64, parameters) };
    }

    fn parameters(self, state: u64, links: &[&Ref]) -> [u64; 8] {
        let mut parameters = [self.at, 0, 0, 0, 0, 0, 0, 0];
        if self.kind.state != 0 {
            parameters[1] = state;
        }
        for (slot, reference) in self.kind.links.iter().zip(links) {
            parameters[slot.parameter] = reference.handle() as u64;
        }
        parameters
    }

    /// The object as a thread, if it is one.
    pub fn as_thread(self) -> Option<&'static Thread> {
        // SAFETY: there is a thread at that address, for as long as the child is there.
        (self.kind.kind == Type::Thread).then(|| unsafe { Thread::at(self.at) })
    }
}

/// Makes the state of a thread that of one that is stopped, or is not.
pub fn set_stopped(state: &mut [u8], stopped: bool) {
    if let Ok(mut thread) = ThreadState::read_from_bytes(state) {
        let mut flags = ThreadFlags::from_bits_retain(thread.flags);
        flags.set(ThreadFlags::STOPPED, stopped);
        thread.flags = flags.bits();
        state.copy_from_slice(thread.as_bytes());
    }
}

/// The bytes of a page.
pub type Page = [u8; PAGE_SIZE as usize];

/// Pages of the checkpointer's own memory, or of the child's while nothing of it runs.
///
/// # Safety
/// The range is mapped, and nobody writes to it.
pub unsafe fn pages_at(address: u64, size: u64) -> &'static [Page] {
    // SAFETY: the caller's promise.
    unsafe { core::slice::from_raw_parts(address as *const Page, (size / PAGE_SIZE) as usize) }
}
