//! Mappings (fluke-api 6).

use fluke_abi::code::Insanity;
use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::state::MappingState;

use super::pick;
use super::region::{check_prot, check_range};
use crate::call::{Call, Done};
use crate::mm::{Mapping, Source};
use crate::object::{Link, Object};

/// Commit point: the first translation dropped.
pub fn mapping_destroy(call: &mut Call) -> Done {
    let id = call.object::<Mapping>(0)?;
    call.complete(0)?;
    let kernel = call.kernel();
    kernel.withdraw_mapping(id);
    kernel.detach(id);
    kernel.mappings.remove(id);
    Ok(())
}

/// Commit point: the last write.
pub fn mapping_get_state(call: &mut Call) -> Done {
    let id = call.object::<Mapping>(0)?;
    let region_ref = call.reference(2)?;
    let task_ref = call.reference(3)?;
    let state_at = call.argument(1);
    let mapping = &mut call.kernel().mappings[id];
    let task = mapping.space.map_or(Link::Null, Link::Task);
    let (region, region_off) = match mapping.source {
        Source::Region(region, offset) => (Link::Region(region), offset),
        Source::Physical(_) | Source::None => (Link::Null, 0),
    };
    let state = MappingState {
        hash: mapping.header().hash,
        region_off,
        start_va: mapping.start,
        size: mapping.size,
        prot: mapping.prot.bits(),
    };
    if state_at != 0 {
        call.write(state_at, &state)?;
    }
    call.set_link(region_ref, region);
    call.set_link(task_ref, task);
    call.complete(0)
}

/// Commit point: after all reads and checks.
pub fn mapping_set_state(call: &mut Call) -> Done {
    let id = call.object::<Mapping>(0)?;
    let region = call.link(2, Insanity::NotRegionRef, pick::region)?;
    let task = call.link(3, Insanity::NotTaskRef, pick::task)?;
    let state_at = call.argument(1);
    let state = if state_at == 0 {
        None
    } else {
        Some(call.read::<MappingState>(state_at)?)
    };
    let kernel = call.kernel();
    let old = &kernel.mappings[id];
    let (mut start, mut size, mut prot) = (old.start, old.size, old.prot);
    let (mut source, mut offset) = match old.source {
        Source::Region(region, offset) => (Some(region), offset),
        _ => (None, 0),
    };
    let space = task.unwrap_or(old.space);
    if let Some(state) = state {
        check_range(state.start_va, state.size)?;
        prot = check_prot(state.prot)?;
        if !state.region_off.is_multiple_of(PAGE_SIZE) {
            return Err(Insanity::NotAligned.into());
        }
        if state.region_off.checked_add(state.size).is_none() {
            return Err(Insanity::InvalidAddress.into());
        }
        (start, size, offset) = (state.start_va, state.size, state.region_off);
    }
    if let Some(region) = region {
        source = region;
    }
    if let Some(space) = space
        && kernel.spaces[space]
            .mappings
            .overlaps(&kernel.mappings, start, start + size, id)
    {
        return Err(Insanity::AddressOverlap.into());
    }
    kernel.withdraw_mapping(id);
    let mapping = &mut kernel.mappings[id];
    (mapping.start, mapping.size, mapping.prot) = (start, size, prot);
    mapping.source = source.map_or(Source::None, |region| Source::Region(region, offset));
    if let Some(space) = space.filter(|_| size > 0) {
        kernel.aim_mapping(id, space);
    }
    call.complete(0)
}

/// Commit point: the change.
pub fn mapping_protect(call: &mut Call) -> Done {
    let id = call.object::<Mapping>(0)?;
    let prot = check_prot(call.argument(1))?;
    let kernel = call.kernel();
    let Mapping {
        start, size, space, ..
    } = kernel.mappings[id];
    if let Some(space) = space {
        kernel.invalidate(space, start, start + size);
    }
    kernel.mappings[id].prot = prot;
    call.complete(0)
}
