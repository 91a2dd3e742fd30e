//! Port sets (fluke-api 7.2).

use fluke_abi::state::PsetState;

use crate::call::{Call, Done};
use crate::ipc::Pset;
use crate::object::Object;

/// Commit point: detaching.
pub fn pset_destroy(call: &mut Call) -> Done {
    let id = call.object::<Pset>(0)?;
    call.kernel().destroy_pset(id);
    call.complete(0)
}

/// Commit point: the write.
pub fn pset_get_state(call: &mut Call) -> Done {
    let id = call.object::<Pset>(0)?;
    let state_at = call.argument(1);
    let state = PsetState {
        hash: call.kernel().psets[id].header().hash,
    };
    if state_at != 0 {
        call.write(state_at, &state)?;
    }
    call.complete(0)
}

/// Nothing to set; the parameters are checked.
pub fn pset_set_state(call: &mut Call) -> Done {
    call.object::<Pset>(0)?;
    let state_at = call.argument(1);
    if state_at != 0 {
        call.read::<PsetState>(state_at)?;
    }
    call.complete(0)
}
