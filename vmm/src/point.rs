//! Places where a vCPU pauses by itself.

use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_MP_STATE_HALTED, kvm_guest_debug, kvm_regs,
};
use kvm_ioctls::VcpuFd;

use fluke_abi::boot::Gate;
use fluke_abi::layout::KERNEL_IMAGE;
use fluke_abi::port::Event;

use crate::condition::PLACES_MAX;
use crate::count::{GATE_VECTOR, HLT, SWAPGS_IRETQ, Ways, waits};
use crate::doctor;
use crate::error::Error;
use crate::memory::Memory;
use crate::paging::read_virtual;
use crate::stops::Stops;

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
    /// As `Address`, before any of several; or nowhere.
    Any {
        /// Virtual addresses.
        places: [Option<u64>; PLACES_MAX],
        /// Whether to pause at once at a place where the vCPU is already.
        stay: bool,
    },
    /// After so many instructions at CPL 0, whatever programs do in between, or at one of the places. Entering
    /// the kernel and leaving it are one instruction each.
    Instructions {
        /// How many, at least 1.
        count: u32,
        /// As in `Any`; but where the vCPU is already it does not pause.
        places: [Option<u64>; PLACES_MAX],
    },
    /// When the kernel reports that the first user-mode instruction is about to run.
    FirstUser,
    /// When a program tells of something, [`fluke_abi::port::Event::Told`].
    Told,
    /// The same. On the way all instructions at CPL 0 are executed one by one, with interrupts, and counted.
    ToldCounted,
    /// The same, and each of them is noted.
    ToldTraced,
    /// When an interrupt of that vector is taken, or a program tells of something.
    Interrupt(u8),
    /// At the end of a [`Slice`].
    Slice(Slice),
    /// After so many of the kernel's instructions in a [`MarkedCall`], which are executed one by one, like
    /// all at CPL 0; or when a program tells of something.
    Marked(MarkedCall, u64),
    /// Where a debugger wants it.
    Debugger(Stops),
}

impl Point {
    /// Whether on the way there the kernel is changed to stop a vCPU where it is entered: while only this one runs,
    /// and where no breakpoint stops the kernel. KVM that emulates it has them, and is not asked; asking takes a
    /// while, once in the life of the process.
    ///
    /// # Errors
    /// If there is no usable KVM.
    pub fn awaits_by_out(&self) -> Result<bool, Error> {
        let stepped = matches!(
            self,
            Self::Interrupt(_)
                | Self::ToldCounted
                | Self::ToldTraced
                | Self::Slice(_)
                | Self::Marked(..)
        );
        Ok(stepped && doctor::gate()? == Gate::Syscall && !doctor::probe()?.hardware_breakpoints)
    }
}

/// A share of the time of a machine whose vCPUs run in turn, as in a test of how they interleave. All
/// instructions at CPL 0 are executed one by one. It ends after so many of them, after so many of them in a
/// call, when a program tells of something, and where the CPU would only wait: for an interrupt or for
/// another CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Instructions at CPL 0.
    pub steps: u64,
    /// A call.
    pub call: MarkedCall,
    /// Instructions in it.
    pub marked: u64,
}

impl Slice {
    /// Until the CPU waits.
    pub const fn to_halt() -> Self {
        let call = MarkedCall {
            running: 0,
            thread: [0xff; 8],
            saved_rbp: 0,
            mark: 0,
        };
        Self {
            steps: u64::MAX,
            call,
            marked: u64::MAX,
        }
    }
}

/// A port of no device. With this one, and no other, KVM leaves a vCPU behind the `out` and has nothing more to do
/// for it (Linux, Documentation/virt/kvm/api.rst, KVM_X86_QUIRK_OUT_7E_INC_RIP).
const OUT_PORT: u16 = 0x7e;

/// The code of an `out` to it.
type OutCode = [u8; 2];

/// `out 0x7e, al`.
const OUT: OutCode = [0xe6, OUT_PORT as u8];

/// `pause`s in a slice of somebody who only waits for another CPU.
const PAUSES: u64 = 32;

/// Bytes by which a CPU's state names the thread that runs.
pub type RunningName = [u8; 8];

/// A call that is looked at: of a thread that runs on the vCPU, which has a mark in its saved `rbp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkedCall {
    /// Physical address of the name of the thread that runs.
    pub running: u64,
    /// What is there when the thread does.
    pub thread: RunningName,
    /// Physical address of the thread's saved `rbp`.
    pub saved_rbp: u64,
    /// The mark.
    pub mark: u64,
}

impl MarkedCall {
    /// Whether an instruction of the kernel's is part of the call.
    fn covers(&self, memory: &Memory, rbp: u64) -> bool {
        let running = memory.get::<RunningName>(self.running);
        // Until the stub has saved it, it is in the register.
        let marked = || {
            rbp == self.mark
                || memory
                    .get(self.saved_rbp)
                    .is_ok_and(|saved: u64| saved == self.mark)
        };
        running.is_ok_and(|name| name == self.thread) && marked()
    }
}

