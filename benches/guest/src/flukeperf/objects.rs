//! Objects, references, and memory.

use fluke_abi::layout::PAGE_SIZE;
use libfluke::object::{Cond, Mapping, Mutex, Port, Pset, Ref, Region, Target, Task, Thread};
use libfluke::space::{Error, READ_WRITE, own_heap};
use libfluke::{heap, startup};

use crate::meter::Meter;

/// Addresses that nothing else has.
const VIEW: u64 = 0x33_0000_0000;

/// Makes and unmakes an object of each type.
macro_rules! create_destroy {
    ($meter:ident, $($ty:ident $name:literal)*) => {$(
        let object = $ty::alloc()?;
        object.destroy();
        $meter.measure($name, 8, || {
            let _ = object.create();
            object.destroy();
        });
    )*};
}

/// Measures all.
pub fn all(meter: &mut Meter) -> Result<(), Error> {
    create_destroy!(meter,
        Mutex "mutex_create_destroy"
        Cond "cond_create_destroy"
        Ref "ref_create_destroy"
        Port "port_create_destroy"
        Pset "pset_create_destroy"
        Region "region_create_destroy"
        Mapping "mapping_create_destroy"
        Task "task_create_destroy"
        Thread "thread_create_destroy"
    );
    let (from, to) = (Ref::alloc()?, Ref::alloc()?);
    Port::alloc()?.point(from);
    meter.measure("ref_check", 32, || {
        from.is_live();
    });
    meter.measure("ref_copy", 32, || to.copy_from(from));
    soft_faults(meter)
}

/// A page is touched that this space maps from its own heap, where it is present.
fn soft_faults(meter: &mut Meter) -> Result<(), Error> {
    let page = heap::pages(PAGE_SIZE).ok_or(Error::NoMemory)?;
    // SAFETY: the memory was just allocated.
    unsafe { (page as *mut u64).write_volatile(1) };
    let mapping = Mapping::alloc()?;
    let (heap, here) = (own_heap()?, &startup::startup().space);
    let map = || {
        mapping.destroy();
        let _ = mapping.create();
        heap.map_with(mapping, page, PAGE_SIZE, READ_WRITE, here, VIEW);
    };
    meter.prepared("fault-soft", 1, map, || {
        // SAFETY: mapped above.
        unsafe { (VIEW as *mut u64).write_volatile(2) };
    });
    Ok(())
}
