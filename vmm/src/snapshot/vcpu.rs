//! All that KVM holds of a vCPU, in the order in which it must be taken and put back.
//!
//! * The run state is taken first: asking for it makes KVM deliver what is pending for the APIC.
//! * The APIC's mode is in the segment registers, so the APIC is put back after them; the kind of
//!   its timer is in the APIC, so the deadline among the MSRs is put back after it.
//! * Putting back the general registers drops a pending exception, so events come later.
//! * The time-stamp counter is put back before anything that counts from it.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, Msrs, kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::tsc::{Moment, Tsc};
use crate::error::Error;
use crate::kvm;
use crate::vcpu::Registers;

const MSR_TSC: u32 = 0x10;
/// Most MSRs that KVM takes at once.
const MSRS_AT_ONCE: usize = 256;

/// State of a vCPU between two instructions.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    run_state: kvm_mp_state,
    general: kvm_regs,
    special: kvm_sregs,
    vector: kvm_xsave,
    /// None where the CPU has no XSAVE.
    extended: Option<kvm_xcrs>,
    debug: kvm_debugregs,
    apic: kvm_lapic_state,
    /// The time-stamp counter.
    pub tsc: Tsc,
    /// All that KVM can read, but for the time-stamp counter.
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Its registers.
    pub fn registers(&self) -> Registers {
        Registers {
            general: self.general,
            special: self.special,
            float: kvm_fpu::default(),
            halted: self.run_state.mp_state == KVM_MP_STATE_HALTED,
        }
    }

    /// Takes the state of a vCPU that has completed its last access; `msrs` are the indices that
    /// KVM lists.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn save(fd: &VcpuFd, msrs: &[u32]) -> Result<Self, Error> {
        Ok(Self {
            run_state: fd
                .get_mp_state()
                .map_err(Error::kvm("reading the run state"))?,
            general: fd.get_regs().map_err(Error::kvm("reading registers"))?,
            special: fd
                .get_sregs()
                .map_err(Error::kvm("reading segment registers"))?,
            vector: fd
                .get_xsave()
                .map_err(Error::kvm("reading vector registers"))?,
            extended: fd.get_xcrs().ok(),
            debug: fd
                .get_debug_regs()
                .map_err(Error::kvm("reading debug registers"))?,
            apic: fd
                .get_lapic()
                .map_err(Error::kvm("reading the local APIC"))?,
            tsc: Tsc::save(fd)?,
            msrs: read_msrs(fd, msrs)?,
            events: fd
                .get_vcpu_events()
                .map_err(Error::kvm("reading pending events"))?,
        })
    }

    /// Gives the state to a vCPU whose CPUID is that of the one it was taken from. What fails
    /// leaves a vCPU that cannot be used.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn restore(&self, fd: &VcpuFd, moment: &Moment) -> Result<(), Error> {
        fd.set_mp_state(self.run_state)
            .map_err(Error::kvm("setting the run state"))?;
        fd.set_regs(&self.general)
            .map_err(Error::kvm("setting registers"))?;
        kvm::set_and_flush(fd, &self.special)?;
        if let Some(extended) = &self.extended {
            fd.set_xcrs(extended)
                .map_err(Error::kvm("setting extended control registers"))?;
        }
        // SAFETY: this process asks for no feature whose state needs more than the structure.
        unsafe { fd.set_xsave(&self.vector) }.map_err(Error::kvm("setting vector registers"))?;
        fd.set_debug_regs(&self.debug)
            .map_err(Error::kvm("setting debug registers"))?;
        self.tsc.restore(fd, moment)?;
        fd.set_lapic(&self.apic)
            .map_err(Error::kvm("setting the local APIC"))?;
        self.restore_msrs(fd)?;
        fd.set_vcpu_events(&self.events)
            .map_err(Error::kvm("setting pending events"))
    }

    /// Sets the MSRs that have other values now. Most never change, and some cannot be set.
    fn restore_msrs(&self, fd: &VcpuFd) -> Result<(), Error> {
        let indices: Vec<u32> = self.msrs.iter().map(|msr| msr.index).collect();
        let mut now = read_msrs(fd, &indices)?.into_iter().peekable();
        let changed: Vec<_> = self
            .msrs
            .iter()
            .filter(|msr| {
                let old = now.next_if(|old| old.index == msr.index);
                old.is_none_or(|old| old.data != msr.data)
            })
            .copied()
            .collect();
        for some in changed.chunks(MSRS_AT_ONCE) {
            let set = fd
                .set_msrs(&list(some)?)
                .map_err(Error::kvm("setting MSRs"))?;
            if let Some(refused) = some.get(set) {
                return Err(Error::Config(format!(
                    "KVM on this host does not set MSR {:#x} to {:#x}",
                    refused.index, refused.data
                )));
            }
        }
        Ok(())
    }
}

/// Reads MSRs, without those that cannot be read.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let wanted = indices.iter().filter(|index| **index != MSR_TSC);
    let entries: Vec<_> = wanted
        .map(|index| kvm_msr_entry {
            index: *index,
            ..Default::default()
        })
        .collect();
    let mut found = Vec::with_capacity(entries.len());
    let mut left = &entries[..];
    while !left.is_empty() {
        let mut some = list(&left[..left.len().min(MSRS_AT_ONCE)])?;
        let asked = some.as_slice().len();
        let read = fd.get_msrs(&mut some).map_err(Error::kvm("reading MSRs"))?;
        found.extend_from_slice(&some.as_slice()[..read]);
        // KVM stops at the first that it cannot read.
        left = &left[if read < asked { read + 1 } else { read }..];
    }
    Ok(found)
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    Msrs::from_entries(entries).map_err(|e| Error::Host {
        what: "making a list of MSRs",
        source: std::io::Error::other(format!("{e:?}")),
    })
}
