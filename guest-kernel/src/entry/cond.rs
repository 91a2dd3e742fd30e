//! Condition variables (fluke-api 10.2).

use fluke_abi::code::Insanity;
use fluke_abi::entry::Entry;
use fluke_abi::state::CondState;

use super::mutex::{check_owner, mutex_lock};
use super::pick;
use crate::call::{Call, Done};
use crate::lock;
use crate::mutant::mutant;
use crate::object::{Link, Object};
use crate::sync::{Cond, Mutex};
use crate::thread::Wait;

/// Before the thread sleeps, its call becomes `mutex_lock` of the mutex: whatever wakes it makes it
/// relock and return (OSDI '99 4.3). Commit point: letting go of the mutex.
pub fn cond_wait(call: &mut Call) -> Done {
    let cond = call.object::<Cond>(0)?;
    let mutex = call.object::<Mutex>(1)?;
    check_owner(call, mutex)?;
    let handle = call.argument(1);
    call.set_argument(0, handle);
    if mutant!(cond_wait_torn) {
        call.kernel().unlock(mutex);
        lock::offer(call.entity);
    }
    if !mutant!(cond_wait_again) {
        call.thread().become_entry(Entry::mutex_lock);
    }
    call.kernel().unlock(mutex);
    call.wait(Wait::Cond(cond))?;
    mutex_lock(call)
}

/// Commit point: waking.
pub fn cond_signal(call: &mut Call) -> Done {
    let id = call.object::<Cond>(0)?;
    call.kernel().signal(id);
    call.complete(0)
}

/// Commit point: waking.
pub fn cond_broadcast(call: &mut Call) -> Done {
    let id = call.object::<Cond>(0)?;
    while call.kernel().signal(id) {}
    call.complete(0)
}

/// Waiters go on to relock their mutex. Commit point: waking.
pub fn cond_destroy(call: &mut Call) -> Done {
    let id = call.object::<Cond>(0)?;
    let kernel = call.kernel();
    while kernel.signal(id) {}
    kernel.detach(id);
    kernel.conds.remove(id);
    call.complete(0)
}

/// Commit point: the last write.
pub fn cond_get_state(call: &mut Call) -> Done {
    let id = call.object::<Cond>(0)?;
    let inheritor_ref = call.reference(2)?;
    let state_at = call.argument(1);
    let cond = &mut call.kernel().conds[id];
    let inheritor = cond.inheritor.map_or(Link::Null, Link::Thread);
    let state = CondState {
        hash: cond.header().hash,
        flags: cond.flags,
    };
    if state_at != 0 {
        call.write(state_at, &state)?;
    }
    call.set_link(inheritor_ref, inheritor);
    call.complete(0)
}

/// Commit point: after all reads.
pub fn cond_set_state(call: &mut Call) -> Done {
    let id = call.object::<Cond>(0)?;
    let inheritor = call.link(2, Insanity::NotThreadRef, pick::thread)?;
    let state_at = call.argument(1);
    let state = if state_at == 0 {
        None
    } else {
        Some(call.read::<CondState>(state_at)?)
    };
    let cond = &mut call.kernel().conds[id];
    if let Some(inheritor) = inheritor {
        cond.inheritor = inheritor;
    }
    if let Some(state) = state {
        cond.flags = state.flags;
    }
    call.complete(0)
}
