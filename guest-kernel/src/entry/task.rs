//! Spaces, tasks in the manual (fluke-api 4).

use fluke_abi::code::Insanity;
use fluke_abi::state::TaskState;

use super::pick;
use crate::call::{Call, Done};
use crate::mm::Space;
use crate::object::{Link, Object};

/// Commit point: the first range that vanishes; from there it cannot fail.
pub fn task_destroy(call: &mut Call) -> Done {
    let id = call.object::<Space>(0)?;
    call.complete(0)?;
    call.kernel().destroy_space(id);
    Ok(())
}

/// Commit point: the last write.
pub fn task_get_state(call: &mut Call) -> Done {
    let id = call.object::<Space>(0)?;
    let keeper_ref = call.reference(2)?;
    let state_at = call.argument(1);
    let space = &mut call.kernel().spaces[id];
    let keeper = space.keeper.map_or(Link::Null, Link::Port);
    let state = TaskState {
        hash: space.header().hash,
    };
    if state_at != 0 {
        call.write(state_at, &state)?;
    }
    call.set_link(keeper_ref, keeper);
    call.complete(0)
}

/// Commit point: after all reads.
pub fn task_set_state(call: &mut Call) -> Done {
    let id = call.object::<Space>(0)?;
    let keeper = call.link(2, Insanity::NotPortRef, pick::port)?;
    let state_at = call.argument(1);
    if state_at != 0 {
        call.read::<TaskState>(state_at)?;
    }
    if let Some(keeper) = keeper {
        call.kernel().spaces[id].keeper = keeper;
    }
    call.complete(0)
}
