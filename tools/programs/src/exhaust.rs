//! Creates objects until the kernel has no room for more, frees them, and does it again: running
//! out is an error, and nothing leaks. With the argument `objects` once, by every entry point that
//! creates; with `memory` it exhausts user memory instead.

use alloc::alloc::{Layout, alloc_zeroed, dealloc};
use alloc::vec::Vec;

use fluke_abi::code::Status;
use fluke_abi::entry::{Row, TABLE};
use fluke_abi::object::Type;
use libfluke::object::{Task, Thread};
use libfluke::{heap, println, startup, sys};

/// Objects lie this far apart: the kernel looks an object up among those of the same page.
const STRIDE: usize = 256;

trait Kind {
    const NAME: &'static str;
    fn make(&self) -> Result<(), Status>;
    fn unmake(&self);
}

macro_rules! kinds {
    ($($name:ident)*) => {$(
        impl Kind for $name {
            const NAME: &'static str = stringify!($name);

            fn make(&self) -> Result<(), Status> {
                self.create()
            }

            fn unmake(&self) {
                self.destroy();
            }
        }
    )*};
}

kinds!(Thread Task);

/// Makes objects until that fails, then unmakes them; returns how many.
fn fill<T: Kind + 'static>() -> (usize, Status) {
    let layout = Layout::from_size_align(STRIDE, STRIDE).expect("a power of two");
    let mut objects: Vec<&'static T> = Vec::new();
    let status = loop {
        // SAFETY: the layout has a size; zeroed memory is what an object's memory starts as.
        let object = unsafe { &*alloc_zeroed(layout).cast::<T>() };
        match object.make() {
            Ok(()) => objects.push(object),
            Err(status) => {
                // SAFETY: no object was made there.
                unsafe { dealloc(core::ptr::from_ref(object).cast_mut().cast(), layout) };
                break status;
            }
        }
    };
    let count = objects.len();
    for object in objects {
        object.unmake();
        // SAFETY: the object is gone; the memory came from the allocator.
        unsafe { dealloc(core::ptr::from_ref(object).cast_mut().cast(), layout) };
    }
    (count, status)
}

fn twice<T: Kind + 'static>() -> bool {
    let (first, status) = fill::<T>();
    let (second, _) = fill::<T>();
    let fine = first == second && first > 0 && status == Status::NoMemory;
    println!(
        "exhaust: {} {}s until {}, then {second}: {}",
        first,
        T::NAME,
        status.name(),
        if fine { "ok" } else { "FAILED" }
    );
    fine
}

/// Makes objects of each type until that fails, then unmakes them; whether every entry point that makes one
/// failed for want of memory.
fn each_type() -> bool {
    const SLAB: u64 = 2 << 20;
    // All of it there before: the parent may need objects to provide memory.
    let Some(slab) = heap::pages(SLAB) else {
        return false;
    };
    // SAFETY: the memory was just allocated.
    unsafe { (slab as *mut u8).write_bytes(0, SLAB as usize) };
    let call = |row: &Row, at: u64| {
        // SAFETY: the memory is the object's; there is no hash.
        unsafe { sys::trap(row.number.into(), [at, 0, 0, 0, 0, 0, 0, 0]) }
    };
    let mut fine = true;
    for kind in Type::ALL {
        let rows = |what: &'static str| {
            TABLE.iter().filter(move |row| {
                row.object == kind.name() && row.name.split('_').any(|word| word == what)
            })
        };
        let places = (slab..slab + SLAB).step_by(STRIDE);
        let made = rows("create").next().map_or(0, |create| {
            let created = |&at: &u64| call(create, at) == Status::Success as u64;
            places.clone().take_while(created).count()
        });
        let full = slab + (made * STRIDE) as u64;
        let refused = rows("create")
            .filter(|_| full < slab + SLAB)
            .filter(|row| call(row, full) == Status::NoMemory as u64)
            .count();
        for at in places.take(made) {
            rows("destroy").for_each(|row| {
                call(row, at);
            });
        }
        let expected = rows("create").count();
        fine &= made > 0 && refused == expected;
        println!(
            "exhaust: {made} {}s, then {refused} of {expected} entry points have no memory",
            kind.name()
        );
    }
    fine
}

/// Uses ever more of the heap, a word in each MiB. The root program ends this.
fn use_memory() -> u64 {
    const PIECE: u64 = 1 << 20;
    let mut used = 0;
    while let Some(memory) = heap::pages(PIECE) {
        // SAFETY: the memory was just allocated.
        unsafe { (memory as *mut u64).write_volatile(1) };
        used += PIECE;
    }
    println!(
        "exhaust: {} MiB of heap used, and nobody minded",
        used >> 20
    );
    crate::FAILED
}

/// The program.
pub fn main() -> u64 {
    let fine = match startup::args().nth(1) {
        Some("memory") => return use_memory(),
        Some("objects") => each_type(),
        _ => ![twice::<Thread>(), twice::<Task>()].contains(&false),
    };
    if fine { 0 } else { crate::FAILED }
}
