//! Places where a vCPU pauses by itself.

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug,
};
use kvm_ioctls::VcpuFd;

use crate::error::Error;

/// Where a vCPU is to pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// After so many instructions, at least 1, at CPL 0: hosts need not step through programs.
    Steps(u32),
    /// Before the instruction at this virtual address, when it is next come to. Needs breakpoints,
    /// see `flukevm doctor`.
    Address(u64),
    /// When the kernel reports that the first user-mode instruction is about to run.
    FirstUser,
}

/// A vCPU on its way to a point.
pub struct Way {
    point: Point,
    /// Steps to go; the first one from a breakpoint only leaves it.
    steps: u32,
}

impl Way {
    /// Sets a vCPU on the way.
    ///
    /// # Errors
    /// If the host cannot stop a guest.
    pub fn start(fd: &VcpuFd, point: Point) -> Result<Self, Error> {
        let steps = match point {
            Point::Steps(steps) => steps.max(1),
            Point::Address(_) => 1,
            Point::FirstUser => 0,
        };
        if steps > 0 {
            debug(fd, KVM_GUESTDBG_SINGLESTEP, None)?;
        }
        Ok(Self { point, steps })
    }

    /// After a debug exit: whether this is the point.
    ///
    /// # Errors
    /// If the host cannot stop a guest.
    pub fn stopped(&mut self, fd: &VcpuFd) -> Result<bool, Error> {
        self.steps = self.steps.saturating_sub(1);
        match self.point {
            Point::Steps(_) => Ok(self.steps == 0),
            Point::Address(address) => {
                let regs = fd.get_regs().map_err(Error::kvm("reading registers"))?;
                if regs.rip == address {
                    return Ok(true);
                }
                debug(fd, KVM_GUESTDBG_USE_HW_BP, Some(address))?;
                Ok(false)
            }
            Point::FirstUser => Ok(false),
        }
    }

    /// Whether the kernel's report of its first user-mode instruction is the point.
    pub fn ends_at_first_user(&self) -> bool {
        self.point == Point::FirstUser
    }

    /// Takes a vCPU off the way.
    pub fn end(self, fd: &VcpuFd) {
        // Refused, it stops once more, and goes on.
        let _ = fd.set_guest_debug(&kvm_guest_debug::default());
    }
}

fn debug(fd: &VcpuFd, how: u32, address: Option<u64>) -> Result<(), Error> {
    const GLOBAL_0_ON_EXECUTION: u64 = 0x402;
    let mut debug = kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | how,
        ..Default::default()
    };
    if let Some(address) = address {
        debug.arch.debugreg[0] = address;
        debug.arch.debugreg[7] = GLOBAL_0_ON_EXECUTION;
    }
    fd.set_guest_debug(&debug)
        .map_err(Error::kvm("stopping the guest at a point"))
}