/// An instruction of the kernel's that a vCPU has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its address.
    pub rip: u64,
    /// What is in `rax`.
    pub rax: u64,
    /// What is in `rcx`: how often a string instruction is repeated.
    pub rcx: u64,
    /// The flags.
    pub rflags: u64,
    /// The vector of the trap, where the kernel is entered.
    pub vector: Option<u64>,
}

/// How far a vCPU is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// At the point.
    There,
    /// Stopped for the debugger.
    Hit,
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
    /// Where the kernel is entered and left, if it is stepped through.
    ways: Option<Ways>,
    /// The host has no breakpoints: the kernel is changed instead.
    by_out: bool,
    /// Where it is, and what was there.
    outs: Vec<(u64, OutCode)>,
    /// Instructions counted.
    pub counted: u64,
    /// Instructions of the kernel's executed one by one.
    pub stepped: u64,
    /// Whether the next one is.
    stepping: bool,
    /// Of those, `pause`s.
    pauses: u64,
    /// All of them, if they are noted.
    pub trace: Vec<Step>,
}

impl Way {
    /// Sets a vCPU on the way; none if it is barred at once.
    ///
    /// # Errors
    /// If the host cannot stop a guest.
    pub fn start(
        fd: &VcpuFd,
        memory: &Memory,
        ways: impl FnOnce() -> Option<Ways>,
        point: Point,
    ) -> Result<Option<Self>, Error> {
        let mut way = Self {
            point,
            steps: 0,
            ways: None,
            by_out: false,
            outs: Vec::new(),
            counted: 0,
            stepped: 0,
            stepping: false,
            pauses: 0,
            trace: Vec::new(),
        };
        way.steps = match point {
            Point::Interrupt(_)
            | Point::ToldCounted
            | Point::ToldTraced
            | Point::Slice(_)
            | Point::Marked(..)
            | Point::Instructions { .. } => {
                way.ways = Some(ways().ok_or_else(|| {
                    Error::Config("the machine runs no kernel that could be stepped through".into())
                })?);
                way.by_out = point.awaits_by_out()?;
                let regs = fd.get_regs().map_err(Error::kvm("reading registers"))?;
                way.go_on(fd, memory, regs.rip)?;
                return Ok(Some(way));
            }
            Point::Told => 0,
            Point::Steps(_) if is_barred(fd, memory)? => return Ok(None),
            Point::Steps(steps) => steps.max(1),
            // Nothing to step off.
            Point::Address(address) if is_barred(fd, memory)? => {
                debug(fd, KVM_GUESTDBG_USE_HW_BP, &[Some(address)])?;
                0
            }
            Point::Address(_) => 1,
            Point::Any { places, stay } if !stay && places.contains(&Some(rip(fd)?)) => 1,
            Point::Any { places, .. } => {
                if places.iter().any(Option::is_some) {
                    debug(fd, KVM_GUESTDBG_USE_HW_BP, &places)?;
                }
                0
            }
            Point::FirstUser => 0,
            Point::Debugger(stops) => {
                let halted = is_halted(fd);
                let steps = stops.start(fd, is_barred(fd, memory)?, halted)?.into();
                way.steps = steps;
                return Ok(Some(way));
            }
        };
        if way.steps > 0 {
            debug(fd, SINGLE_STEP, &[])?;
        }
        Ok(Some(way))
    }

    /// From user code, and where the CPU waits for an interrupt, runs to where the kernel is entered next;
    /// in the kernel, one instruction.
    fn go_on(&mut self, fd: &VcpuFd, memory: &Memory, rip: u64) -> Result<(), Error> {
        let Some(ways) = self.ways else {
            return Ok(());
        };
        let stepped = self.stepping;
        let halts = |at| {
            memory
                .get(at - KERNEL_IMAGE)
                .is_ok_and(|code: u8| code == HLT)
        };
        let interruptible = matches!(self.point, Point::ToldCounted | Point::ToldTraced);
        let leaves = rip < KERNEL_IMAGE
            || rip == ways.swapgs
            || halts(rip)
            || interruptible && waits(memory, rip)
            // It was paused while it waited: a step, without interrupts, would be for ever.
            || halts(rip - 1) && is_halted(fd);
        // One step leaves a breakpoint.
        let rests =
            matches!(self.point, Point::Interrupt(_)) && rip != ways.trap && rip != ways.syscall;
        // A step on the CPU is one of its repetitions.
        let repeated = match self.by_out && !leaves && !rests {
            true => repeated_bytes(memory, rip),
            false => 0,
        };
        self.stepping = !leaves && !rests && repeated == 0;
        match self.stepping {
            true if stepped => Ok(()),
            true if interruptible => debug(fd, KVM_GUESTDBG_SINGLESTEP, &[]),
            true => debug(fd, SINGLE_STEP, &[]),
            // An interrupt may come before the last of them.
            false if repeated > 0 => self.await_out(fd, memory, [ways.trap, rip + repeated]),
            false if self.by_out => self.await_out(fd, memory, [ways.trap, ways.syscall]),
            false => ways.await_entry(fd),
        }
    }

