//! Calls that no single wrong parameter makes wrong: each must end with the insanity that it is.

use fluke_abi::code::{Insanity, Status};
use fluke_abi::entry::Entry;
use fluke_abi::layout::{ENTRY_MIN, PAGE_SIZE};
use fluke_abi::state::{MutexState, RegionState, ThreadFlags};
use libfluke::object::{Mapping, Mutex, Port, Ref, Region, Thread};
use libfluke::{println, sys, thread};

use super::check;
use crate::handler;

/// Makes the calls; how many did not end so.
pub fn run() -> Result<usize, Status> {
    let to_port = Ref::to(Port::alloc()?)?.handle() as u64;
    let to_thread = Ref::to(Thread::alloc()?)?.handle() as u64;
    let mapping = Mapping::alloc()?.handle() as u64;
    let port = Port::alloc()?.handle() as u64;
    let region = Region::alloc()?.handle() as u64;
    let gate = RegionState {
        start_va: ENTRY_MIN,
        size: PAGE_SIZE,
        ..RegionState::default()
    };
    let [own, free, foreign] = [Mutex::alloc()?, Mutex::alloc()?, Mutex::alloc()?];
    own.lock();
    let locked = MutexState {
        locked: 1,
        ..MutexState::default()
    };
    // SAFETY: a mutex, and a local to be read.
    unsafe {
        sys::mutex_set_state(foreign.handle(), &raw const locked, core::ptr::null_mut());
    }
    let [own, free, foreign] = [own, free, foreign].map(|mutex| mutex.handle() as u64);
    let sender = ThreadFlags::CLIENT_SENDER.bits();
    let calls: &[(Entry, &[u64], Option<Insanity>)] = &[
        (
            Entry::mapping_set_state,
            &[mapping, 0, to_port, 0],
            Some(Insanity::NotRegionRef),
        ),
        (
            Entry::port_set_state,
            &[port, 0, to_port],
            Some(Insanity::NotPsetRef),
        ),
        (
            Entry::region_set_state,
            &[region, 0, to_port, 0],
            Some(Insanity::NotTaskRef),
        ),
        (
            Entry::mutex_set_state,
            &[free, 0, to_port],
            Some(Insanity::NotThreadRef),
        ),
        (
            Entry::region_set_state,
            &[region, &raw const gate as u64, 0, 0],
            Some(Insanity::AddressOverlap),
        ),
        (
            Entry::thread_destroy,
            &[thread::current()],
            Some(Insanity::CurrentThread),
        ),
        (Entry::mutex_lock, &[own], Some(Insanity::MutexLocked)),
        (Entry::mutex_destroy, &[own], Some(Insanity::MutexLocked)),
        (Entry::mutex_unlock, &[free], Some(Insanity::MutexNotLocked)),
        (
            Entry::mutex_unlock,
            &[foreign],
            Some(Insanity::MutexNotOwner),
        ),
        (Entry::thread_set_server, &[0, to_thread, 0], None),
        (Entry::ipc_client_send, &[], Some(Insanity::NotSender)),
        (Entry::thread_set_server, &[0, to_thread, sender], None),
        (Entry::ipc_client_receive, &[], Some(Insanity::NotReceiver)),
        (Entry::ipc_client_disconnect, &[], None),
    ];
    let mut wrong = 0;
    for &(entry, parameters, expected) in calls {
        let mut registers = [0; 9];
        registers[..parameters.len()].copy_from_slice(parameters);
        // SAFETY: objects and locals, or nothing.
        let result = unsafe { handler::call(entry as u64, registers) };
        check(entry.row(), result);
        let seen = handler::raised(result).and_then(|(_, subcode)| Insanity::from_number(subcode));
        if seen != expected {
            println!(
                "wild: {} raised {seen:?}, not {expected:?}",
                entry.row().name
            );
            wrong += 1;
        }
    }
    Ok(wrong)
}
