//! Regions (fluke-api 5).

use fluke_abi::code::Insanity;
use fluke_abi::layout::{ENTRY_MAX, ENTRY_MIN, PAGE_SIZE, VM_MAX, VM_MIN};
use fluke_abi::object::OBJECT_SIZE;
use fluke_abi::state::{ObjectSpec, Prot, RegionState};

use super::pick;
use crate::call::{Call, Done, Stop};
use crate::lock;
use crate::mm::Region;
use crate::mm::access::within_page;
use crate::mutant::mutant;
use crate::object::{Link, Object};

/// Checks a range of whole pages within what a space may use, outside the entry-point area.
pub fn check_range(start: u64, size: u64) -> Result<(), Stop> {
    if !start.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) {
        return Err(Insanity::NotAligned.into());
    }
    let Some(end) = start.checked_add(size) else {
        return Err(Insanity::InvalidAddress.into());
    };
    if size > 0 && (start < VM_MIN || end > VM_MAX) {
        return Err(Insanity::InvalidAddress.into());
    }
    if start < ENTRY_MAX && end > ENTRY_MIN {
        return Err(Insanity::AddressOverlap.into());
    }
    Ok(())
}

/// Checks a protection value.
pub fn check_prot(bits: u64) -> Result<Prot, Stop> {
    Prot::from_bits(bits).ok_or(Stop::Insanity(Insanity::InvalidProt))
}

/// Commit point: the first translation dropped.
pub fn region_destroy(call: &mut Call) -> Done {
    let id = call.object::<Region>(0)?;
    call.kernel().destroy_region(id);
    call.complete(0)
}

/// Commit point: the last write.
pub fn region_get_state(call: &mut Call) -> Done {
    let id = call.object::<Region>(0)?;
    let task_ref = call.reference(2)?;
    let keeper_ref = call.reference(3)?;
    let state_at = call.argument(1);
    let region = &mut call.kernel().regions[id];
    let task = region.space.map_or(Link::Null, Link::Task);
    let keeper = region.keeper.map_or(Link::Null, Link::Port);
    let state = RegionState {
        hash: region.header().hash,
        start_va: region.start,
        size: region.size,
        prot: region.prot.bits(),
    };
    if state_at != 0 {
        call.write(state_at, &state)?;
    }
    call.set_link(task_ref, task);
    call.set_link(keeper_ref, keeper);
    call.complete(0)
}

/// Commit point: after all reads and checks.
pub fn region_set_state(call: &mut Call) -> Done {
    let id = call.object::<Region>(0)?;
    let task = call.link(2, Insanity::NotTaskRef, pick::task)?;
    let keeper = call.link(3, Insanity::NotPortRef, pick::port)?;
    let state_at = call.argument(1);
    let state = if state_at == 0 {
        None
    } else {
        Some(call.read::<RegionState>(state_at)?)
    };
    let prot = state.map(|state| check_prot(state.prot)).transpose()?;
    if let Some(state) = state {
        check_range(state.start_va, state.size)?;
    }
    let kernel = call.kernel();
    if let Some(keeper) = keeper {
        kernel.regions[id].keeper = keeper;
    }
    // What derives from the region is dropped under the old range; the new one starts without.
    let space = task.unwrap_or(kernel.regions[id].space);
    kernel.set_region_space(id, None);
    if let (Some(state), Some(prot)) = (state, prot) {
        let region = &mut kernel.regions[id];
        (region.start, region.size, region.prot) = (state.start_va, state.size, prot);
    }
    kernel.set_region_space(id, space);
    call.complete(0)
}

/// Commit point: the change.
pub fn region_protect(call: &mut Call) -> Done {
    let id = call.object::<Region>(0)?;
    let prot = check_prot(call.argument(1))?;
    let kernel = call.kernel();
    kernel.flush_region(id);
    kernel.regions[id].prot = prot;
    call.complete(0)
}

/// Pages and objects that `region_search` looks at before others get their turn.
const SEARCH_STEPS: u32 = 16;

/// Commit point: after so many pages and objects, when `*offset` and `*found_size` move on, and the
/// parameters in registers with them. The rest is called for from user mode, so that a long search keeps
/// nobody waiting.
pub fn region_search(call: &mut Call) -> Done {
    let id = call.object::<Region>(0)?;
    let (offset_at, count_at) = (call.argument(1), call.argument(4));
    call.prepare_write::<u64>(offset_at)?;
    call.prepare_write::<u64>(count_at)?;
    let mut offset = call.read::<u64>(offset_at)?;
    let mut room = call.read::<u64>(count_at)?;
    let (mut left, mut out) = (call.argument(2), call.argument(3));
    let region = &call.kernel().regions[id];
    let (start, size, space) = (region.start, region.size, region.space);
    for _ in 0..SEARCH_STEPS {
        if left == 0 || room == 0 || offset >= size {
            break;
        }
        // The next object in this page, or the end of the page.
        let in_page = within_page(offset, left);
        let physical = space.and_then(|space| call.kernel().peek(space, start + offset));
        let found = physical.and_then(|physical| {
            let (at, kind) = call.kernel().next_object(physical)?;
            let distance = at - physical;
            (distance < in_page).then_some((distance, kind))
        });
        let mut step = in_page;
        if let Some((distance, kind)) = found {
            let spec = ObjectSpec {
                object: start + offset + distance,
                kind: kind as u64,
            };
            call.write(out, &spec)?;
            out = out.wrapping_add(size_of::<ObjectSpec>() as u64);
            room -= 1;
            step = (distance + OBJECT_SIZE).min(left);
        }
        offset += step;
        left -= step;
    }
    call.write(offset_at, &offset)?;
    call.write(count_at, &room)?;
    if mutant!(search_torn) {
        lock::offer(call.entity);
    }
    call.set_argument(2, left);
    call.set_argument(3, out);
    if left == 0 || room == 0 || offset >= size {
        return call.complete(0);
    }
    call.call_again();
    Ok(())
}