    /// Has the vCPU come to either place by an `out` that it finds there.
    fn await_out(&mut self, fd: &VcpuFd, memory: &Memory, places: [u64; 2]) -> Result<(), Error> {
        for place in places {
            let at = place.wrapping_sub(KERNEL_IMAGE);
            self.outs.push((place, memory.get(at)?));
            memory.put(at, &OUT)?;
        }
        fd.set_guest_debug(&kvm_guest_debug::default())
            .map_err(Error::kvm("stopping the guest at a point"))
    }

    /// Whether an `out` to this port is how the vCPU comes to its place.
    pub fn comes_by(&self, port: u16) -> bool {
        !self.outs.is_empty() && port == OUT_PORT
    }

    /// Gives the kernel its own code back, and the vCPU its place before that.
    fn take_out(&mut self, fd: &VcpuFd, memory: &Memory) -> Result<(), Error> {
        let mut regs = fd.get_regs().map_err(Error::kvm("reading registers"))?;
        for (place, code) in std::mem::take(&mut self.outs) {
            memory.put(place.wrapping_sub(KERNEL_IMAGE), &code)?;
            if regs.rip == place + OUT.len() as u64 {
                regs.rip = place;
                fd.set_regs(&regs)
                    .map_err(Error::kvm("setting registers"))?;
            }
        }
        Ok(())
    }

    /// After a debug exit: how far the vCPU is.
    ///
    /// # Errors
    /// If the host cannot stop a guest.
    pub fn stopped(&mut self, fd: &VcpuFd, memory: &Memory) -> Result<Progress, Error> {
        let stepped = self.steps > 0;
        self.steps = self.steps.saturating_sub(1);
        match self.point {
            Point::Debugger(stops) => Ok(match stops.stopped(fd, stepped)? {
                true => Progress::Hit,
                false => Progress::Further,
            }),
            Point::Steps(_) if self.steps == 0 => Ok(Progress::There),
            Point::Steps(_) if is_barred(fd, memory)? => Ok(Progress::Barred),
            Point::Address(address) => Self::come_to(fd, &[Some(address)]),
            Point::Any { places, .. } => Self::come_to(fd, &places),
            Point::Interrupt(_)
            | Point::ToldCounted
            | Point::ToldTraced
            | Point::Slice(_)
            | Point::Marked(..)
            | Point::Instructions { .. } => self.stepped(fd, memory),
            Point::Steps(_) | Point::FirstUser | Point::Told => Ok(Progress::Further),
        }
    }

    fn come_to(fd: &VcpuFd, places: &[Option<u64>]) -> Result<Progress, Error> {
        if places.contains(&Some(rip(fd)?)) {
            return Ok(Progress::There);
        }
        debug(fd, KVM_GUESTDBG_USE_HW_BP, places)?;
        Ok(Progress::Further)
    }

    /// The vCPU is to go on past the place that it has come to.
    ///
    /// # Errors
    /// If the host cannot stop a guest.
    pub fn step_off(&mut self, fd: &VcpuFd, memory: &Memory) -> Result<(), Error> {
        if self.ways.is_some() {
            return self.go_on(fd, memory, rip(fd)?);
        }
        self.steps = 1;
        debug(fd, SINGLE_STEP, &[])
    }

    /// Whether other vCPUs are on the same way.
    pub fn is_shared(&self) -> bool {
        matches!(self.point, Point::Any { .. } | Point::Instructions { .. })
    }

    /// Instructions to go, if they are the point.
    pub fn left(&self) -> Option<u32> {
        match self.point {
            Point::Instructions { count, .. } => Some(count.saturating_sub(self.counted as u32)),
            _ => None,
        }
    }

