//! The machine under a debugger: which vCPUs run to what, and why one has stopped.

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::breakpoints::WatchKind;
use gdbstub::target::ext::catch_syscalls::CatchSyscallPosition;

use super::calls::{Calls, End};
use crate::count::{SWAPGS_IRETQ, Ways};
use crate::doctor::{self, Cpl0};
use crate::inspect::{self, Machine};
use crate::paging::{read_virtual, translate};
use crate::point::Point;
use crate::stop::StopReason;
use crate::stops::{Access, DEBUG_REGISTERS, DebugRegisters, Stops, Watched};
use crate::vcpu::{Command, Registers};
use crate::vm::Vm;

/// Debug registers that catching calls takes.
const CALLS_TAKE: usize = 2;
/// From here on addresses are the kernel's.
const KERNEL_HALF: u64 = 1 << 63;

/// Why the debugger is told that the machine has stopped.
pub type Reason = MultiThreadStopReason<u64>;

/// What a vCPU does when the machine goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// Runs.
    Run,
    /// Executes one instruction.
    Step,
}

/// A vCPU.
struct Cpu {
    /// Its registers, while the machine is stopped and it has not ended.
    registers: Option<Registers>,
    /// What it does when the machine goes on; stays where it is, if nothing.
    resume: Option<Resume>,
    /// Stopped for the debugger, which was told of another vCPU at that moment.
    untold: Option<Reason>,
}

/// A breakpoint or watchpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breakpoint {
    /// What it watches.
    pub watched: Watched,
    /// Whether the debugger would rather have had one in memory.
    pub in_memory: bool,
}

/// A machine under a debugger.
pub struct Debuggee {
    /// The machine.
    pub vm: Vm,
    cpus: Vec<Cpu>,
    /// Where the kernel is entered and left, if it is ours.
    ways: Option<Ways>,
    breakpoints: Vec<Breakpoint>,
    /// Calls that are caught.
    pub calls: Calls,
    /// vCPUs of which the debugger says nothing stay where they are.
    pub locked: bool,
}

impl Debuggee {
    /// A machine that no debugger has stopped yet.
    pub fn new(vm: Vm) -> Self {
        let cpu = || Cpu {
            registers: None,
            resume: None,
            untold: None,
        };
        Self {
            cpus: vm.vcpus.iter().map(|_| cpu()).collect(),
            ways: vm.image.as_ref().and_then(|image| Ways::of(image)),
            vm,
            breakpoints: Vec::new(),
            calls: Calls::default(),
            locked: false,
        }
    }

    /// Numbers of the vCPUs.
    pub fn numbers(&self) -> std::ops::Range<usize> {
        0..self.cpus.len()
    }

    /// Registers of a vCPU of the stopped machine; none if there is no such one, or it has ended.
    pub fn registers(&self, cpu: usize) -> Option<&Registers> {
        self.cpus.get(cpu)?.registers.as_ref()
    }

    /// Sets registers of a vCPU of the stopped machine. Whether they could be.
    pub fn set_registers(&mut self, cpu: usize, registers: Registers) -> bool {
        let set = self.vm.set_registers(cpu as u32, registers);
        if let (Some(cpu), Some(_)) = (self.cpus.get_mut(cpu), set) {
            cpu.registers = set;
        }
        set.is_some()
    }

    /// Reads memory at an address of a vCPU, as far as it is mapped.
    pub fn read(&self, cpu: usize, address: u64, size: usize) -> Vec<u8> {
        match self.registers(cpu) {
            Some(registers) => read_virtual(&self.vm.memory, registers.special.cr3, address, size),
            None => Vec::new(),
        }
    }

    /// Writes memory at an address of a vCPU. Whether all of it is mapped, if not nothing is written.
    pub fn write(&self, cpu: usize, address: u64, data: &[u8]) -> bool {
        let memory = &self.vm.memory;
        let Some(registers) = self.registers(cpu) else {
            return false;
        };
        if self.read(cpu, address, data.len()).len() < data.len() {
            return false;
        }
        let mut written = 0;
        while written < data.len() {
            let va = address.wrapping_add(written as u64);
            let Some(at) = translate(memory, registers.special.cr3, va) else {
                return false;
            };
            let end = data.len().min(written + at.left as usize);
            if memory.write(at.pa, &data[written..end]).is_err() {
                return false;
            }
            written = end;
        }
        true
    }

