//! Creates objects until the kernel has no room for more, frees them, and does it again: running
//! out is an error, and nothing leaks.

use alloc::alloc::{Layout, alloc_zeroed, dealloc};
use alloc::vec::Vec;

use fluke_abi::code::Status;
use libfluke::object::{Task, Thread};
use libfluke::{heap, println, startup};

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

/// The program. With the argument `memory` it exhausts user memory instead.
pub fn main() -> u64 {
    if startup::args().nth(1) == Some("memory") {
        return use_memory();
    }
    let fine = [twice::<Thread>(), twice::<Task>()];
    if fine.contains(&false) {
        crate::FAILED
    } else {
        0
    }
}
