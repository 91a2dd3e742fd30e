//! Images as loaders see them.

use std::io::Cursor;

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::GuestAddress;

use super::*;
use crate::config::{Configuration, MIB, Model, Preempt};
use crate::image::embedded;

/// The loader is that of Firecracker and Cloud Hypervisor.
#[test]
fn a_loader_finds_the_entrance_and_the_memory() {
    // None is embedded with `FLUKEVM_GUESTS=skip`.
    if embedded().0.is_empty() {
        return;
    }
    for (model, preempt) in [
        (Model::Interrupt, Preempt::None),
        (Model::Process, Preempt::Full),
    ] {
        let configuration = Configuration::new(model, preempt).unwrap();
        let mut config = VmConfig::fluke(configuration, "hello", &[]).unwrap();
        config.memory = 16 * MIB;
        let bytes = image(&config).unwrap();
        let memory = Memory::new(16 * MIB).unwrap();
        let himem = Some(GuestAddress(TRAMPOLINE));
        let loaded = Elf::load(memory.map(), None, &mut Cursor::new(&bytes), himem).unwrap();
        assert_eq!(loaded.kernel_load, GuestAddress(TRAMPOLINE));
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            panic!("no PVH note");
        };
        assert_eq!(entry, GuestAddress(TRAMPOLINE));
        // Written again, it is the same: so all of it has arrived.
        assert!(elf::write(&memory, TRAMPOLINE).unwrap() == bytes);
    }
}

#[test]
fn other_machines_are_refused() {
    let flat = VmConfig::new(Guest::Flat(vec![0xf4]));
    assert!(matches!(image(&flat), Err(Error::Config(_))));
}
