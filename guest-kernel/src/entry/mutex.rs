//! Mutex (fluke-api 10.1).

use fluke_abi::code::{Insanity, Status};
use fluke_abi::state::MutexState;

use super::pick;
use crate::call::{Call, Done};
use crate::mutant::mutant;
use crate::object::{Link, Object};
use crate::sync::Mutex;
use crate::thread::Wait;

/// Commit point: taking the mutex; or being handed it while asleep.
pub fn mutex_lock(call: &mut Call) -> Done {
    let id = call.object::<Mutex>(0)?;
    let caller = call.id;
    let mutex = &mut call.kernel().mutexes[id];
    if mutex.locked {
        if mutex.owner == Some(caller) {
            return Err(Insanity::MutexLocked.into());
        }
        // Whoever unlocks hands the mutex over and completes this call.
        if mutant!(handover_on_stack) {
            call.wait(Wait::Mutex(id))?;
            return call.complete(0);
        }
        return call.wait(Wait::Mutex(id));
    }
    (mutex.locked, mutex.owner) = (true, Some(caller));
    call.complete(0)
}

/// Commit point: taking the mutex.
pub fn mutex_trylock(call: &mut Call) -> Done {
    let id = call.object::<Mutex>(0)?;
    let caller = call.id;
    let mutex = &mut call.kernel().mutexes[id];
    let free = !mutex.locked;
    if free {
        (mutex.locked, mutex.owner) = (true, Some(caller));
    }
    call.complete(if free {
        Status::Success
    } else {
        Status::MutexHeld
    } as u64)
}

/// Commit point: letting go.
pub fn mutex_unlock(call: &mut Call) -> Done {
    let id = call.object::<Mutex>(0)?;
    check_owner(call, id)?;
    call.kernel().unlock(id);
    call.complete(0)
}

/// Checks that the caller holds the mutex.
pub fn check_owner(call: &mut Call, id: crate::arena::Id<Mutex>) -> Done {
    let caller = call.id;
    let mutex = &call.kernel().mutexes[id];
    match (mutex.locked, mutex.owner) {
        (false, _) => Err(Insanity::MutexNotLocked.into()),
        (true, Some(owner)) if owner == caller => Ok(()),
        _ => Err(Insanity::MutexNotOwner.into()),
    }
}

/// Commit point: detaching.
pub fn mutex_destroy(call: &mut Call) -> Done {
    let id = call.object::<Mutex>(0)?;
    let kernel = call.kernel();
    if kernel.mutexes[id].locked {
        return Err(Insanity::MutexLocked.into());
    }
    kernel.detach(id);
    kernel.mutexes.remove(id);
    call.complete(0)
}

/// Commit point: the last write.
pub fn mutex_get_state(call: &mut Call) -> Done {
    let id = call.object::<Mutex>(0)?;
    let owner_ref = call.reference(2)?;
    let state_at = call.argument(1);
    let mutex = &mut call.kernel().mutexes[id];
    let owner = mutex.owner.map_or(Link::Null, Link::Thread);
    let state = MutexState {
        hash: mutex.header().hash,
        flags: mutex.flags,
        locked: u64::from(mutex.locked),
    };
    if state_at != 0 {
        call.write(state_at, &state)?;
    }
    call.set_link(owner_ref, owner);
    call.complete(0)
}

/// Commit point: after all reads.
pub fn mutex_set_state(call: &mut Call) -> Done {
    let id = call.object::<Mutex>(0)?;
    let owner = call.link(2, Insanity::NotThreadRef, pick::thread)?;
    let state_at = call.argument(1);
    let state = if state_at == 0 {
        None
    } else {
        Some(call.read::<MutexState>(state_at)?)
    };
    let kernel = call.kernel();
    let mutex = &mut kernel.mutexes[id];
    if let Some(owner) = owner {
        mutex.owner = owner;
    }
    if let Some(state) = state {
        mutex.flags = state.flags;
        mutex.locked = state.locked != 0;
        if !mutex.locked {
            kernel.unlock(id);
        }
    }
    call.complete(0)
}
