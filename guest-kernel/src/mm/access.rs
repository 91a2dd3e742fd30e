//! How the kernel reaches the memory of a thread: page by page, through the direct map.

use fluke_abi::layout::{KERNEL_IMAGE, PAGE_SIZE, VM_MAX};
use fluke_abi::probe::Probe;
use fluke_abi::state::Prot;

use super::{Fault, Space, page_table};
use crate::arch::memory;
use crate::arena::Id;
use crate::call::Stop;
use crate::kernel::Kernel;
use crate::probe::probe;
use crate::thread::Thread;

/// Bytes from `address` to the end of its page, at most `len`.
#[inline]
pub const fn within_page(address: u64, len: u64) -> u64 {
    let rest = PAGE_SIZE - address % PAGE_SIZE;
    if rest < len { rest } else { len }
}

/// The memory of a thread.
#[derive(Clone, Copy)]
pub struct View {
    /// The thread.
    pub id: Id<Thread>,
    /// Its page table.
    pub table: u64,
}

/// Physical address of a byte in a page that a thread has in its page table.
#[inline]
pub fn mapped(view: View, address: u64, access: Prot) -> Option<u64> {
    page_table::lookup(view.table, address, access)
}

impl Kernel {
    /// Physical address of a byte of a thread's memory. Soft faults are remedied on the way;
    /// [`Stop::Fault`] is a hard fault, or an access that the thread does not have.
    #[inline]
    pub fn translate(&mut self, id: Id<Thread>, address: u64, access: Prot) -> Result<u64, Stop> {
        let view = self.view(id);
        self.translate_in(view, address, access)
    }

    /// The memory of a thread, for several accesses.
    #[inline]
    pub fn view(&self, id: Id<Thread>) -> View {
        self.view_of(&self.threads[id])
    }

    /// The memory of this thread.
    #[inline]
    pub fn view_of(&self, thread: &Thread) -> View {
        self.view_in(thread.id(), thread.space)
    }

    /// The memory of a thread in that space.
    #[inline]
    pub fn view_in(&self, id: Id<Thread>, space: Option<Id<Space>>) -> View {
        let space = space.and_then(|space| self.spaces.get(space));
        View {
            id,
            table: space.map_or(self.page_table, |space| space.page_table),
        }
    }

    /// As [`translate`](Self::translate).
    #[inline]
    pub fn translate_in(&mut self, view: View, address: u64, access: Prot) -> Result<u64, Stop> {
        match mapped(view, address, access) {
            Some(physical) => Ok(physical),
            None => self.fault_in(view.id, address, access),
        }
    }

    /// As [`translate`](Self::translate), for what is in no page table of a program's, as far as is known.
    #[inline(never)]
    pub fn fault_in(&mut self, id: Id<Thread>, address: u64, access: Prot) -> Result<u64, Stop> {
        let own = Fault::own(address, access);
        let found = match self.threads[id].space {
            Some(space) if address < VM_MAX => {
                let filled = self.fill(space, address, access);
                if filled.is_ok() {
                    probe::<{ Probe::SoftFault as usize }>(|| (&self.threads[id], address));
                }
                filled
            }
            Some(space) if address >= KERNEL_IMAGE && space == self.own_space => {
                page_table::lookup_in_kernel(self.view(id).table, address, access).ok_or(own)
            }
            _ => Err(own),
        };
        found.map_err(|fault| {
            self.fault = fault;
            Stop::Fault
        })
    }

    /// Copies bytes out of a thread's memory.
    pub fn copy_in(
        &mut self,
        id: Id<Thread>,
        mut address: u64,
        mut to: &mut [u8],
    ) -> Result<(), Stop> {
        let view = self.view(id);
        while !to.is_empty() {
            let physical = self.translate_in(view, address, Prot::READ)?;
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
    ) -> Result<(), Stop> {
        let view = self.view(id);
        while !from.is_empty() {
            let physical = self.translate_in(view, address, Prot::WRITE)?;
            let len = within_page(address, from.len() as u64);
            let (now, rest) = from.split_at(len as usize);
            memory::copy_to(now, physical);
            (address, from) = (address.wrapping_add(len), rest);
        }
        Ok(())
    }
}
