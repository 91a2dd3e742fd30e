//! Regions: memory that a space exports (fluke-api 5).

use fluke_abi::object::Type;
use fluke_abi::state::Prot;

use super::{Mapping, Source, Space};
use crate::arena::{Arena, Id};
use crate::ipc::Port;
use crate::kernel::Kernel;
use crate::object::{Header, Object};
use crate::queue::{Linked, Links, Queue};

/// A region.
pub struct Region {
    header: Header<Self>,
    /// Among the regions of the exporting space.
    links: Links<Self>,
    /// First address in the exporting space.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// Upper limit of permissions.
    pub prot: Prot,
    /// Exporting space; `None`: nothing is allowed.
    pub space: Option<Id<Space>>,
    /// Who deals with faults.
    pub keeper: Option<Id<Port>>,
    /// Mappings in effect whose source this is.
    pub mappings: Queue<Mapping>,
    /// The mapping of the exporting space in which memory of it was found last.
    pub found: Option<Id<Mapping>>,
}

impl Region {
    /// A region of nothing.
    pub const fn new(hash: u64) -> Self {
        Self {
            header: Header::new(hash),
            links: Links::new(),
            start: 0,
            size: 0,
            prot: Prot::empty(),
            space: None,
            keeper: None,
            mappings: Queue::new(),
            found: None,
        }
    }
}

impl Object for Region {
    const TYPE: Type = Type::Region;

    fn header(&mut self) -> &mut Header<Self> {
        &mut self.header
    }

    fn arena(kernel: &mut Kernel) -> &mut Arena<Self> {
        &mut kernel.regions
    }
}

impl Linked for Region {
    fn links(&mut self) -> &mut Links<Self> {
        &mut self.links
    }
}

impl Kernel {
    /// Changes what a region exports; all that derived from it is dropped.
    pub fn set_region_space(&mut self, id: Id<Region>, space: Option<Id<Space>>) {
        self.flush_region(id);
        if let Some(old) = self.regions[id].space.take()
            && self.spaces.get(old).is_some()
        {
            self.spaces[old].regions.remove(&mut self.regions, id);
        }
        if let Some(new) = space {
            self.spaces[new].regions.push(&mut self.regions, id);
            self.regions[id].space = space;
        }
    }

    /// Unmakes a region. Mappings of it stay, without a source.
    pub fn destroy_region(&mut self, id: Id<Region>) {
        self.set_region_space(id, None);
        while let Some((mapping, _)) = self.regions[id].mappings.pop(&mut self.mappings) {
            self.mappings[mapping].source = Source::None;
        }
        self.detach(id);
        self.regions.remove(id);
    }
}
