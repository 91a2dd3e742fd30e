//! What most object types have in common: create, move, reference (fluke-api 2).

use fluke_abi::code::{Insanity, Status};
use fluke_abi::object::{OBJECT_SIZE, Type};
use fluke_abi::state::Prot;

use crate::arena::Id;
use crate::call::{Call, Done, Stop, Typed};
use crate::ipc::{Port, Pset};
use crate::kernel::Kernel;
use crate::mm::{Mapping, Region, Space};
use crate::object::{Link, Object};
use crate::reference::Ref;
use crate::sync::{Cond, Mutex};
use crate::thread::Thread;

/// Physical address of the memory that parameter `n` names, which holds no object yet.
fn free_memory(call: &mut Call, n: usize) -> Result<u64, Stop> {
    let handle = call.argument(n);
    if !handle.is_multiple_of(OBJECT_SIZE) {
        return Err(Insanity::NotAligned.into());
    }
    let physical = call.translate(handle, Prot::WRITE)?;
    match call.kernel().type_at(physical) {
        Type::Null => Ok(physical),
        _ => Err(Insanity::ObjectExists.into()),
    }
}

/// `create`. Commit point: attaching the new object.
fn create<T: Object>(
    call: &mut Call,
    make: impl FnOnce(&mut Kernel, Option<u64>) -> Result<Id<T>, Status>,
) -> Done {
    let physical = free_memory(call, 0)?;
    create_at(call, physical, None, make)
}

/// `create_hash`. Commit point: attaching the new object.
fn create_hash<T: Object>(
    call: &mut Call,
    make: impl FnOnce(&mut Kernel, Option<u64>) -> Result<Id<T>, Status>,
) -> Done {
    let physical = free_memory(call, 0)?;
    let hash_at = call.argument(1);
    let mut hash = None;
    if hash_at != 0 {
        call.prepare_write::<u64>(hash_at)?;
        hash = Some(call.read::<u64>(hash_at)?);
    }
    create_at(call, physical, hash.map(|hash| (hash_at, hash)), make)
}

fn create_at<T: Object>(
    call: &mut Call,
    physical: u64,
    hash: Option<(u64, u64)>,
    make: impl FnOnce(&mut Kernel, Option<u64>) -> Result<Id<T>, Status>,
) -> Done {
    let kernel = call.kernel();
    let id = match make(kernel, hash.map(|(_, hash)| hash)) {
        Ok(id) => id,
        Err(status) => return call.complete(status as u64),
    };
    kernel.attach(id, physical);
    if let Some((hash_at, _)) = hash {
        let hash = T::arena(kernel)[id].header().hash;
        call.write(hash_at, &hash)?;
    }
    call.complete(Status::Success as u64)
}

/// `move`. Commit point: detaching from the old memory.
pub fn rehome<T: Typed>(call: &mut Call, id: Id<T>) -> Done {
    let physical = free_memory(call, 1)?;
    let kernel = call.kernel();
    kernel.detach(id);
    kernel.attach(id, physical);
    call.complete(0)
}

/// `reference`. Commit point: setting the link.
fn reference<T: Typed>(call: &mut Call, link: fn(Id<T>) -> Link) -> Done {
    let id = call.object::<T>(0)?;
    let target = call.object::<Ref>(1)?;
    call.kernel().refs[target].link = link(id);
    call.complete(0)
}

macro_rules! generic {
    ($($ty:ident { $create:ident $create_hash:ident $make:expr; $($move:ident)?; $($reference:ident $link:ident)? })*) => {$(
        pub fn $create(call: &mut Call) -> Done {
            create::<$ty>(call, $make)
        }

        pub fn $create_hash(call: &mut Call) -> Done {
            create_hash::<$ty>(call, $make)
        }

        $(pub fn $move(call: &mut Call) -> Done {
            let id = call.object::<$ty>(0)?;
            rehome(call, id)
        })?

        $(pub fn $reference(call: &mut Call) -> Done {
            reference(call, Link::$link)
        })?
    )*};
}

generic! {
    Thread {
        thread_create thread_create_hash Kernel::create_thread;
        ; // A thread must be stopped first: see thread.rs.
        thread_reference Thread
    }
    Space {
        task_create task_create_hash Kernel::create_space;
        task_move;
        task_reference Task
    }
    Region {
        region_create region_create_hash |kernel, hash| kernel.create(hash, Region::new);
        region_move;
        region_reference Region
    }
    Mapping {
        mapping_create mapping_create_hash |kernel, hash| kernel.create(hash, Mapping::new);
        mapping_move;
        mapping_reference Mapping
    }
    Port {
        port_create port_create_hash |kernel, hash| kernel.create(hash, Port::new);
        port_move;
        port_reference Port
    }
    Pset {
        pset_create pset_create_hash |kernel, hash| kernel.create(hash, Pset::new);
        pset_move;
        pset_reference Pset
    }
    Mutex {
        mutex_create mutex_create_hash |kernel, hash| kernel.create(hash, Mutex::new);
        mutex_move;
        mutex_reference Mutex
    }
    Cond {
        cond_create cond_create_hash |kernel, hash| kernel.create(hash, Cond::new);
        cond_move;
        cond_reference Cond
    }
}

/// `ref_create`: references have no hash of their own.
pub fn ref_create(call: &mut Call) -> Done {
    create::<Ref>(call, |kernel, _| {
        kernel
            .refs
            .insert(Ref::new(0))
            .map_err(|_| Status::NoMemory)
    })
}

/// `ref_move`.
pub fn ref_move(call: &mut Call) -> Done {
    let id = call.object::<Ref>(0)?;
    rehome(call, id)
}

/// Links by type, for [`Call::link`].
pub mod pick {
    use super::{Id, Link, Port, Pset, Region, Space, Thread};

    macro_rules! pick {
        ($($name:ident $variant:ident $ty:ident;)*) => {$(
            pub fn $name(link: Link) -> Option<Id<$ty>> {
                match link {
                    Link::$variant(id) => Some(id),
                    _ => None,
                }
            }
        )*};
    }

    pick! {
        thread Thread Thread;
        task Task Space;
        region Region Region;
        port Port Port;
        pset Pset Pset;
    }
}
