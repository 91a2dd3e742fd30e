//! The hierarchy of mappings and regions: who provides the memory behind an address, and what
//! derives from a range.

use fluke_abi::code::Exception;
use fluke_abi::layout::{ENTRY_MAX, ENTRY_MIN, PAGE_SIZE, VM_MAX, VM_MIN};
use fluke_abi::state::Prot;

use super::{Mapping, Region, Source, Space, page_table};
use crate::arch::cpu::count;
use crate::arena::Id;
use crate::ipc::Port;
use crate::kernel::Kernel;
use crate::object::Object;
use crate::thread::Raised;

/// Mappings on the way from an address to physical memory. Deeper ones are as good as absent, so
/// that no arrangement of regions and mappings can keep the kernel busy.
pub const DEPTH_MAX: u32 = 16;

/// Regions that dropping translations looks at before it gives up on precision.
const VISITS_MAX: u32 = 4096;

/// Whether permissions allow an access, which is one of the three. Page tables know no memory that can be written or
/// executed but not read, so neither does the hierarchy.
const fn allows(prot: Prot, access: Prot) -> bool {
    let enough = if access.bits() == Prot::READ.bits() {
        Prot::all()
    } else {
        access
    };
    prot.intersects(enough)
}

/// Bytes that one soft fault fills at most, aligned: what follows in a page table costs a tenth of
/// the fault. Within one lowest-level table.
const AROUND: u64 = 16 * PAGE_SIZE;

/// Physical memory behind an address.
struct Extent {
    /// Its page.
    page: u64,
    /// What may be done with it.
    prot: Prot,
    /// Bytes before the address that are as contiguous, and as permitted.
    before: u64,
    /// Bytes from the address on.
    after: u64,
}

/// Where memory is lacking: the last region on the way to it, and the offset there.
type Lacking = Option<(Id<Region>, u64)>;

/// An access that the hierarchy does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Address in the space of the thread.
    pub address: u64,
    /// What was tried.
    pub access: Prot,
    /// The exception that this is if nobody remedies it.
    pub code: Exception,
    /// Keeper of the region that lacks the memory; `None`: the thread's own exception.
    pub keeper: Option<Id<Port>>,
    /// Offset in that region.
    pub region_offset: u64,
    /// Hash of that region.
    pub region_hash: u64,
}

impl Fault {
    /// A fault of the thread itself.
    pub const fn own(address: u64, access: Prot) -> Self {
        Self {
            address,
            access,
            code: Exception::PageFault,
            keeper: None,
            region_offset: 0,
            region_hash: 0,
        }
    }

    /// What the keeper is told.
    pub const fn raised(&self) -> Raised {
        Raised {
            subcode: self.address,
            region_offset: self.region_offset,
            region_hash: self.region_hash,
            code: self.code,
            access: self.access.bits() as u8,
        }
    }
}

impl Kernel {
    /// The physical page behind an address, what may be done with it, and how many pages around it
    /// come from the same place, as the hierarchy says.
    #[inline]
    fn resolve(&mut self, space: Id<Space>, address: u64, access: Prot) -> Result<Extent, Fault> {
        self.walk(space, address, access)
            .map_err(|lacking| self.fault_in_region(lacking, address, access))
    }

    #[cold]
    fn fault_in_region(&mut self, lacking: Lacking, address: u64, access: Prot) -> Fault {
        let own = Fault::own(address, access);
        let region = lacking.and_then(|(id, offset)| Some((self.regions.get_mut(id)?, offset)));
        region.map_or(own, |(region, offset)| Fault {
            keeper: region.keeper,
            region_offset: offset,
            region_hash: region.header().hash,
            ..own
        })
    }

