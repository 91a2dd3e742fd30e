//! Calls that end as they do for no single parameter's sake: by what an object, a state or the caller is.

use alloc::vec::Vec;
use core::ptr::null_mut;

use fluke_abi::code::{Insanity, Status};
use fluke_abi::entry::Entry;
use fluke_abi::layout::{ENTRY_MIN, GATE_DONE, PAGE_SIZE, VM_MAX};
use fluke_abi::state::{
    MappingState, MutexState, RegionState, SavedState, ThreadFlags, ThreadState,
};
use libfluke::object::{Cond, Mapping, Mutex, Port, Ref, Region, Thread};
use libfluke::{println, sys, thread};

use super::pairs::{check, ended};
use crate::caller::{Caller, End, eventually, plain};
use crate::handler;

const DONE: End = End::Status(Status::Success);

/// Whether a call ended as it must; else says so.
fn as_expected(entry: Entry, end: End, expected: End) -> bool {
    if end != expected {
        println!(
            "wild: {} ended with {end:?}, not {expected:?}",
            entry.row().name
        );
    }
    end == expected
}

/// Returns from an exception to behind this call.
fn returns() -> Result<bool, Status> {
    const RESULT: u64 = 0x5a5a;
    let entry = Entry::thread_return_from_exception;
    let state = SavedState {
        rax: RESULT,
        rip: GATE_DONE,
        ..SavedState::default()
    };
    // SAFETY: behind the gate a call returns to its caller.
    let result = unsafe {
        sys::thread_set_saved_state(null_mut(), &raw const state);
        handler::call(entry as u64, [0; 9])
    };
    ended(entry.row(), DONE);
    Ok(as_expected(entry, End::Other(result), End::Other(RESULT)))
}

/// Condition variables that are signalled; the second time, the mutex is the waiter's already.
fn waits() -> Result<bool, Status> {
    let entry = Entry::cond_wait;
    let mut fine = true;
    for (given, expected) in [(false, DONE), (true, End::Insanity(Insanity::MutexLocked))] {
        let (mutex, cond) = (Mutex::alloc()?, Cond::alloc()?);
        let at = mutex.handle() as u64;
        let lock = plain(Entry::mutex_lock, &[at]);
        let wait = plain(entry, &[cond.handle() as u64, at]);
        let caller = Caller::new([lock, wait].into())?;
        fine &= caller.asleep_without(mutex);
        if given {
            let owner = Ref::to(caller.thread())?;
            // SAFETY: objects, and a state to be read.
            unsafe { sys::mutex_set_state(mutex.handle(), &raw const LOCKED, owner.handle()) };
        }
        cond.signal();
        let end = caller.end();
        ended(entry.row(), end);
        fine &= as_expected(entry, end, expected);
    }
    Ok(fine)
}

/// Donates time although a message waits already.
fn schedules() -> Result<bool, Status> {
    let entry = Entry::thread_schedule;
    let port = Port::alloc()?;
    let to_port = Ref::to(port)?.handle() as u64;
    let sender = Caller::new([plain(Entry::ipc_send, &[to_port])].into())?;
    let (_, registers) = plain(
        entry,
        &[Thread::alloc()?.handle() as u64, port.handle() as u64],
    );
    let mut end = End::Hangs;
    eventually(|| {
        // SAFETY: objects.
        end = End::of(unsafe { handler::call(entry as u64, registers) });
        ended(entry.row(), end);
        end == DONE
    });
    sender.destroy();
    Ok(as_expected(entry, end, DONE))
}

static LOCKED: MutexState = MutexState {
    hash: 0,
    flags: 0,
    locked: 1,
};

