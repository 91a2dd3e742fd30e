//! Places where a vCPU pauses by itself.

use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    kvm_guest_debug,
};
use kvm_ioctls::VcpuFd;

use crate::count::SWAPGS_IRETQ;
use crate::error::Error;
use crate::memory::Memory;
use crate::paging::read_virtual;

/// Steps without interrupts: what one saves of the flags would still have KVM's trap flag.
const SINGLE_STEP: u32 = KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ;

/// Where a vCPU is to pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// After so many instructions, at least 1, without interrupts and at CPL 0: a vCPU pauses before it
    /// comes to a program, short of the point.
    Steps(u32),
    /// Before the instruction at this virtual address, when it is next come to. Needs breakpoints,
    /// see `flukevm doctor`.
    Address(u64),
    /// When the kernel reports that the first user-mode instruction is about to run.
    FirstUser,
}

/// How far a vCPU is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// At the point.
    There,
    /// Not yet.
    Further,
    /// At user code. It is not stepped through: not every host can, and what a trap saves of its flags
    /// would still have the trap flag, which the program would come to notice.
    Barred,
}

/// A vCPU on its way to a point.
pub struct Way {
    point: Point,
    /// Steps to go; the first one from a breakpoint only leaves it.
    steps: u32,
}

impl Way {
    /// Sets a vCPU on the way; none if it is barred at once.
    ///
    /// # Errors
    /// If the host cannot stop a guest.
    pub fn start(fd: &VcpuFd, memory: &Memory, point: Point) -> Result<Option<Self>, Error> {
        let steps = match point {
            Point::Steps(_) if is_barred(fd, memory)? => return Ok(None),
            Point::Steps(steps) => steps.max(1),
            // Nothing to step off.
            Point::Address(address) if is_barred(fd, memory)? => {
                debug(fd, KVM_GUESTDBG_USE_HW_BP, Some(address))?;
                0
            }
            Point::Address(_) => 1,
            Point::FirstUser => 0,
        };
        if steps > 0 {
            debug(fd, SINGLE_STEP, None)?;
        }
        Ok(Some(Self { point, steps }))
    }

    /// After a debug exit: how far the vCPU is.
    ///
    /// # Errors
    /// If the host cannot stop a guest.
    pub fn stopped(&mut self, fd: &VcpuFd, memory: &Memory) -> Result<Progress, Error> {
        self.steps = self.steps.saturating_sub(1);
        match self.point {
            Point::Steps(_) if self.steps == 0 => Ok(Progress::There),
            Point::Steps(_) if is_barred(fd, memory)? => Ok(Progress::Barred),
            Point::Address(address) => {
                let regs = fd.get_regs().map_err(Error::kvm("reading registers"))?;
                if regs.rip == address {
                    return Ok(Progress::There);
                }
                debug(fd, KVM_GUESTDBG_USE_HW_BP, Some(address))?;
                Ok(Progress::Further)
            }
            Point::Steps(_) | Point::FirstUser => Ok(Progress::Further),
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

/// Whether the next instruction is user code's, or the way there.
fn is_barred(fd: &VcpuFd, memory: &Memory) -> Result<bool, Error> {
    let regs = fd.get_regs().map_err(Error::kvm("reading registers"))?;
    let sregs = fd.get_sregs();
    let sregs = sregs.map_err(Error::kvm("reading segment registers"))?;
    let read = |va, size| read_virtual(memory, sregs.cr3, va, size);
    let code = read(regs.rip, SWAPGS_IRETQ.len());
    let iretq = code.starts_with(&SWAPGS_IRETQ[3..]);
    let selector = || read(regs.rsp.wrapping_add(8), 1).first().copied();
    Ok(sregs.cs.dpl != 0
        || code == SWAPGS_IRETQ
        || iretq && selector().is_none_or(|cs| cs & 3 != 0))
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