    /// As [`resolve`](Self::resolve); an error is where the memory is lacking.
    #[inline(never)]
    fn walk(&mut self, mut space: Id<Space>, mut at: u64, access: Prot) -> Result<Extent, Lacking> {
        let mut lacking = None;
        let mut found = self.spaces.get(space).ok_or(None)?.found;
        let mut prot = Prot::all();
        // Bytes before and after that every step of the way has in common.
        let (mut before, mut after) = (u64::MAX, u64::MAX);
        for _ in 0..DEPTH_MAX {
            // Most often memory is where it was found last. Who is in effect in a space covers what no other does.
            let known = found.and_then(|found| self.mappings.get(found));
            let known = known.filter(|known| known.space == Some(space) && known.covers(at));
            let mapping = match known {
                Some(mapping) => mapping,
                None => {
                    let id = self.search(space, at, lacking).ok_or(lacking)?;
                    &self.mappings[id]
                }
            };
            let from_start = at - mapping.start;
            before = before.min(from_start);
            after = after.min(mapping.size - from_start);
            let (region_id, offset) = match mapping.source {
                Source::Region(region, offset) => (region, offset + from_start),
                Source::None => return Err(lacking),
                Source::Physical(base) => {
                    // The root program's own permissions are for its own accesses; all memory is its to give.
                    if lacking.is_none() {
                        prot = mapping.prot;
                    }
                    if !allows(prot, access) {
                        return Err(lacking);
                    }
                    let page = (base + from_start) & !(PAGE_SIZE - 1);
                    return Ok(Extent {
                        page,
                        prot,
                        before,
                        after,
                    });
                }
            };
            let region = self.regions.get(region_id).ok_or(lacking)?;
            let given = prot & mapping.prot;
            prot = given & region.prot;
            match region.space {
                Some(next) if offset < region.size && allows(prot, access) => {
                    before = before.min(offset);
                    after = after.min(region.size - offset);
                    (space, at, found) = (next, region.start + offset, region.found);
                    lacking = Some((region_id, offset));
                }
                _ if allows(given, access) => return Err(Some((region_id, offset))),
                _ => return Err(lacking),
            }
        }
        Err(lacking)
    }

    /// The mapping that covers an address of a space. Keeps it for the next time: in the space, or in the region by
    /// which the way has come there.
    #[cold]
    fn search(&mut self, space: Id<Space>, at: u64, from: Lacking) -> Option<Id<Mapping>> {
        let space = self.spaces.get_mut(space)?;
        let found = space.mappings.at_or_before(&self.mappings, at);
        let found = found.filter(|found| self.mappings[*found].covers(at));
        match from.and_then(|(region, _)| self.regions.get_mut(region)) {
            Some(region) => region.found = found,
            None => space.found = found,
        }
        found
    }

    /// A soft fault: fills the page table from the hierarchy, with the neighbours in the same
    /// 64 KiB that come from the same place. An error is a hard fault.
    pub fn fill(&mut self, space: Id<Space>, address: u64, access: Prot) -> Result<u64, Fault> {
        let Extent {
            page,
            prot,
            before,
            after,
        } = self.resolve(space, address, access)?;
        let table = self.spaces[space].page_table;
        let at = address & !(PAGE_SIZE - 1);
        let first = at - (at % AROUND).min(before & !(PAGE_SIZE - 1));
        let last = at + (AROUND - at % AROUND).min(after.next_multiple_of(PAGE_SIZE));
        let mapped = page_table::map(
            &mut self.frames,
            table,
            first..last,
            page - (at - first),
            prot,
        );
        if mapped.is_none() {
            return Err(Fault {
                code: Exception::NoMemory,
                ..Fault::own(address, access)
            });
        }
        count!(soft_faults);
        Ok(page | (address % PAGE_SIZE))
    }

    /// The physical address behind an address of a space, if anything can read there.
    pub fn peek(&mut self, space: Id<Space>, address: u64) -> Option<u64> {
        let page = self.resolve(space, address, Prot::READ).ok()?.page;
        Some(page | (address % PAGE_SIZE))
    }

    /// Drops every translation that derives from a range of a space: in the space, and wherever
    /// its regions carried it.
    pub fn invalidate(&mut self, space: Id<Space>, start: u64, end: u64) {
        let mut left = VISITS_MAX;
        self.invalidate_from(space, start, end, DEPTH_MAX, &mut left);
        self.flush_all_if(left == 0);
    }

    /// Drops every translation that derives from a region.
    pub fn flush_region(&mut self, region: Id<Region>) {
        let size = self.regions[region].size;
        let mut left = VISITS_MAX;
        self.flush_range(region, 0, size, DEPTH_MAX, &mut left);
        self.flush_all_if(left == 0);
    }

