//! Spaces: address spaces, called tasks in the manual (fluke-api 4).

use fluke_abi::code::Status;
use fluke_abi::layout::{GATE, PAGE_SIZE};
use fluke_abi::object::Type;
use fluke_abi::state::Prot;

use super::tree::MappingTree;
use super::{Mapping, Region, page_table};
use crate::arch::memory::{read_word, write_word};
use crate::arena::{Arena, Id};
use crate::ipc::Port;
use crate::kernel::Kernel;
use crate::lock::scheduler;
use crate::object::{Header, Object};
use crate::queue::Queue;
use crate::sched::{Table, remove_table, shoot_down};

/// A space.
pub struct Space {
    header: Header<Self>,
    /// Physical address of the top page table; 0 until there is one.
    pub page_table: u64,
    /// The same for the scheduler.
    pub table: Id<Table>,
    /// Who deals with exceptions of the space's threads.
    pub keeper: Option<Id<Port>>,
    /// What it imports.
    pub mappings: MappingTree,
    /// The one in which memory for a thread of its own was found last.
    pub found: Option<Id<Mapping>>,
    /// What it exports.
    pub regions: Queue<Region>,
}

impl Space {
    /// A space without a page table.
    pub fn new(hash: u64) -> Self {
        Self {
            header: Header::new(hash),
            page_table: 0,
            table: Id::NONE,
            keeper: None,
            mappings: MappingTree::default(),
            found: None,
            regions: Queue::new(),
        }
    }
}

impl Object for Space {
    const TYPE: Type = Type::Task;

    fn header(&mut self) -> &mut Header<Self> {
        &mut self.header
    }

    fn arena(kernel: &mut Kernel) -> &mut Arena<Self> {
        &mut kernel.spaces
    }
}

impl Kernel {
    /// Makes an empty space: nothing but the gate page.
    pub fn create_space(&mut self, hash: Option<u64>) -> Result<Id<Space>, Status> {
        self.reap_husks();
        let id = self.create(hash, Space::new)?;
        let root = page_table::create(&mut self.frames, self.page_table);
        let gate = GATE..GATE + PAGE_SIZE;
        let prot = Prot::READ | Prot::EXECUTE;
        let table = root.and_then(|root| {
            page_table::map(&mut self.frames, root, gate, self.gate_page, prot)?;
            scheduler().add_table(root)
        });
        let (Some(page_table), Some(table)) = (root, table) else {
            if let Some(root) = root {
                page_table::clear(&mut self.frames, root);
                self.frames.free(root);
            }
            self.spaces.remove(id);
            return Err(Status::NoMemory);
        };
        let space = &mut self.spaces[id];
        (space.page_table, space.table) = (page_table, table);
        Ok(id)
    }

    /// Unmakes a space: what it imports and exports vanishes, its threads have nowhere to run.
    pub fn destroy_space(&mut self, id: Id<Space>) {
        while let Some(region) = self.spaces[id].regions.first(&self.regions) {
            self.set_region_space(region, None);
        }
        while let Some(mapping) = self.spaces[id].mappings.any() {
            self.withdraw_mapping(mapping);
        }
        self.detach(id);
        let Some(Space {
            page_table, table, ..
        }) = self.spaces.remove(id)
        else {
            return;
        };
        // CPUs that run it are brought into the kernel, where the user half is not used.
        remove_table(table);
        page_table::clear(&mut self.frames, page_table);
        // The top table stays until no CPU has it loaded.
        write_word(page_table, self.husks);
        self.husks = page_table;
        self.reap_husks();
    }

    /// Frees the top page tables of destroyed spaces that no CPU has loaded any more; returns how many
    /// are left.
    pub fn reap_husks(&mut self) -> u64 {
        let mut left = 0;
        let mut husk = core::mem::take(&mut self.husks);
        while husk != 0 {
            let next = read_word(husk);
            if scheduler().has_loaded(husk) {
                write_word(husk, self.husks);
                self.husks = husk;
                left += 1;
            } else {
                self.frames.free(husk);
            }
            husk = next;
        }
        left
    }

    /// Page table entries of a space were dropped: no CPU goes on using them.
    pub fn shoot_down(&mut self, space: Id<Space>) {
        shoot_down(self.spaces[space].table);
    }
}