    /// What `inspect` looks into.
    ///
    /// # Errors
    /// If it runs no kernel.
    pub fn machine(&self) -> inspect::Result<Machine<'_>> {
        let image = self.vm.image.as_ref().ok_or(inspect::Error::NoKernel)?;
        Ok(Machine {
            memory: &self.vm.memory,
            vcpus: self.cpus.iter().map(|cpu| cpu.registers).collect(),
            image,
        })
    }

    /// Whether so many more debug registers are free.
    pub fn has_room(&self, more: usize) -> bool {
        let calls = if self.calls.any() { CALLS_TAKE } else { 0 };
        self.breakpoints.len() + calls + more <= DEBUG_REGISTERS
    }

    /// Whether calls can be caught, or are already.
    pub fn can_catch(&self) -> bool {
        self.ways.is_some() && (self.calls.any() || self.has_room(CALLS_TAKE))
    }

    /// Sets a breakpoint. Whether there is a debug register for it, and it would work.
    pub fn add(&mut self, breakpoint: Breakpoint) -> bool {
        let Watched {
            address,
            size,
            access,
        } = breakpoint.watched;
        let refused = if !self.has_room(1) {
            Some("a CPU has four debug registers, of which catching calls takes two")
        } else if !address.is_multiple_of(size.into()) {
            Some("a watched place has 1, 2, 4 or 8 bytes, and begins at a multiple of that")
        } else if access == Access::Execute && self.is_way_out(address) {
            Some("a CPU would not get away from there")
        } else {
            unable(address, access)
        };
        match refused {
            Some(why) => tracing::warn!("gdb cannot stop the machine at {address:#x}: {why}"),
            None => self.breakpoints.push(breakpoint),
        }
        refused.is_none()
    }

    /// Removes a breakpoint. Whether it was set.
    pub fn remove(&mut self, breakpoint: Breakpoint) -> bool {
        let found = self.breakpoints.iter().position(|b| *b == breakpoint);
        found.map(|at| self.breakpoints.swap_remove(at)).is_some()
    }

    /// Whether that is one of the two instructions that go to user code, and are not stepped.
    fn is_way_out(&self, address: u64) -> bool {
        let way = SWAPGS_IRETQ.len();
        [address, address.wrapping_sub(3)]
            .iter()
            .any(|&start| self.read(0, start, way) == SWAPGS_IRETQ)
    }

    /// What a vCPU does when the machine goes on.
    pub fn set_resume(&mut self, cpu: usize, resume: Resume) {
        if let Some(cpu) = self.cpus.get_mut(cpu) {
            cpu.resume = Some(resume);
        }
    }

    /// All stay where they are. The debugger, which has been told of another vCPU, wants to hear no more of
    /// steps that it asked for then.
    pub fn clear_resume(&mut self) {
        for cpu in &mut self.cpus {
            if cpu.resume.take() == Some(Resume::Step) {
                cpu.untold = None;
            }
        }
    }

    /// All run for which nothing else was said.
    pub fn run_the_rest(&mut self) {
        for cpu in &mut self.cpus {
            cpu.resume.get_or_insert(Resume::Run);
        }
    }

    /// Lets the vCPUs do that; if one has stopped already, and nobody was told, nothing runs, and that is the
    /// reason.
    pub fn go(&mut self) -> Option<Reason> {
        for cpu in 0..self.cpus.len() {
            if self.cpus[cpu].resume.is_some()
                && let Some(reason) = self.cpus[cpu].untold.take()
                && self.is_wanted(&reason)
            {
                return Some(reason);
            }
        }
        self.vm.control.start();
        self.vm.running = true;
        for cpu in 0..self.cpus.len() {
            self.run(cpu);
        }
        None
    }

    fn run(&self, cpu: usize) {
        let stops = match self.cpus[cpu].resume {
            None => return,
            Some(Resume::Run) => Stops::Watched(self.watched()),
            Some(Resume::Step) => Stops::Step(self.ends_of_a_step()),
        };
        self.vm.vcpus[cpu].send(Command::RunTo(Point::Debugger(stops)));
    }

    fn watched(&self) -> DebugRegisters {
        let mut registers = DebugRegisters::default();
        let calls = self.ways.as_ref().filter(|_| self.calls.any());
        let calls = calls.map(|ways| [ways.enter, ways.leaving]);
        let calls = calls.into_iter().flatten().map(Watched::instruction);
        let breakpoints = self.breakpoints.iter().map(|breakpoint| breakpoint.watched);
        for (register, watched) in registers.iter_mut().zip(breakpoints.chain(calls)) {
            *register = Some(watched);
        }
        registers
    }

    /// Where the kernel goes on after what is not stepped.
    fn ends_of_a_step(&self) -> DebugRegisters {
        let ways = self.ways.as_ref();
        let at = |place: fn(&Ways) -> u64| ways.map(|ways| Watched::instruction(place(ways)));
        [
            at(|ways| ways.enter),
            at(|ways| ways.from_kernel),
            None,
            None,
        ]
    }

    /// Stops all vCPUs.
    ///
    /// # Errors
    /// The reason, if the machine has stopped for good.
    pub fn stop(&mut self) -> Result<(), StopReason> {
        self.stop_for(None)
    }

    /// Stops all vCPUs, because of what one of them was told.
    fn stop_for(&mut self, told: Option<usize>) -> Result<(), StopReason> {
        let ran = self.vm.is_running();
        self.vm.pause()?;
        for cpu in 0..self.cpus.len() {
            self.cpus[cpu].registers = self.vm.registers(cpu as u32);
        }
        // Every vCPU has said why it is paused, some of them twice.
        for (cpu, dr6) in std::mem::take(&mut self.vm.control.hits) {
            let cpu = cpu as usize;
            if ran && Some(cpu) != told && self.cpus[cpu].resume.is_some() {
                self.cpus[cpu].untold = self.why(cpu, dr6);
            }
        }
        Ok(())
    }

    /// A vCPU has stopped by itself. If that is for something that the debugger wants to be told, the whole
    /// machine stops; if not, it runs on.
    pub fn hit(&mut self, cpu: usize, dr6: u64) -> Option<Reason> {
        self.cpus[cpu].registers = self.vm.registers(cpu as u32);
        match self.why(cpu, dr6) {
            Some(reason) => self.stop_for(Some(cpu)).is_ok().then_some(reason),
            None => {
                self.run(cpu);
                None
            }
        }
    }

    /// Why a vCPU has stopped by itself.
    fn why(&mut self, cpu: usize, dr6: u64) -> Option<Reason> {
        let general = &self.registers(cpu)?.general;
        let (rip, rsp, rax) = (general.rip, general.rsp, general.rax);
        if self.cpus[cpu].resume == Some(Resume::Step) {
            return Some(trapped(cpu));
        }
        if let Some(reason) = self.breakpoint(cpu, rip, dr6) {
            return Some(reason);
        }
        let ways = self.ways?;
        let mut calls = std::mem::take(&mut self.calls);
        let caught = calls.caught(&ways, (rip, rsp, rax), |address| {
            let word = self.read(cpu, address, 8).try_into();
            word.ok().map(u64::from_le_bytes)
        });
        self.calls = calls;
        let (number, end) = caught?;
        if !self.calls.by_number.has(number) {
            return Some(trapped(cpu));
        }
        Some(Reason::CatchSyscall {
            tid: Some(tid(cpu)),
            number,
            position: match end {
                End::Entry => CatchSyscallPosition::Entry,
                End::Return => CatchSyscallPosition::Return,
            },
        })
    }

    fn breakpoint(&self, cpu: usize, rip: u64, dr6: u64) -> Option<Reason> {
        let place = Watched::instruction(rip);
        if let Some(found) = self.breakpoints.iter().find(|b| b.watched == place) {
            return Some(match found.in_memory {
                true => Reason::SwBreak(tid(cpu)),
                false => Reason::HwBreak(tid(cpu)),
            });
        }
        let mut numbered = self.breakpoints.iter().enumerate();
        let (_, found) = numbered.find(|(number, breakpoint)| {
            dr6 >> number & 1 != 0 && breakpoint.watched.access != Access::Execute
        })?;
        Some(Reason::Watch {
            tid: tid(cpu),
            kind: match found.watched.access {
                Access::ReadWrite => WatchKind::ReadWrite,
                _ => WatchKind::Write,
            },
            addr: found.watched.address,
        })
    }

    /// Whether the debugger still wants to be told: it may have removed the breakpoint.
    fn is_wanted(&self, reason: &Reason) -> bool {
        match *reason {
            Reason::SwBreak(tid) | Reason::HwBreak(tid) => {
                let cpu = cpu_of(tid);
                let rip = self.registers(cpu).map(|registers| registers.general.rip);
                rip.is_some_and(|rip| self.breakpoint(cpu, rip, 0).is_some())
            }
            _ => true,
        }
    }

    /// The debugger has gone: nothing stops the machine any more.
    pub fn let_go(&mut self) {
        let stopped = self.stop();
        self.breakpoints.clear();
        self.calls.clear();
        self.cpus.iter_mut().for_each(|cpu| cpu.untold = None);
        // One that has stopped for good says so next.
        if stopped.is_ok() {
            self.vm.resume();
        }
    }
}

