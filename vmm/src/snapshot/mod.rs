//! Snapshots of whole machines: taken while all vCPUs are paused, given back to the same machine
//! ([`Vm::reset`]) or to a new one ([`crate::config::Guest::Snapshot`]), in memory or on disk.
//!
//! * `vcpu`, `tsc`: what KVM holds of a vCPU.
//! * `memory`: which pages a machine has written to.
//! * `disk`: a directory that holds a snapshot.
//! * `plan`: saving a machine while it runs.
//!
//! What belongs to the host is not part of it: statistics, console output that has been written,
//! the time of the first user-mode instruction.

pub mod disk;
pub(crate) mod memory;
pub mod plan;
pub(crate) mod tsc;
pub(crate) mod vcpu;

use std::sync::Arc;

use fluke_abi::boot::Gate;
use fluke_abi::layout::PAGE_SIZE;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::config::Configuration;
use crate::devices::DevicesState;
use crate::doctor;
use crate::error::Error;
use crate::inspect::{self, Machine, View};
use crate::kvm::{self, Processor};
use crate::memory::Memory;
use crate::vcpu::{Command, Image, Report, Restored};
use crate::vm::{Kind, Vm};
use tsc::Moment;
use vcpu::VcpuState;

/// A machine between two instructions of every vCPU. Clones share it.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub(crate) machine: Arc<MachineState>,
    pub(crate) vcpus: Arc<Vec<VcpuState>>,
    /// Nobody writes to it.
    pub(crate) memory: Memory,
    /// Kernel image, for symbols.
    pub(crate) image: Option<Image>,
}

/// What a machine has once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct MachineState {
    pub kind: Kind,
    /// Interrupt controllers of the machine.
    chips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
    devices: DevicesState,
}

impl Snapshot {
    /// Number of vCPUs.
    pub fn vcpus(&self) -> u32 {
        self.vcpus.len() as u32
    }

    /// Memory, bytes.
    pub fn memory_size(&self) -> u64 {
        self.memory.size()
    }

    /// Configuration of the kernel, if it is ours.
    pub fn configuration(&self) -> Option<Configuration> {
        self.machine.kind.configuration
    }

    /// Looks into the machine as it was saved.
    ///
    /// # Errors
    /// If it runs no kernel that can be looked into, or there is no such thing to see.
    pub fn inspect(&self, view: &View) -> inspect::Result<inspect::Report> {
        let image = self.image.as_ref().ok_or(inspect::Error::NoKernel)?;
        let machine = Machine {
            memory: &self.memory,
            vcpus: self
                .vcpus
                .iter()
                .map(|vcpu| Some(vcpu.registers()))
                .collect(),
            image,
        };
        inspect::look(&machine, view)
    }

    /// Sees that this host can run the machine.
    ///
    /// # Errors
    /// If it cannot; the text says what it lacks.
    pub(crate) fn check_host(&self, host: &Processor) -> Result<(), Error> {
        if self.machine.kind.needs_syscall && doctor::gate()? != Gate::Syscall {
            return Err(Error::Config(
                "the machine traps by `syscall`, which does not enter the kernel on this host; \
                 resume it on a host whose trap gate is syscall, see `flukevm doctor`"
                    .into(),
            ));
        }
        match host.lacks(&self.machine.kind.processor) {
            None => Ok(()),
            Some(leaf) => Err(Error::Config(format!(
                "the machine uses features of CPUID leaf {leaf:#x} that this host lacks; resume it \
                 on a host with the CPU it was made on, or a later one"
            ))),
        }
    }
}

impl Vm {
    /// Pauses the machine and takes a snapshot. From then on KVM logs which pages are written to.
    ///
    /// # Errors
    /// If the machine has stopped, counts instructions, or KVM refuses.
    pub fn snapshot(&mut self) -> Result<Snapshot, Error> {
        if self.counts.is_some() {
            return Err(Error::Config(
                "a machine whose instructions are counted cannot be saved; leave --count out"
                    .into(),
            ));
        }
        self.pause().map_err(|stop| {
            Error::Config(format!(
                "a machine that has stopped cannot be saved: {stop}"
            ))
        })?;
        self.send(&Command::Save);
        let vcpus = self.answers(|report| match report {
            Report::Saved(state) => Some(state.map(|state| *state)),
            _ => None,
        })?;
        let machine = MachineState {
            kind: self.kind.clone(),
            chips: chips(&self.fd)?,
            clock: self
                .fd
                .get_clock()
                .map_err(Error::kvm("reading the clock"))?,
            devices: self.devices.save(),
        };
        let memory = self.memory_log.freeze(&self.fd, &self.memory)?;
        Ok(Snapshot {
            machine: Arc::new(machine),
            vcpus: Arc::new(vcpus),
            memory,
            image: self.image.clone(),
        })
    }

    /// Pages, by physical address, that the paused machine has written to since the snapshot that was last
    /// taken or put back.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn written(&mut self) -> Result<impl Iterator<Item = u64> + use<>, Error> {
        let runs = self.memory_log.written(&self.fd, &self.memory)?;
        Ok(runs
            .into_iter()
            .flat_map(|run| run.step_by(PAGE_SIZE as usize)))
    }

    /// Puts the machine back to a snapshot of itself, or of a machine made alike; it is paused then. A machine that has stopped can run again. Of
    /// memory only the pages written to since the snapshot are copied, if it was the last one
    /// taken or put back.
    ///
    /// # Errors
    /// If the machines differ or KVM refuses.
    pub fn reset(&mut self, to: &Snapshot) -> Result<(), Error> {
        if (to.vcpus(), to.memory_size()) != (self.vcpus.len() as u32, self.memory.size()) {
            return Err(Error::Config(
                "the snapshot is of a machine with other vCPUs or memory".into(),
            ));
        }
        // One that has stopped does not run either.
        let _ = self.pause();
        self.forget_calls();
        self.memory_log.thaw(&self.fd, &self.memory, &to.memory)?;
        // While the vCPUs take their state, the rest of the machine is put back.
        self.send(&Command::Restore(Arc::new(Restored {
            vcpus: to.vcpus.clone(),
            moment: Moment::new(to.vcpus.iter().map(|vcpu| vcpu.tsc)),
        })));
        self.restore_machine(&to.machine)?;
        self.answers(|report| match report {
            Report::Restored => Some(Ok(())),
            _ => None,
        })?;
        self.control.start_over();
        Ok(())
    }

    fn restore_machine(&self, machine: &MachineState) -> Result<(), Error> {
        if doctor::shadows_page_tables()? {
            kvm::forget_page_tables(&self.fd, &self.memory)?;
        }
        for chip in &machine.chips {
            self.fd
                .set_irqchip(chip)
                .map_err(Error::kvm("setting an interrupt controller"))?;
        }
        let clock = kvm_clock_data {
            // Flags ask for the time that has passed to be added.
            flags: 0,
            ..machine.clock
        };
        self.fd
            .set_clock(&clock)
            .map_err(Error::kvm("setting the clock"))?;
        self.devices.restore(&machine.devices);
        Ok(())
    }
}

fn chips(vm: &VmFd) -> Result<Vec<kvm_irqchip>, Error> {
    [
        KVM_IRQCHIP_PIC_MASTER,
        KVM_IRQCHIP_PIC_SLAVE,
        KVM_IRQCHIP_IOAPIC,
    ]
    .map(|chip_id| {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip)
            .map_err(Error::kvm("reading an interrupt controller"))?;
        Ok(chip)
    })
    .into_iter()
    .collect()
}
