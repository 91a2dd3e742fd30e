//! References (fluke-api 11).

use fluke_abi::code::Status;

use crate::call::{Call, Done};
use crate::object::Link;
use crate::reference::Ref;

/// Commit point: detaching.
pub fn ref_destroy(call: &mut Call) -> Done {
    let id = call.object::<Ref>(0)?;
    let kernel = call.kernel();
    kernel.detach(id);
    kernel.refs.remove(id);
    call.complete(Status::Success as u64)
}

/// Changes nothing.
pub fn ref_check(call: &mut Call) -> Done {
    let id = call.object::<Ref>(0)?;
    let live = call.kernel().link(id) != Link::Null;
    call.complete(u64::from(live))
}

/// Changes nothing.
pub fn ref_compare(call: &mut Call) -> Done {
    let first = call.object::<Ref>(0)?;
    let second = call.object::<Ref>(1)?;
    let kernel = call.kernel();
    let same = kernel.link(first) == kernel.link(second);
    call.complete(u64::from(same))
}

/// Commit point: setting the link.
pub fn ref_copy(call: &mut Call) -> Done {
    let source = call.object::<Ref>(0)?;
    let target = call.object::<Ref>(1)?;
    let kernel = call.kernel();
    kernel.refs[target].link = kernel.refs[source].link;
    call.complete(0)
}

/// Changes nothing.
pub fn ref_hash(call: &mut Call) -> Done {
    let id = call.object::<Ref>(0)?;
    let kernel = call.kernel();
    let link = kernel.link(id);
    let hash = kernel.link_hash(link).unwrap_or(0);
    call.complete(hash)
}

/// Changes nothing.
pub fn ref_type(call: &mut Call) -> Done {
    let id = call.object::<Ref>(0)?;
    let kind = call.kernel().link(id).kind();
    call.complete(kind as u64)
}