impl Vm {
    /// Sets general and floating-point registers of a paused vCPU. Returns all, if that could be done.
    fn set_registers(&mut self, vcpu: u32, registers: Registers) -> Option<Registers> {
        let command = Command::SetRegisters(Box::new(registers));
        self.vcpus.get(vcpu as usize)?.send(command);
        self.next_registers(vcpu)
    }
}

/// Why this host would not stop there, if it would not.
fn unable(address: u64, access: Access) -> Option<&'static str> {
    let Ok(host) = doctor::probe() else {
        return Some("this host could not be probed");
    };
    let (able, why) = match access {
        Access::Execute if address >= KERNEL_HALF => (
            host.hardware_breakpoints,
            "this host does not stop at breakpoints in the kernel; see `flukevm doctor`",
        ),
        Access::Execute => (
            host.hardware_breakpoints_at_cpl3,
            "this host does not stop at breakpoints in programs; catch their calls instead",
        ),
        _ => (
            host.cpl0 == Cpl0::Hardware,
            "this host emulates kernel code, and its debug registers do not see what that accesses; \
             `set can-use-hw-watchpoints 0` makes gdb step instead",
        ),
    };
    (!able).then_some(why)
}

fn trapped(cpu: usize) -> Reason {
    Reason::SignalWithThread {
        tid: tid(cpu),
        signal: Signal::SIGTRAP,
    }
}

/// The debugger's number of a vCPU: it has no thread 0.
pub fn tid(cpu: usize) -> Tid {
    Tid::MIN.saturating_add(cpu)
}

/// The number of the vCPU.
pub fn cpu_of(tid: Tid) -> usize {
    tid.get() - 1
}
