//! What random calls work on: memory for objects, and memory for everything else.
//!
//! Nothing else of the program is ever named, so whatever the kernel writes on behalf of a random
//! call lands here: the callers cannot hurt themselves.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::Status;
use fluke_abi::layout::{GATE, PAGE_SIZE, VM_MAX};
use fluke_abi::object::Type;
use libfluke::space::{Export, READ_WRITE};
use libfluke::{heap, sys};

use super::random::Random;

/// Addresses that are never right.
const BAD: [u64; 8] = [
    0,
    0x10,
    0x1000,
    GATE,
    VM_MAX,
    1 << 47,
    0xffff_ffff_8000_0000,
    u64::MAX - 31,
];
/// Objects of each type.
const SLOTS: u64 = 8;
/// Bytes from one object to the next: few in a page, where the kernel looks for them one by one.
const STRIDE: u64 = 256;
/// Pages of memory for objects.
const OBJECT_PAGES: u64 = (Type::ALL.len() as u64 * SLOTS * STRIDE).div_ceil(PAGE_SIZE);
/// Pages of memory for states, buffers and tables.
const SCRATCH_PAGES: u64 = 8;

/// The memory.
pub struct Arena {
    objects: u64,
    scratch: u64,
    /// The memory for objects, to be searched; and the scratch memory, to be mapped.
    regions: [&'static Export; 2],
}

/// Index of a type among all.
fn index(kind: Type) -> u64 {
    kind as u64 - 1
}

impl Arena {
    /// Memory without objects.
    pub fn new() -> Result<Self, Status> {
        let bytes = (OBJECT_PAGES + SCRATCH_PAGES) * PAGE_SIZE;
        let objects = heap::pages(bytes).ok_or(Status::NoMemory)?;
        let scratch = objects + OBJECT_PAGES * PAGE_SIZE;
        // SAFETY: the pages are ours. They must be there: nobody else handles faults.
        unsafe { core::slice::from_raw_parts_mut(objects as *mut u8, bytes as usize) }.fill(0);
        let regions = [
            Export::alloc(objects, OBJECT_PAGES * PAGE_SIZE, READ_WRITE, None)?,
            Export::alloc(scratch, SCRATCH_PAGES * PAGE_SIZE, READ_WRITE, None)?,
        ];
        Ok(Self {
            objects,
            scratch,
            regions,
        })
    }

    fn slot(&self, kind: Type, n: u64) -> u64 {
        self.objects + (index(kind) * SLOTS + n) * STRIDE
    }

    /// The address of an object of that type, most likely.
    pub fn handle(&self, kind: Type, random: &mut Random) -> u64 {
        match random.below(32) {
            0 => random.one_of(&BAD),
            1 => self.slot(kind, random.below(SLOTS)) + 8,
            2 | 3 => self.slot(random.one_of(&Type::ALL), random.below(SLOTS)),
            _ => self.slot(kind, random.below(SLOTS)),
        }
    }

    /// The address of some memory, filled with what might make sense there.
    pub fn memory(&self, random: &mut Random) -> u64 {
        if random.once_in(24) {
            return random.one_of(&BAD);
        }
        let words = SCRATCH_PAGES * PAGE_SIZE / 8;
        let at = random.below(words);
        for n in at..words.min(at + random.below(48)) {
            let value = self.number(random);
            // SAFETY: within the scratch memory. Others write there too: as atomic words, all of it
            // is just numbers.
            unsafe { AtomicU64::from_ptr((self.scratch + n * 8) as *mut u64) }
                .store(value, Relaxed);
        }
        self.scratch + at * 8 + if random.once_in(32) { 4 } else { 0 }
    }

    /// A number that might make sense somewhere.
    pub fn number(&self, random: &mut Random) -> u64 {
        match random.below(16) {
            0..6 => random.below(8),
            6..9 => random.below(SCRATCH_PAGES) * PAGE_SIZE,
            9 => random.below(SCRATCH_PAGES * PAGE_SIZE),
            10 => 0x10_0000 + random.below(64) * PAGE_SIZE,
            11 => self.scratch + random.below(SCRATCH_PAGES) * PAGE_SIZE,
            12 => self.slot(Type::Ref, random.below(SLOTS)),
            13 => random.one_of(&BAD),
            14 => self.slot(random.one_of(&Type::ALL), random.below(SLOTS)),
            _ => random.next(),
        }
    }

    /// Makes objects of every type, and references to some. Where there is an object already, that
    /// is an exception.
    pub fn populate(&self, random: &mut Random) {
        for kind in Type::ALL {
            let slot = self.slot(kind, random.below(SLOTS));
            let reference = self.slot(Type::Ref, random.below(SLOTS));
            // SAFETY: memory for objects only.
            unsafe {
                create(kind, slot);
                refer(kind, slot, reference);
            }
        }
        // A way to map something that is there.
        let reference = self.slot(Type::Ref, random.below(SLOTS));
        // SAFETY: as above.
        unsafe { sys::ref_copy(self.regions[1].reference().handle(), reference as *mut _) };
    }

    /// Unmakes all objects, wherever they were moved to. Returns how many there were.
    pub fn clear(&self) -> usize {
        let [objects, scratch] = self.regions;
        objects.destroy_objects(&[(self.objects, OBJECT_PAGES * PAGE_SIZE)])
            + scratch.destroy_objects(&[(self.scratch, SCRATCH_PAGES * PAGE_SIZE)])
    }
}

/// Makes an object of that type at an address.
///
/// # Safety
/// The address is memory for objects.
unsafe fn create(kind: Type, at: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        match kind {
            Type::Null => 0,
            Type::Thread => sys::thread_create(at as *mut _),
            Type::Task => sys::task_create(at as *mut _),
            Type::Region => sys::region_create(at as *mut _),
            Type::Mapping => sys::mapping_create(at as *mut _),
            Type::Port => sys::port_create(at as *mut _),
            Type::Pset => sys::pset_create(at as *mut _),
            Type::Mutex => sys::mutex_create(at as *mut _),
            Type::Cond => sys::cond_create(at as *mut _),
            Type::Ref => sys::ref_create(at as *mut _),
        };
    }
}

/// Makes a reference link to an object of that type.
///
/// # Safety
/// Both addresses are memory for objects.
unsafe fn refer(kind: Type, at: u64, reference: u64) {
    let reference = reference as *mut _;
    // SAFETY: the caller's promise.
    unsafe {
        match kind {
            Type::Null | Type::Ref => 0,
            Type::Thread => sys::thread_reference(at as *mut _, reference),
            Type::Task => sys::task_reference(at as *mut _, reference),
            Type::Region => sys::region_reference(at as *mut _, reference),
            Type::Mapping => sys::mapping_reference(at as *mut _, reference),
            Type::Port => sys::port_reference(at as *mut _, reference),
            Type::Pset => sys::pset_reference(at as *mut _, reference),
            Type::Mutex => sys::mutex_reference(at as *mut _, reference),
            Type::Cond => sys::cond_reference(at as *mut _, reference),
        };
    }
}