    fn stepped(&mut self, fd: &VcpuFd, memory: &Memory) -> Result<Progress, Error> {
        if !self.outs.is_empty() {
            self.take_out(fd, memory)?;
        }
        let regs = fd.get_regs().map_err(Error::kvm("reading registers"))?;
        self.stepped += 1;
        let end = match self.point {
            Point::Marked(call, count) => {
                let covers = regs.rip >= KERNEL_IMAGE && call.covers(memory, regs.rbp);
                self.counted += u64::from(covers);
                covers && self.counted == count
            }
            Point::Slice(Slice {
                steps,
                call,
                marked,
            }) => {
                let code = |at: u64| {
                    memory
                        .get(regs.rip.wrapping_sub(KERNEL_IMAGE) + at)
                        .unwrap_or(0u8)
                };
                let covers = regs.rip >= KERNEL_IMAGE && call.covers(memory, regs.rbp);
                self.counted += u64::from(covers);
                self.pauses += u64::from((code(0), code(1)) == (0xf3, 0x90));
                self.stepped == steps
                    || covers && self.counted == marked
                    || code(0) == HLT
                    || self.pauses == PAUSES
            }
            Point::Instructions { count, places } => {
                self.counted += 1;
                self.counted >= count.into() || places.contains(&Some(regs.rip))
            }
            Point::Interrupt(vector) => vector_of(fd, memory, &regs)? == Some(vector.into()),
            Point::ToldTraced => {
                self.counted += 1;
                self.note(fd, memory, &regs)?;
                false
            }
            _ => {
                self.counted += 1;
                false
            }
        };
        if end {
            return Ok(Progress::There);
        }
        self.go_on(fd, memory, regs.rip)?;
        Ok(Progress::Further)
    }

    fn note(&mut self, fd: &VcpuFd, memory: &Memory, regs: &kvm_regs) -> Result<(), Error> {
        let vector = match self.ways {
            Some(ways) if regs.rip == ways.trap => vector_of(fd, memory, regs)?,
            Some(ways) if regs.rip == ways.syscall => Some(GATE_VECTOR),
            _ => None,
        };
        self.trace.push(Step {
            rip: regs.rip,
            rax: regs.rax,
            rcx: regs.rcx,
            rflags: regs.rflags,
            vector,
        });
        Ok(())
    }

    /// Whether what the kernel reports is the point.
    pub fn ends_at(&self, event: Event) -> bool {
        match self.point {
            Point::FirstUser => event == Event::FirstUser,
            Point::Told
            | Point::ToldCounted
            | Point::ToldTraced
            | Point::Interrupt(_)
            | Point::Slice(_)
            | Point::Marked(..) => event == Event::Told,
            _ => false,
        }
    }

    /// Takes a vCPU off the way.
    pub fn end(mut self, fd: &VcpuFd, memory: &Memory) {
        if !self.outs.is_empty() {
            // It was there when it was changed.
            let _ = self.take_out(fd, memory);
        }
        // Refused, it stops once more, and goes on.
        let _ = fd.set_guest_debug(&kvm_guest_debug::default());
    }
}

/// Length of the string instruction with a repeat prefix that comes next in the kernel, bytes; 0 if it is another.
fn repeated_bytes(memory: &Memory, rip: u64) -> u64 {
    let code = memory.get::<[u8; 3]>(rip.wrapping_sub(KERNEL_IMAGE));
    match code.unwrap_or_default() {
        [0xf3, 0xa4 | 0xa5 | 0xaa | 0xab, _] => 2,
        [0xf3, 0x40..=0x4f, 0xa4 | 0xa5 | 0xaa | 0xab] => 3,
        _ => 0,
    }
}

/// Whether a vCPU waits for an interrupt.
pub fn is_halted(fd: &VcpuFd) -> bool {
    let state = fd.get_mp_state();
    state.is_ok_and(|state| state.mp_state == KVM_MP_STATE_HALTED)
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

/// The vector of the trap that a vCPU has just taken, where the kernel's stubs meet.
fn vector_of(fd: &VcpuFd, memory: &Memory, regs: &kvm_regs) -> Result<Option<u64>, Error> {
    let sregs = fd.get_sregs();
    let sregs = sregs.map_err(Error::kvm("reading segment registers"))?;
    let bytes = read_virtual(memory, sregs.cr3, regs.rsp, 8);
    Ok(bytes.try_into().ok().map(u64::from_le_bytes))
}

fn rip(fd: &VcpuFd) -> Result<u64, Error> {
    let regs = fd.get_regs().map_err(Error::kvm("reading registers"))?;
    Ok(regs.rip)
}

fn debug(fd: &VcpuFd, how: u32, places: &[Option<u64>]) -> Result<(), Error> {
    /// Bits of DR7 (SDM vol. 3, 17.2.4): always set; the first breakpoint is on, in all tasks.
    const ALWAYS: u64 = 0x400;
    const GLOBAL: u64 = 2;
    let mut debug = kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | how,
        ..Default::default()
    };
    for (n, place) in places.iter().enumerate() {
        if let Some(address) = place {
            debug.arch.debugreg[n] = *address;
            debug.arch.debugreg[7] |= ALWAYS | GLOBAL << (2 * n);
        }
    }
    fd.set_guest_debug(&debug)
        .map_err(Error::kvm("stopping the guest at a point"))
}
