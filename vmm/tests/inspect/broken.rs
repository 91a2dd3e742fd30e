//! A machine whose kernel state is overwritten at random: views may refuse, and must say something.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use fluke_abi::layout::{DIRECT_MAP, KERNEL_IMAGE};
use flukevm::error::Error;
use flukevm::image;
use flukevm::inspect::types::Types;
use flukevm::inspect::value::Guest;
use flukevm::inspect::{Machine, look};
use flukevm::paging::Physical;
use flukevm::vcpu::Registers;
use proptest::prelude::*;

use super::{configurations, image_of, paused, views};

/// A machine as it was at a moment.
struct Taken {
    memory: Vec<u8>,
    vcpus: Vec<Option<Registers>>,
    kernel: &'static str,
    /// Where the kernel keeps what views read: physical address and bytes.
    interesting: Vec<(u64, u64)>,
}

/// Its memory, with words of it replaced.
struct Broken<'a> {
    taken: &'a Taken,
    words: Vec<(u64, u64)>,
}

impl Physical for Broken<'_> {
    fn read(&self, pa: u64, data: &mut [u8]) -> Result<(), Error> {
        let outside = || Error::Memory(format!("nothing at {pa:#x}"));
        let start = usize::try_from(pa).map_err(|_| outside())?;
        let end = start.checked_add(data.len()).ok_or_else(outside)?;
        data.copy_from_slice(self.taken.memory.get(start..end).ok_or_else(outside)?);
        for (at, word) in &self.words {
            for (byte, at) in word.to_le_bytes().into_iter().zip(*at..) {
                if let Some(place) = at.checked_sub(pa).and_then(|i| data.get_mut(i as usize)) {
                    *place = byte;
                }
            }
        }
        Ok(())
    }
}

fn take() -> Vec<Taken> {
    let take = |kernel| {
        let mut vm = paused(kernel, 2, "stress", Duration::from_millis(1200));
        let mut memory = vec![0; 16 << 20];
        vm.memory().read(0, &mut memory).unwrap();
        let vcpus: Vec<_> = (0..2).map(|id| vm.registers(id)).collect();
        let kernel = image_of(kernel);
        let types = Types::new(image::kernel(kernel).unwrap()).unwrap();
        let root = vcpus[0].unwrap().special.cr3;
        let guest = Guest {
            types: &types,
            memory: vm.memory(),
        };
        let locked = guest.find_static("fluke_kernel::lock::LOCKED").unwrap();
        let size = locked.ty().unwrap().size;
        let mut interesting = vec![(locked.address - KERNEL_IMAGE, size), (root, 4096)];
        let state = |name: &str| {
            let value = locked.field(name).unwrap().field("value").unwrap();
            value.option().unwrap().unwrap()
        };
        for arena in [
            "threads", "spaces", "regions", "mappings", "ports", "mutexes", "refs",
        ] {
            let slots = state("kernel")
                .field(arena)
                .unwrap()
                .field("slots")
                .unwrap();
            interesting.push((slots.deref().unwrap().address - DIRECT_MAP, 0x800));
        }
        let cpus = state("scheduler").field("cpus").unwrap();
        let (first, _) = cpus.elements().unwrap();
        interesting.push((first.address - DIRECT_MAP, 0x400));
        Taken {
            memory,
            vcpus,
            kernel,
            interesting,
        }
    };
    configurations().into_iter().map(take).collect()
}

fn machines() -> &'static [Taken] {
    static MACHINES: OnceLock<Vec<Taken>> = OnceLock::new();
    MACHINES.get_or_init(take)
}

/// A word that could lead somewhere, or nowhere.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0u64..64,
        (0u64..8).prop_map(|n| n << 32 | n),
        (0u64..16 << 20).prop_map(|pa| DIRECT_MAP + pa),
        (0u64..16 << 8).prop_map(|page| page << 12 | 0x67),
        Just(u64::MAX),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn no_overwritten_kernel_breaks_a_view(
        machine in 0usize..3,
        view in 0usize..15,
        words in prop::collection::vec((any::<u16>(), any::<u32>(), word()), 1..12),
    ) {
        let Some(taken) = machines().get(machine) else { return Ok(()) };
        let place = |area: u16, offset: u32| {
            let (start, size) = taken.interesting[area as usize % taken.interesting.len()];
            start + u64::from(offset) % (size / 4) * 4
        };
        let words = words.into_iter().map(|(area, offset, word)| (place(area, offset), word));
        let memory = Broken { taken, words: words.collect() };
        let image = image::kernel(taken.kernel).unwrap();
        let machine = Machine { memory: &memory, vcpus: taken.vcpus.clone(), image };
        let started = Instant::now();
        match look(&machine, &views()[view]) {
            Ok(report) => prop_assert!(!report.json.is_null()),
            Err(error) => prop_assert!(!error.to_string().contains('\n')),
        }
        prop_assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    }
}
