//! When a machine is in a state that it was in before: what comes of it is then known.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hasher};

use fluke_abi::layout::{KERNEL_STACKS, PAGE_SIZE};

use super::explorer::Explorer;
use crate::error::Error;
use crate::memory::Memory;
use crate::paging::translate;

impl Explorer {
    /// Digest of all that the paused machine is, but for times: registers, and memory as far as it is not that
    /// of the scene when it was set. `taken`: kernel stacks that have nothing on them are left out, which are the
    /// target's and the CPU's while a thread runs on its own.
    pub(super) fn digest(&mut self, taken: bool) -> Result<u128, Error> {
        let mut hashers = [(); 2].map(|()| DefaultHasher::new());
        let mut add = |bytes: &[u8]| hashers.iter_mut().for_each(|hasher| hasher.write(bytes));
        if let Some(registers) = self.vm.registers(0) {
            add(format!("{registers:x?}").as_bytes());
        }
        let mut pages = self.base.2.clone();
        pages.extend(self.vm.written()?);
        let dead = if taken { self.dead() } else { BTreeSet::new() };
        for at in pages.difference(&dead).copied() {
            let read = |memory: &Memory| -> Result<_, Error> {
                let mut page = [0; PAGE_SIZE as usize];
                memory.read(at, &mut page)?;
                Ok(page)
            };
            let mut page = read(self.vm.memory())?;
            for &time in self
                .marks
                .times
                .iter()
                .filter(|&&time| time & !(PAGE_SIZE - 1) == at)
            {
                let from = (time - at) as usize;
                page[from..from + 8].fill(0);
            }
            if page != read(&self.ready.memory)? {
                add(&at.to_le_bytes());
                add(&page);
            }
        }
        // Both hash the same; what comes after tells them apart.
        hashers[1].write(&[1]);
        let [first, second] = hashers.map(|hasher| u128::from(hasher.finish()));
        Ok(first << 64 | second)
    }

    /// Pages of the kernel stacks that have nothing on them, by physical address, once the target is stopped.
    fn dead(&mut self) -> BTreeSet<u64> {
        let Some((top, pointer)) = self.marks.stack else {
            return BTreeSet::new();
        };
        let Some(registers) = self.vm.registers(0) else {
            return BTreeSet::new();
        };
        let memory = self.vm.memory();
        let stopped = memory.get::<u64>(pointer).is_ok_and(|pointer| pointer == 0);
        let cpu = KERNEL_STACKS + 2 * self.stack_bytes;
        let tops = [Some(cpu), stopped.then_some(top)];
        let pages = tops.into_iter().flatten().flat_map(|top| {
            let pages = (top - self.stack_bytes..top).step_by(PAGE_SIZE as usize);
            pages.filter_map(|page| translate(memory, registers.special.cr3, page))
        });
        pages
            .map(|translation| translation.pa & !(PAGE_SIZE - 1))
            .collect()
    }
}
