//! What stops a vCPU that a debugger runs: up to four places in its debug registers, and single steps.
//!
//! Only the kernel is stepped through, without interrupts ([`crate::point`] says why). What lies between the
//! kernel's instructions, be it user code or `hlt`, is one step, which ends where the kernel goes on.

use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    kvm_guest_debug, kvm_regs,
};
use kvm_ioctls::VcpuFd;

use crate::error::Error;

/// Debug registers of a CPU that hold addresses.
pub const DEBUG_REGISTERS: usize = 4;

/// RFLAGS.RF: no breakpoint before the next instruction.
const RESUME_FLAG: u64 = 1 << 16;

/// What an access must be to stop a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The instruction there is about to be executed.
    Execute,
    /// A write has been made.
    Write,
    /// A read or a write has been made.
    ReadWrite,
}

/// What a debug register watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watched {
    /// Virtual address, a multiple of the size.
    pub address: u64,
    /// Bytes: 1, 2, 4 or 8; 1 to execute.
    pub size: u8,
    /// Which accesses.
    pub access: Access,
}

impl Watched {
    /// The instruction at an address.
    pub fn instruction(address: u64) -> Self {
        Self {
            address,
            size: 1,
            access: Access::Execute,
        }
    }

    /// Its bits of DR7, without those that say whose they are (SDM vol. 3, 19.2.4).
    fn control(&self) -> u64 {
        let access = match self.access {
            Access::Execute => 0,
            Access::Write => 1,
            Access::ReadWrite => 3,
        };
        let size = match self.size {
            2 => 1,
            4 => 3,
            8 => 2,
            _ => 0,
        };
        size << 2 | access
    }
}

/// By the numbers of the debug registers.
pub type DebugRegisters = [Option<Watched>; DEBUG_REGISTERS];

/// What stops a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stops {
    /// The first of these.
    Watched(DebugRegisters),
    /// One instruction of the kernel; anything else is over at the first of these.
    Step(DebugRegisters),
}

impl Stops {
    /// Arms a vCPU, which is between two instructions. `barred`: the next one must not be stepped through.
    /// Returns whether it is stepped.
    ///
    /// # Errors
    /// If the host cannot stop a guest.
    pub fn start(&self, fd: &VcpuFd, barred: bool, halted: bool) -> Result<bool, Error> {
        let watched = match self {
            Self::Step(_) if !barred && !halted => return step(fd),
            Self::Step(ends) => return arm(fd, ends),
            Self::Watched(watched) => watched,
        };
        let mut regs = fd.get_regs().map_err(Error::kvm("reading registers"))?;
        // One that is halted has yet to come to its next instruction.
        if halted || !is_at(watched, regs.rip) {
            return arm(fd, watched);
        }
        if !barred {
            return step(fd);
        }
        regs = kvm_regs {
            rflags: regs.rflags | RESUME_FLAG,
            ..regs
        };
        fd.set_regs(&regs)
            .map_err(Error::kvm("setting registers"))?;
        arm(fd, watched)
    }

    /// After a debug exit: whether that is the stop. `stepped`: the vCPU was stepped.
    ///
    /// # Errors
    /// If the host cannot stop a guest.
    pub fn stopped(&self, fd: &VcpuFd, stepped: bool) -> Result<bool, Error> {
        match self {
            // It has only stepped off the place where it was.
            Self::Watched(watched) if stepped => arm(fd, watched).map(|_| false),
            _ => Ok(true),
        }
    }
}

/// Whether a vCPU at an instruction is at one of the places.
pub fn is_at(watched: &DebugRegisters, rip: u64) -> bool {
    watched.contains(&Some(Watched::instruction(rip)))
}

fn step(fd: &VcpuFd) -> Result<bool, Error> {
    let how = KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ;
    set(fd, how, &DebugRegisters::default()).map(|()| true)
}

fn arm(fd: &VcpuFd, watched: &DebugRegisters) -> Result<bool, Error> {
    set(fd, KVM_GUESTDBG_USE_HW_BP, watched).map(|()| false)
}

fn set(fd: &VcpuFd, how: u32, watched: &DebugRegisters) -> Result<(), Error> {
    let mut debug = kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | how,
        ..Default::default()
    };
    // Bit 10 is always set.
    debug.arch.debugreg[7] = 0x400;
    for (number, watched) in watched.iter().enumerate() {
        if let Some(watched) = watched {
            debug.arch.debugreg[number] = watched.address;
            debug.arch.debugreg[7] |= 2 << (2 * number) | watched.control() << (16 + 4 * number);
        }
    }
    fd.set_guest_debug(&debug)
        .map_err(Error::kvm("stopping the guest for a debugger"))
}
