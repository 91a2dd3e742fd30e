//! How the kernel reaches the memory of a thread: page by page, through the direct map.

use fluke_abi::layout::{KERNEL_IMAGE, PAGE_SIZE, VM_MAX};
use fluke_abi::probe::Probe;
use fluke_abi::state::Prot;

use super::{Fault, Space, page_table};
use crate::arch::memory;
use crate::arena::Id;
use crate::kernel::Kernel;
use crate::probe::probe;
use crate::thread::Thread;

/// Bytes from `address` to the end of its page, at most `len`.
#[inline]
pub const fn within_page(address: u64, len: u64) -> u64 {
    let rest = PAGE_SIZE - address % PAGE_SIZE;
    if rest < len { rest } else { len }
}

impl Kernel {
    /// Physical address of a byte of a thread's memory. Soft faults are remedied on the way; an
    /// error is a hard fault, or an access that the thread does not have.
    #[inline]
    pub fn translate(&mut self, id: Id<Thread>, address: u64, access: Prot) -> Result<u64, Fault> {
        let nowhere = Fault {
            address,
            access,
            code: fluke_abi::code::Exception::PageFault,
            keeper: None,
            region_offset: 0,
            region_hash: 0,
        };
        let Some(space) = self.threads[id].space else {
            return Err(nowhere);
        };
        if address >= VM_MAX && !(address >= KERNEL_IMAGE && space == self.own_space) {
            return Err(nowhere);
        }
        let Some(table) = self.spaces.get(space).map(|space| space.page_table) else {
            return Err(nowhere);
        };
        match page_table::lookup(table, address, access) {
            Some(physical) => Ok(physical),
            None => self.soft_fault(id, space, address, access),
        }
    }

    fn soft_fault(
        &mut self,
        id: Id<Thread>,
        space: Id<Space>,
        address: u64,
        access: Prot,
    ) -> Result<u64, Fault> {
        let physical = self.fill(space, address, access)?;
        probe::<{ Probe::SoftFault as usize }>(|| (&self.threads[id], address));
        Ok(physical)
    }

    /// Copies bytes out of a thread's memory.
    pub fn copy_in(
        &mut self,
        id: Id<Thread>,
        mut address: u64,
        mut to: &mut [u8],
    ) -> Result<(), Fault> {
        while !to.is_empty() {
            let physical = self.translate(id, address, Prot::READ)?;
            let len = within_page(address, to.len() as u64);
            let (now, rest) = to.split_at_mut(len as usize);
            memory::copy_from(physical, now);
            (address, to) = (address.wrapping_add(len), rest);
        }
        Ok(())
    }

    /// Copies bytes into a thread's memory.
    pub fn copy_out(
        &mut self,
        id: Id<Thread>,
        mut from: &[u8],
        mut address: u64,
    ) -> Result<(), Fault> {
        while !from.is_empty() {
            let physical = self.translate(id, address, Prot::WRITE)?;
            let len = within_page(address, from.len() as u64);
            let (now, rest) = from.split_at(len as usize);
            memory::copy_to(now, physical);
            (address, from) = (address.wrapping_add(len), rest);
        }
        Ok(())
    }
}
