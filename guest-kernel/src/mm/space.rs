//! Spaces: address spaces, called tasks in the manual (fluke-api 4).

use fluke_abi::code::Status;
use fluke_abi::layout::{GATE, PAGE_SIZE};
use fluke_abi::object::Type;
use fluke_abi::state::Prot;

use super::tree::MappingTree;
use super::{Region, page_table};
use crate::arch::instructions;
use crate::arena::{Arena, Id};
use crate::ipc::Port;
use crate::kernel::Kernel;
use crate::object::{Header, Object};
use crate::queue::Queue;

/// A space.
pub struct Space {
    header: Header,
    /// Physical address of the top page table; 0 until there is one.
    pub page_table: u64,
    /// Who deals with exceptions of the space's threads.
    pub keeper: Option<Id<Port>>,
    /// What it imports.
    pub mappings: MappingTree,
    /// What it exports.
    pub regions: Queue<Region>,
    /// Destroyed; only its top page table is still loaded on some CPU.
    husk: bool,
}

impl Space {
    /// A space without a page table.
    fn new(hash: u64) -> Self {
        Self {
            header: Header::new(hash),
            page_table: 0,
            keeper: None,
            mappings: MappingTree::default(),
            regions: Queue::new(),
            husk: false,
        }
    }
}

impl Object for Space {
    const TYPE: Type = Type::Task;

    fn header(&mut self) -> &mut Header {
        &mut self.header
    }

    fn arena(kernel: &mut Kernel) -> &mut Arena<Self> {
        &mut kernel.spaces
    }
}

impl Kernel {
    /// Makes an empty space: nothing but the gate page.
    pub fn create_space(&mut self, hash: Option<u64>) -> Result<Id<Space>, Status> {
        let id = self.create(hash, Space::new)?;
        let table = page_table::create(&mut self.frames, self.page_table);
        let gate = self.gate_page;
        let complete = table.and_then(|table| {
            self.spaces[id].page_table = table;
            page_table::map(
                &mut self.frames,
                table,
                GATE..GATE + PAGE_SIZE,
                gate,
                Prot::READ | Prot::EXECUTE,
            )
        });
        if complete.is_none() {
            if let Some(table) = table {
                page_table::clear(&mut self.frames, table);
                self.frames.free(table);
            }
            self.spaces.remove(id);
            return Err(Status::NoMemory);
        }
        Ok(id)
    }

    /// Unmakes a space: what it imports and exports vanishes, its threads have nowhere to run.
    pub fn destroy_space(&mut self, id: Id<Space>) {
        while let Some(region) = self.spaces[id].regions.first() {
            self.set_region_space(region, None);
        }
        while let Some(mapping) = self.spaces[id].mappings.any() {
            self.withdraw_mapping(mapping);
        }
        // CPUs that run it are brought into the kernel, where the user half is not used.
        for cpu in 0..self.cpus.len() as u32 {
            if cpu != self.cpu_number() && self.cpus[cpu as usize].loaded == Some(id) {
                self.await_kernel(cpu);
            }
        }
        self.detach(id);
        let Some(mut space) = self.spaces.remove(id) else {
            return;
        };
        page_table::clear(&mut self.frames, space.page_table);
        // The top table stays until no CPU has it loaded, in a space that nobody can name.
        space.husk = true;
        space.keeper = None;
        let Ok(husk) = self.spaces.insert(space) else {
            return;
        };
        for cpu in self.cpus.iter_mut().filter(|cpu| cpu.loaded == Some(id)) {
            cpu.loaded = Some(husk);
        }
        self.leave_dead_space();
        self.reap(husk);
    }

    /// Leaves the page table of a destroyed space, if that is the one loaded.
    pub fn leave_dead_space(&mut self) {
        let Some(loaded) = self.cpu().loaded else {
            return;
        };
        if self.spaces.get(loaded).is_some_and(|space| space.husk) {
            self.load_space(None);
            self.reap(loaded);
        }
    }

    /// Frees a destroyed space once no CPU has its page table loaded.
    fn reap(&mut self, husk: Id<Space>) {
        if self.cpus.iter().all(|cpu| cpu.loaded != Some(husk))
            && let Some(space) = self.spaces.remove(husk)
        {
            self.frames.free(space.page_table);
        }
    }

    /// Loads the page table of a space, or the kernel's own, and drops what the CPU remembers of a
    /// table that has changed.
    pub fn load_space(&mut self, space: Option<Id<Space>>) {
        let space = space.filter(|&space| self.spaces.get(space).is_some());
        let cpu = self.cpu();
        if cpu.loaded == space && !cpu.flush {
            return;
        }
        cpu.flush = false;
        let before = core::mem::replace(&mut cpu.loaded, space);
        let table = space.map_or(self.page_table, |space| self.spaces[space].page_table);
        instructions::set_page_table(table);
        if let Some(before) = before.filter(|&b| self.spaces.get(b).is_some_and(|s| s.husk)) {
            self.reap(before);
        }
    }

    /// Page table entries of a space were dropped: no CPU goes on using them.
    pub fn shoot_down(&mut self, space: Id<Space>) {
        for cpu in 0..self.cpus.len() as u32 {
            if self.cpus[cpu as usize].loaded == Some(space) {
                self.cpus[cpu as usize].flush = true;
                if cpu != self.cpu_number() {
                    self.await_kernel(cpu);
                }
            }
        }
    }
}
