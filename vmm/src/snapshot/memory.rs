//! Which pages a machine has written to since it was like a snapshot.
//!
//! KVM logs the writes of the guest and its own; `vm-memory` those of this process.

use std::ops::Range;

use fluke_abi::layout::PAGE_SIZE;
use kvm_ioctls::VmFd;

use crate::error::Error;
use crate::kvm;
use crate::memory::Memory;

/// Contents of a page.
type Page = [u8; PAGE_SIZE as usize];

/// A page of zeros.
pub(super) const ZERO: Page = [0; PAGE_SIZE as usize];

/// The log of a machine's memory.
#[derive(Debug, Default)]
pub struct MemoryLog {
    /// Memory of the snapshot that the machine's differs from by the pages logged. Without one
    /// nothing is logged.
    base: Option<Memory>,
    /// Bits of pages that were taken out of KVM's log already.
    taken: Vec<u64>,
}

impl MemoryLog {
    /// The log of memory that has just been mapped copy on write from a snapshot's.
    pub fn of(base: Memory) -> Self {
        Self {
            base: Some(base),
            taken: Vec::new(),
        }
    }

    /// Whether KVM is to log.
    pub fn is_on(&self) -> bool {
        self.base.is_some()
    }

    /// Copies the memory of a paused machine, and logs from there.
    ///
    /// # Errors
    /// If the host or KVM refuses.
    pub fn freeze(&mut self, vm: &VmFd, memory: &Memory) -> Result<Memory, Error> {
        let copy = Memory::new(memory.size())?;
        for run in self.in_use(vm, memory)? {
            for page in used_pages(memory, run) {
                let (at, bytes) = page?;
                copy.write(at, &bytes)?;
            }
        }
        self.restart(vm, memory, &copy)?;
        Ok(copy)
    }

    /// Makes the memory of a paused machine that of a snapshot again, and logs from there.
    ///
    /// # Errors
    /// If the host or KVM refuses.
    pub fn thaw(&mut self, vm: &VmFd, memory: &Memory, to: &Memory) -> Result<(), Error> {
        let runs = match self.base.clone() {
            Some(base) if base.is(to) => self.written(vm, memory)?,
            _ => [self.in_use(vm, memory)?, to.extents()?].concat(),
        };
        for run in runs {
            memory.copy_from(to, run)?;
        }
        self.restart(vm, memory, to)
    }

    /// Runs of pages that may be other than zero.
    fn in_use(&mut self, vm: &VmFd, memory: &Memory) -> Result<Vec<Range<u64>>, Error> {
        match self.base.clone() {
            Some(base) => Ok([base.extents()?, self.written(vm, memory)?].concat()),
            None => memory.extents(),
        }
    }

    /// Runs of pages that the guest, KVM or this process has written to since the snapshot.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn written(&mut self, vm: &VmFd, memory: &Memory) -> Result<Vec<Range<u64>>, Error> {
        let log = kvm::take_dirty_log(vm, memory)?;
        self.taken.resize(log.len(), 0);
        let own = memory.take_written();
        for ((word, kvm), own) in self.taken.iter_mut().zip(log).zip(own) {
            *word |= kvm | own;
        }
        Ok(runs(&self.taken))
    }

    fn restart(&mut self, vm: &VmFd, memory: &Memory, base: &Memory) -> Result<(), Error> {
        if self.base.is_none() {
            kvm::set_memory(vm, memory, true)?;
        }
        self.base = Some(base.clone());
        self.taken.clear();
        // What was copied in here is no difference.
        memory.take_written();
        Ok(())
    }
}

/// Runs of pages whose bits are set: physical addresses.
fn runs(log: &[u64]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for (first, mut word) in (0..).step_by(64).zip(log.iter().copied()) {
        while word != 0 {
            let start = (first + u64::from(word.trailing_zeros())) * PAGE_SIZE;
            word &= word - 1;
            match runs.last_mut() {
                Some(run) if run.end == start => run.end += PAGE_SIZE,
                _ => runs.push(start..start + PAGE_SIZE),
            }
        }
    }
    runs
}

/// The pages of a run that are not zero, with their addresses.
pub(super) fn used_pages(
    memory: &Memory,
    run: Range<u64>,
) -> impl Iterator<Item = Result<(u64, Page), Error>> {
    let pages = run.step_by(PAGE_SIZE as usize).map(|at| {
        let mut page = ZERO;
        memory.read(at, &mut page).map(|()| (at, page))
    });
    pages.filter(|page| page.as_ref().map_or(true, |(_, bytes)| *bytes != ZERO))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_the_pages_whose_bits_are_set(log in prop::collection::vec(
            prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..8)) {
            let mut seen = vec![0; log.len()];
            let mut end = None;
            for run in runs(&log) {
                prop_assert!(run.start < run.end && end != Some(run.start));
                end = Some(run.end);
                for page in (run.start / PAGE_SIZE)..(run.end / PAGE_SIZE) {
                    seen[page as usize / 64] |= 1 << (page % 64);
                }
            }
            prop_assert_eq!(seen, log);
        }
    }
}
