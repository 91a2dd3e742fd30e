//! Ports (fluke-api 7.1).

use fluke_abi::code::Insanity;
use fluke_abi::state::PortState;

use super::pick;
use crate::call::{Call, Done};
use crate::ipc::Port;
use crate::object::{Link, Object};

/// Commit point: detaching.
pub fn port_destroy(call: &mut Call) -> Done {
    let id = call.object::<Port>(0)?;
    call.kernel().destroy_port(id);
    call.complete(0)
}

/// Commit point: the last write.
pub fn port_get_state(call: &mut Call) -> Done {
    let id = call.object::<Port>(0)?;
    let pset_ref = call.reference(2)?;
    let state_at = call.argument(1);
    let port = &mut call.kernel().ports[id];
    let pset = port.pset.map_or(Link::Null, Link::Pset);
    let state = PortState {
        hash: port.header().hash,
        alias: port.alias,
    };
    if state_at != 0 {
        call.write(state_at, &state)?;
    }
    call.set_link(pset_ref, pset);
    call.complete(0)
}

/// Commit point: after all reads.
pub fn port_set_state(call: &mut Call) -> Done {
    let id = call.object::<Port>(0)?;
    let pset = call.link(2, Insanity::NotPsetRef, pick::pset)?;
    let state_at = call.argument(1);
    let state = if state_at == 0 {
        None
    } else {
        Some(call.read::<PortState>(state_at)?)
    };
    let kernel = call.kernel();
    if let Some(state) = state {
        kernel.ports[id].alias = state.alias;
    }
    if let Some(pset) = pset {
        kernel.set_pset(id, pset);
    }
    call.complete(0)
}
