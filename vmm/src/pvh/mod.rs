//! Images for other VMMs: the machine that `flukevm run` would build, as one ELF kernel that whoever knows
//! PVH, Xen's direct boot ABI, can load and start.
//!
//! The host of the VMM lays out all memory here already ([`crate::boot`]), so the image is the pages that
//! are not zero, and a trampoline that brings a CPU from where PVH starts it to where the kernel does.
//! It is made for machines like this host's: the trap gate and the frequency of the time-stamp counter
//! are in it. One CPU is started.

pub mod command;
mod elf;
mod trampoline;

use crate::boot::TRAMPOLINE;
use crate::config::{Guest, VmConfig};
use crate::error::Error;
use crate::kvm::{self, Processor};
use crate::memory::Memory;
use crate::vm::{check_sizes, lay_out};

/// The image of a machine: the bytes of an ELF file.
///
/// # Errors
/// If the configuration is impossible, of more than one vCPU, or not of the Fluke kernel; or the host refuses.
pub fn image(config: &VmConfig) -> Result<Vec<u8>, Error> {
    check_sizes(config)?;
    if !matches!(config.guest, Guest::Fluke { .. }) {
        return Err(Error::Config(
            "only a machine with the Fluke kernel can be written as an image".into(),
        ));
    }
    if config.vcpus != 1 {
        return Err(Error::Config(format!(
            "an image starts one CPU, not {}; leave --vcpus out",
            config.vcpus
        )));
    }
    let kvm = kvm::open()?;
    let processor = Processor::new(&kvm)?;
    let memory = Memory::new(config.memory)?;
    let vm = kvm::create_vm(&kvm, &memory, 1, false)?;
    let vcpu = vm.create_vcpu(0).map_err(Error::kvm("creating a vCPU"))?;
    let tsc_khz = vcpu.get_tsc_khz().map_err(Error::kvm(
        "reading the frequency of the time-stamp counter",
    ))?;
    let (_, entrance, _) = lay_out(config, &memory, processor, tsc_khz)?;
    if let Some(entrance) = entrance {
        trampoline::write(&memory, &entrance)?;
    }
    elf::write(&memory, TRAMPOLINE)
}

#[cfg(test)]
mod tests;