    /// Drops all translations of all spaces, except the gate page: always right, as page tables are
    /// only a cache, and bounded, whatever the hierarchy looks like.
    fn flush_all_if(&mut self, needed: bool) {
        if !needed {
            return;
        }
        for at in self.spaces.offsets() {
            if let Some(space) = self.spaces.id_at(at) {
                let table = self.spaces[space].page_table;
                page_table::unmap(table, VM_MIN, ENTRY_MIN);
                page_table::unmap(table, ENTRY_MAX, VM_MAX);
                self.shoot_down(space);
            }
        }
    }

    fn invalidate_from(
        &mut self,
        space: Id<Space>,
        start: u64,
        end: u64,
        depth: u32,
        left: &mut u32,
    ) {
        if page_table::unmap(self.spaces[space].page_table, start, end) {
            self.shoot_down(space);
        }
        let mut next = self.spaces[space].regions.first(&self.regions);
        while let Some(id) = next {
            let region = &self.regions[id];
            let (from, to) = (start.max(region.start), end.min(region.start + region.size));
            if from < to {
                self.flush_range(id, from - region.start, to - region.start, depth, left);
            }
            next = self.spaces[space].regions.after(&mut self.regions, id);
        }
    }

    /// Drops every translation that derives from a range of a region, given by offsets.
    fn flush_range(
        &mut self,
        region: Id<Region>,
        start: u64,
        end: u64,
        depth: u32,
        left: &mut u32,
    ) {
        *left = left.saturating_sub(1);
        if depth == 0 || *left == 0 {
            return;
        }
        let mut next = self.regions[region].mappings.first(&self.mappings);
        while let Some(id) = next {
            let mapping = &self.mappings[id];
            if let (Source::Region(_, offset), Some(space)) = (mapping.source, mapping.space) {
                let (from, to) = (start.max(offset), end.min(offset + mapping.size));
                if from < to {
                    let base = mapping.start;
                    self.invalidate_from(
                        space,
                        base + from - offset,
                        base + to - offset,
                        depth - 1,
                        left,
                    );
                }
            }
            next = self.regions[region].mappings.after(&mut self.mappings, id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tests::kernel;
    use crate::mm::Mapping;
    use proptest::prelude::*;

    /// Pages in each space that the tests use, from this address on.
    const PAGES: u64 = 12;
    const BASE: u64 = 0x1000_0000;

    fn page(n: u64) -> u64 {
        BASE + n * PAGE_SIZE
    }

    fn map(
        kernel: &mut Kernel,
        space: Id<Space>,
        at: u64,
        pages: u64,
        source: Source,
        prot: Prot,
    ) -> Option<Id<Mapping>> {
        let mut mapping = Mapping::new(0);
        (mapping.start, mapping.size) = (page(at), pages * PAGE_SIZE);
        (mapping.source, mapping.prot) = (source, prot);
        let id = kernel.mappings.insert(mapping).ok()?;
        let (start, end) = (page(at), page(at + pages));
        if kernel.spaces[space]
            .mappings
            .overlaps(&kernel.mappings, start, end, id)
        {
            kernel.mappings.remove(id);
            return None;
        }
        kernel.aim_mapping(id, space);
        Some(id)
    }

    fn region(
        kernel: &mut Kernel,
        space: Id<Space>,
        at: u64,
        pages: u64,
        prot: Prot,
    ) -> Id<Region> {
        let mut region = Region::new(0);
        (region.start, region.size, region.prot) = (page(at), pages * PAGE_SIZE, prot);
        let id = kernel.regions.insert(region).ok().unwrap();
        kernel.set_region_space(id, Some(space));
        id
    }

    /// What the page tables cache must be what the hierarchy says: no entry may outlive its reason.
    fn check(kernel: &mut Kernel, spaces: &[Id<Space>]) -> Result<(), TestCaseError> {
        for &space in spaces {
            for n in 0..PAGES {
                for access in [Prot::READ, Prot::WRITE, Prot::EXECUTE] {
                    let cached =
                        page_table::lookup(kernel.spaces[space].page_table, page(n), access);
                    if let Some(cached) = cached {
                        let now = kernel
                            .resolve(space, page(n), access)
                            .map(|extent| extent.page);
                        prop_assert_eq!(now.ok(), Some(cached), "page {} for {:?}", n, access);
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn memory_travels_two_levels_with_the_least_permissions() {
        let mut kernel = kernel();
        let [root, middle, leaf] = [(); 3].map(|()| kernel.create_space(None).unwrap());
        map(
            &mut kernel,
            root,
            0,
            4,
            Source::Physical(0x10_0000),
            Prot::READ,
        )
        .unwrap();
        let lower = region(&mut kernel, root, 0, 4, Prot::READ | Prot::WRITE);
        map(
            &mut kernel,
            middle,
            2,
            4,
            Source::Region(lower, 0),
            Prot::all(),
        )
        .unwrap();
        let upper = region(&mut kernel, middle, 2, 2, Prot::READ);
        map(
            &mut kernel,
            leaf,
            5,
            4,
            Source::Region(upper, PAGE_SIZE),
            Prot::all(),
        )
        .unwrap();
        assert_eq!(kernel.fill(middle, page(3), Prot::WRITE), Ok(0x10_1000));
        assert_eq!(kernel.fill(leaf, page(5) + 8, Prot::READ), Ok(0x10_1008));
        assert!(
            kernel.fill(leaf, page(5), Prot::WRITE).is_err(),
            "the upper region forbids it"
        );
        let beyond = kernel.fill(leaf, page(6), Prot::READ).unwrap_err();
        assert_eq!(
            beyond.region_offset,
            2 * PAGE_SIZE,
            "the fault is the upper region's"
        );
        kernel.set_region_space(lower, None);
        let table = kernel.spaces[leaf].page_table;
        assert_eq!(page_table::lookup(table, page(5), Prot::READ), None);
    }

    #[test]
    fn a_cycle_of_regions_and_mappings_ends() {
        let mut kernel = kernel();
        let space = kernel.create_space(None).unwrap();
        let cycle = region(&mut kernel, space, 0, 4, Prot::all());
        let id = map(
            &mut kernel,
            space,
            0,
            4,
            Source::Region(cycle, 0),
            Prot::all(),
        )
        .unwrap();
        assert!(kernel.fill(space, page(1), Prot::READ).is_err());
        kernel.withdraw_mapping(id);
        kernel.destroy_region(cycle);
    }

    proptest! {
        /// Any history of mapping, exporting, touching, withdrawing and forbidding leaves no stale
        /// translation, and everything can be taken down again.
        #[test]
        fn page_tables_are_only_a_cache(
            operations in prop::collection::vec((0u8..6, 0usize..3, 0u64..PAGES, 1u64..5, 0u64..4, 0u64..8), 1..60)
        ) {
            let mut kernel = kernel();
            let before = kernel.frames.live();
            let spaces = [(); 3].map(|()| kernel.create_space(None).unwrap());

            map(&mut kernel, spaces[0], 0, PAGES, Source::Physical(0x10_0000), Prot::all()).unwrap();
            let (mut regions, mut mappings) = (Vec::new(), Vec::new());
            for (operation, space, at, pages, offset, bits) in operations {
                let (space, prot) = (spaces[space], Prot::from_bits_truncate(bits));
                let pages = pages.min(PAGES - at);
                match operation {
                    0 => regions.push(region(&mut kernel, space, at, pages, prot)),
                    1 if !regions.is_empty() => {
                        let source = Source::Region(regions[bits as usize % regions.len()], offset * PAGE_SIZE);
                        mappings.extend(map(&mut kernel, space, at, pages, source, Prot::all()));
                    }
                    2 => for access in [Prot::READ, Prot::WRITE, Prot::EXECUTE] {
                        let _ = kernel.fill(space, page(at), access);
                    },
                    3 if !mappings.is_empty() => {
                        let id = mappings.swap_remove(at as usize % mappings.len());
                        kernel.withdraw_mapping(id);
                    }
                    4 if !regions.is_empty() => {
                        let id = regions[at as usize % regions.len()];
                        kernel.flush_region(id);
                        kernel.regions[id].prot = prot;
                    }
                    5 if !regions.is_empty() => {
                        let id = regions.swap_remove(at as usize % regions.len());
                        kernel.destroy_region(id);
                    }
                    _ => {}
                }
                check(&mut kernel, &spaces)?;
            }
            for space in spaces {
                kernel.destroy_space(space);
            }
            prop_assert_eq!(kernel.spaces.live(), 0);
            prop_assert_eq!(kernel.frames.live(), before, "all tables are back");
        }
    }
}
