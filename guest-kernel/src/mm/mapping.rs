//! Mappings: memory imported into a space (fluke-api 6).

use fluke_abi::object::Type;
use fluke_abi::state::Prot;

use super::{Region, Space};
use crate::arena::{Arena, Id};
use crate::kernel::Kernel;
use crate::mutant::mutant;
use crate::object::{Header, Object};
use crate::queue::{Linked, Links};

/// Where a mapping's memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nowhere: no permissions.
    None,
    /// A region, from this offset on.
    Region(Id<Region>, u64),
    /// Physical memory from this address on: the root of the hierarchy.
    Physical(u64),
}

/// A mapping.
pub struct Mapping {
    header: Header<Self>,
    /// Among the mappings of the source region.
    links: Links<Self>,
    /// In the tree of the destination space.
    pub(super) children: (Option<Id<Self>>, Option<Id<Self>>),
    /// First address in the destination space.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// Permissions.
    pub prot: Prot,
    /// Source.
    pub source: Source,
    /// Destination; `None`: no effect.
    pub space: Option<Id<Space>>,
}

impl Mapping {
    /// A mapping of nothing into nothing.
    pub const fn new(hash: u64) -> Self {
        Self {
            header: Header::new(hash),
            links: Links::new(),
            children: (None, None),
            start: 0,
            size: 0,
            prot: Prot::empty(),
            source: Source::None,
            space: None,
        }
    }

    /// Whether an address is in it.
    #[inline]
    pub const fn covers(&self, address: u64) -> bool {
        address.wrapping_sub(self.start) < self.size
    }
}

impl Object for Mapping {
    const TYPE: Type = Type::Mapping;

    fn header(&mut self) -> &mut Header<Self> {
        &mut self.header
    }

    fn arena(kernel: &mut Kernel) -> &mut Arena<Self> {
        &mut kernel.mappings
    }
}

impl Linked for Mapping {
    fn links(&mut self) -> &mut Links<Self> {
        &mut self.links
    }
}

impl Kernel {
    /// Puts a mapping into effect in a space. It overlaps no other mapping there, and is in effect
    /// nowhere yet.
    pub fn aim_mapping(&mut self, id: Id<Mapping>, space: Id<Space>) {
        self.mappings[id].space = Some(space);
        let destination = &mut self.spaces[space];
        destination.mappings.insert(&mut self.mappings, id);
        // Most often it is used next.
        destination.found = Some(id);
        if let Source::Region(region, _) = self.mappings[id].source {
            self.regions[region].mappings.push(&mut self.mappings, id);
        }
    }

    /// Ends the effect of a mapping: its memory vanishes from its space, and from wherever it was
    /// exported.
    pub fn withdraw_mapping(&mut self, id: Id<Mapping>) {
        if let Some(space) = self.mappings[id].space {
            let Mapping { start, size, .. } = self.mappings[id];
            if !mutant!(translation_left) {
                self.invalidate(space, start, start + size);
            }
            self.spaces[space].mappings.remove(&mut self.mappings, id);
            self.mappings[id].space = None;
            if let Source::Region(region, _) = self.mappings[id].source
                && self.regions.get(region).is_some()
            {
                self.regions[region].mappings.remove(&mut self.mappings, id);
            }
        }
    }
}
