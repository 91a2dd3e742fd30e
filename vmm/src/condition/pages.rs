//! Pages that are watched for writes: the guest has them to read only, so that each write leaves the guest.

use std::collections::BTreeSet;

use fluke_abi::layout::PAGE_SIZE;

use crate::error::Error;
use crate::kvm::{self, Part};
use crate::vm::Vm;

/// How the memory of a machine is divided; not at all if there are no parts.
#[derive(Debug, Default)]
pub struct Parts(Vec<Part>);

/// The parts of `size` bytes of memory in which these pages are by themselves.
fn divide(size: u64, pages: &BTreeSet<u64>) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut end = 0;
    for &page in pages {
        if end < page {
            parts.push((end..page, false));
        }
        end = page + PAGE_SIZE;
        parts.push((page..end, true));
    }
    if end < size {
        parts.push((end..size, false));
    }
    parts
}

impl Vm {
    /// Watches these pages, given by their addresses, and no others. The machine is paused.
    ///
    /// # Errors
    /// If KVM refuses.
    pub(super) fn watch_pages(&mut self, pages: &BTreeSet<u64>) -> Result<(), Error> {
        let logged = self.memory_log.is_on();
        let Self { fd, memory, .. } = self;
        let before = std::mem::take(&mut self.parts.0);
        if !before.is_empty() {
            kvm::join_memory(fd, memory, &before, logged)?;
        }
        if pages.is_empty() {
            return Ok(());
        }
        if logged {
            // KVM forgets it with the whole.
            memory.note_written(0, &kvm::take_dirty_log(fd, memory)?);
        }
        let parts = divide(memory.size(), pages);
        kvm::split_memory(fd, memory, &parts, logged)?;
        self.parts.0 = parts;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watched_pages_are_by_themselves_and_all_the_rest_is_there() {
        let pages = |pages: &[u64]| pages.iter().map(|page| page * PAGE_SIZE).collect();
        let parts = |size, of: &[u64]| {
            let parts = divide(size * PAGE_SIZE, &pages(of)).into_iter();
            let parts = parts.map(|(r, watched)| (r.start / PAGE_SIZE, r.end / PAGE_SIZE, watched));
            parts.collect::<Vec<_>>()
        };
        assert_eq!(parts(9, &[4]), [(0, 4, false), (4, 5, true), (5, 9, false)]);
        assert_eq!(
            parts(3, &[0, 1]),
            [(0, 1, true), (1, 2, true), (2, 3, false)]
        );
        assert_eq!(parts(2, &[1]), [(0, 1, false), (1, 2, true)]);
    }
}