/// Makes the calls; how many did not end so.
pub fn run() -> Result<usize, Status> {
    let to_port = Ref::to(Port::alloc()?)?.handle() as u64;
    let to_thread = Ref::to(Thread::alloc()?)?.handle() as u64;
    let mapping = Mapping::alloc()?.handle() as u64;
    let port = Port::alloc()?.handle() as u64;
    let region = Region::alloc()?.handle() as u64;
    let [own, free, foreign] = [Mutex::alloc()?, Mutex::alloc()?, Mutex::alloc()?];
    own.lock();
    // SAFETY: a mutex, and a state to be read.
    unsafe {
        sys::mutex_set_state(foreign.handle(), &raw const LOCKED, null_mut());
    }
    let cond = Cond::alloc()?.handle() as u64;
    let ranges = [
        (ENTRY_MIN, 0, Insanity::AddressOverlap),
        (VM_MAX, 0, Insanity::InvalidAddress),
        (PAGE_SIZE, u64::MAX, Insanity::InvalidProt),
    ]
    .map(|(start_va, prot, insanity)| {
        let region = RegionState {
            start_va,
            size: PAGE_SIZE,
            prot,
            ..RegionState::default()
        };
        let mapping = MappingState {
            start_va,
            size: PAGE_SIZE,
            prot,
            ..MappingState::default()
        };
        (region, mapping, End::Insanity(insanity))
    });
    let mut nowhere = ThreadState::default();
    nowhere.registers.rip = u64::MAX;
    let stopped = Thread::alloc()?.handle() as u64;
    let [own, free, foreign] = [own, free, foreign].map(|mutex| mutex.handle() as u64);
    let sender = ThreadFlags::CLIENT_SENDER.bits();
    let calls: &[(Entry, &[u64], End)] = &[
        (
            Entry::mapping_set_state,
            &[mapping, 0, to_port, 0],
            End::Insanity(Insanity::NotRegionRef),
        ),
        (
            Entry::port_set_state,
            &[port, 0, to_port],
            End::Insanity(Insanity::NotPsetRef),
        ),
        (
            Entry::region_set_state,
            &[region, 0, to_port, 0],
            End::Insanity(Insanity::NotTaskRef),
        ),
        (
            Entry::mutex_set_state,
            &[free, 0, to_port],
            End::Insanity(Insanity::NotThreadRef),
        ),
        (
            Entry::thread_set_state,
            &[stopped, 0, 0, 0, 0, to_port, 0],
            End::Insanity(Insanity::NotThreadRef),
        ),
        (
            Entry::thread_set_state,
            &[stopped, &raw const nowhere as u64],
            End::Insanity(Insanity::InvalidAddress),
        ),
        (
            Entry::thread_destroy,
            &[thread::current()],
            End::Insanity(Insanity::CurrentThread),
        ),
        (
            Entry::mutex_lock,
            &[own],
            End::Insanity(Insanity::MutexLocked),
        ),
        (
            Entry::mutex_destroy,
            &[own],
            End::Insanity(Insanity::MutexLocked),
        ),
        (
            Entry::mutex_unlock,
            &[free],
            End::Insanity(Insanity::MutexNotLocked),
        ),
        (
            Entry::mutex_unlock,
            &[foreign],
            End::Insanity(Insanity::MutexNotOwner),
        ),
        (
            Entry::mutex_trylock,
            &[foreign],
            End::Status(Status::MutexHeld),
        ),
        (
            Entry::cond_wait,
            &[cond, foreign],
            End::Insanity(Insanity::MutexNotOwner),
        ),
        (Entry::mutex_unlock, &[own], DONE),
        (Entry::thread_set_server, &[0, to_thread, 0], DONE),
        (
            Entry::ipc_client_send,
            &[],
            End::Insanity(Insanity::NotSender),
        ),
        (Entry::thread_set_server, &[0, to_thread, sender], DONE),
        (
            Entry::ipc_client_receive,
            &[],
            End::Insanity(Insanity::NotReceiver),
        ),
        (Entry::ipc_client_disconnect, &[], DONE),
    ];
    let states: Vec<_> = ranges
        .iter()
        .flat_map(|(range, view, end)| {
            let (range, view) = (&raw const *range as u64, &raw const *view as u64);
            [
                (Entry::region_set_state, [region, range], *end),
                (Entry::mapping_set_state, [mapping, view], *end),
            ]
        })
        .collect();
    let states = states
        .iter()
        .map(|(entry, parameters, end)| (*entry, &parameters[..], *end));
    let mut wrong = 0;
    for (entry, parameters, expected) in calls.iter().copied().chain(states) {
        let (_, registers) = plain(entry, parameters);
        // SAFETY: objects and locals, or nothing.
        let result = unsafe { handler::call(entry as u64, registers) };
        check(entry.row(), result);
        wrong += usize::from(!as_expected(entry, End::of(result), expected));
    }
    let others = [returns()?, waits()?, schedules()?];
    Ok(wrong + others.into_iter().filter(|fine| !fine).count())
}
