//! What the debugger's protocol asks of the machine.
//!
//! A thread is a vCPU: the debugger's thread 1 is vCPU 0. What a request cannot have is an error number of
//! Linux's, which is all that the protocol has room for.

use std::convert::Infallible;

use gdbstub::common::{Pid, Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{
    SingleRegisterAccess, SingleRegisterAccessOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps,
    SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::catch_syscalls::{CatchSyscalls, CatchSyscallsOps, SyscallNumbers};
use gdbstub::target::ext::exec_file::{ExecFile, ExecFileOps};
use gdbstub::target::ext::host_io::{
    HostIo, HostIoClose, HostIoCloseOps, HostIoErrno, HostIoError, HostIoFstat, HostIoFstatOps,
    HostIoOpen, HostIoOpenFlags, HostIoOpenMode, HostIoOpenOps, HostIoOps, HostIoPread,
    HostIoPreadOps, HostIoResult, HostIoStat,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::reg::X86_64CoreRegs;

use super::calls::Numbers;
use super::debuggee::{Breakpoint, Debuggee, Resume, cpu_of, tid};
use super::monitor;
use super::registers::{Register, X86_64, from_gdb, to_gdb};
use crate::inspect;
use crate::stops::{Access, Watched};

/// Path of the kernel image, for the debugger: the only file that it can have.
const IMAGE_PATH: &[u8] = b"/flukevm-kernel";
/// Its descriptor.
const IMAGE_FD: u32 = 3;

const ESRCH: u8 = 3;
const EFAULT: u8 = 14;
const EINVAL: u8 = 22;
const ENOSPC: u8 = 28;

fn errno<T>(number: u8) -> TargetResult<T, Debuggee> {
    Err(TargetError::Errno(number))
}

/// Copies out what a buffer has room for from an offset on; the number of bytes.
fn part(of: &[u8], offset: u64, length: usize, buffer: &mut [u8]) -> usize {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| of.get(offset..));
    let rest = rest.unwrap_or_default();
    let length = rest.len().min(length).min(buffer.len());
    buffer[..length].copy_from_slice(&rest[..length]);
    length
}

impl Target for Debuggee {
    type Arch = X86_64;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64, Infallible> {
        BaseOps::MultiThread(self)
    }

    fn use_fork_stop_reason(&self) -> bool {
        false
    }

    fn use_vfork_stop_reason(&self) -> bool {
        false
    }

    fn use_vforkdone_stop_reason(&self) -> bool {
        false
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_catch_syscalls(&mut self) -> Option<CatchSyscallsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }

    fn support_exec_file(&mut self) -> Option<ExecFileOps<'_, Self>> {
        Some(self)
    }

    fn support_host_io(&mut self) -> Option<HostIoOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Debuggee {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        match self.registers(cpu_of(tid)) {
            Some(registers) => *regs = to_gdb(registers),
            None => return errno(ESRCH),
        }
        Ok(())
    }

    fn write_registers(&mut self, regs: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let cpu = cpu_of(tid);
        let Some(now) = self.registers(cpu) else {
            return errno(ESRCH);
        };
        match from_gdb(regs, now) {
            Some(registers) if self.set_registers(cpu, registers) => Ok(()),
            _ => errno(EINVAL),
        }
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, address: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let read = self.read(cpu_of(tid), address, data.len());
        if read.is_empty() {
            return errno(EFAULT);
        }
        data[..read.len()].copy_from_slice(&read);
        Ok(read.len())
    }

    fn write_addrs(&mut self, address: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        match self.write(cpu_of(tid), address, data) {
            true => Ok(()),
            false => errno(EFAULT),
        }
    }

    fn list_active_threads(&mut self, active: &mut dyn FnMut(Tid)) -> Result<(), Infallible> {
        self.numbers().map(tid).for_each(active);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for Debuggee {
    fn read_register(
        &mut self,
        tid: Tid,
        register: Register,
        buffer: &mut [u8],
    ) -> TargetResult<usize, Self> {
        match self.registers(cpu_of(tid)) {
            Some(registers) => Ok(part(&register.read(registers), 0, usize::MAX, buffer)),
            None => errno(ESRCH),
        }
    }

    fn write_register(
        &mut self,
        tid: Tid,
        register: Register,
        value: &[u8],
    ) -> TargetResult<(), Self> {
        let cpu = cpu_of(tid);
        let Some(now) = self.registers(cpu) else {
            return errno(ESRCH);
        };
        match register.write(value, now) {
            Some(registers) if self.set_registers(cpu, registers) => Ok(()),
            _ => errno(EINVAL),
        }
    }
}

impl ThreadExtraInfo for Debuggee {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, Infallible> {
        let cpu = cpu_of(tid) as u32;
        let seen = self
            .machine()
            .and_then(|machine| inspect::on_cpu(&machine, cpu));
        let text = seen.unwrap_or_else(|error| error.to_string());
        Ok(part(text.as_bytes(), 0, usize::MAX, buffer))
    }
}

/// The machine goes on once the debugger's request has been dealt with.
impl MultiThreadResume for Debuggee {
    fn resume(&mut self) -> Result<(), Infallible> {
        if !self.locked {
            self.run_the_rest();
        }
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Infallible> {
        self.clear_resume();
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(
        &mut self,
        tid: Tid,
        _signal: Option<Signal>,
    ) -> Result<(), Infallible> {
        self.set_resume(cpu_of(tid), Resume::Run);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Debuggee {
    fn set_resume_action_step(
        &mut self,
        tid: Tid,
        _signal: Option<Signal>,
    ) -> Result<(), Infallible> {
        self.set_resume(cpu_of(tid), Resume::Step);
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Debuggee {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Infallible> {
        self.locked = true;
        Ok(())
    }
}

impl Breakpoints for Debuggee {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

fn at(address: u64, in_memory: bool) -> Breakpoint {
    Breakpoint {
        watched: Watched::instruction(address),
        in_memory,
    }
}

/// A breakpoint in memory takes a debug register too: the kernel's text is not written to, and its CPUs need
/// not be able to execute `int3`.
impl SwBreakpoint for Debuggee {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.add(at(address, true)))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.remove(at(address, true)))
    }
}

impl HwBreakpoint for Debuggee {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.add(at(address, false)))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.remove(at(address, false)))
    }
}

/// A watchpoint; none for reads alone, which no debug register has.
fn watch(address: u64, size: u64, kind: WatchKind) -> Option<Breakpoint> {
    let watched = Watched {
        address,
        size: u8::try_from(size)
            .ok()
            .filter(|size| matches!(size, 1 | 2 | 4 | 8))?,
        access: match kind {
            WatchKind::Write => Access::Write,
            WatchKind::ReadWrite => Access::ReadWrite,
            WatchKind::Read => return None,
        },
    };
    Some(Breakpoint {
        watched,
        in_memory: false,
    })
}

impl HwWatchpoint for Debuggee {
    fn add_hw_watchpoint(
        &mut self,
        address: u64,
        size: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        Ok(watch(address, size, kind).is_some_and(|watch| self.add(watch)))
    }

    fn remove_hw_watchpoint(
        &mut self,
        address: u64,
        size: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        Ok(watch(address, size, kind).is_some_and(|watch| self.remove(watch)))
    }
}

impl CatchSyscalls for Debuggee {
    fn enable_catch_syscalls(
        &mut self,
        filter: Option<SyscallNumbers<'_, u64>>,
    ) -> TargetResult<(), Self> {
        if !self.can_catch() {
            return errno(ENOSPC);
        }
        self.calls.by_number = match filter {
            None => Numbers::ALL,
            Some(filter) => {
                let mut numbers = Numbers::default();
                filter.for_each(|number| numbers.add(number));
                numbers
            }
        };
        Ok(())
    }

    fn disable_catch_syscalls(&mut self) -> TargetResult<(), Self> {
        self.calls.by_number = Numbers::default();
        Ok(())
    }
}

impl MonitorCmd for Debuggee {
    fn handle_monitor_cmd(
        &mut self,
        command: &[u8],
        mut out: ConsoleOutput<'_>,
    ) -> Result<(), Infallible> {
        let text = monitor::run(self, &String::from_utf8_lossy(command));
        out.write_raw(format!("{}\n", text.trim_end()).as_bytes());
        Ok(())
    }
}

impl ExecFile for Debuggee {
    fn get_exec_file(
        &self,
        _pid: Option<Pid>,
        offset: u64,
        length: usize,
        buffer: &mut [u8],
    ) -> TargetResult<usize, Self> {
        Ok(part(IMAGE_PATH, offset, length, buffer))
    }
}

impl HostIo for Debuggee {
    fn support_open(&mut self) -> Option<HostIoOpenOps<'_, Self>> {
        Some(self)
    }

    fn support_close(&mut self) -> Option<HostIoCloseOps<'_, Self>> {
        Some(self)
    }

    fn support_pread(&mut self) -> Option<HostIoPreadOps<'_, Self>> {
        Some(self)
    }

    fn support_fstat(&mut self) -> Option<HostIoFstatOps<'_, Self>> {
        Some(self)
    }
}

impl Debuggee {
    fn image(&self, fd: u32) -> HostIoResult<&[u8], Self> {
        let image = self.vm.image.as_ref().filter(|_| fd == IMAGE_FD);
        image
            .map(|image| &image[..])
            .ok_or(HostIoError::Errno(HostIoErrno::EBADF))
    }
}

impl HostIoOpen for Debuggee {
    fn open(
        &mut self,
        name: &[u8],
        flags: HostIoOpenFlags,
        _mode: HostIoOpenMode,
    ) -> HostIoResult<u32, Self> {
        if name != IMAGE_PATH || self.vm.image.is_none() {
            return Err(HostIoError::Errno(HostIoErrno::ENOENT));
        }
        let writes = HostIoOpenFlags::O_WRONLY | HostIoOpenFlags::O_RDWR;
        match flags.intersects(writes) {
            true => Err(HostIoError::Errno(HostIoErrno::EROFS)),
            false => Ok(IMAGE_FD),
        }
    }
}

impl HostIoClose for Debuggee {
    fn close(&mut self, fd: u32) -> HostIoResult<(), Self> {
        self.image(fd).map(drop)
    }
}

impl HostIoPread for Debuggee {
    fn pread(
        &mut self,
        fd: u32,
        count: usize,
        offset: u64,
        buffer: &mut [u8],
    ) -> HostIoResult<usize, Self> {
        self.image(fd)
            .map(|image| part(image, offset, count, buffer))
    }
}

impl HostIoFstat for Debuggee {
    fn fstat(&mut self, fd: u32) -> HostIoResult<HostIoStat, Self> {
        let size = self.image(fd)?.len() as u64;
        Ok(HostIoStat {
            st_dev: 0,
            st_ino: 0,
            st_mode: HostIoOpenMode::S_IFREG | HostIoOpenMode::S_IRUSR,
            st_nlink: 1,
            st_uid: 0,
            st_gid: 0,
            st_rdev: 0,
            st_size: size,
            st_blksize: 4096,
            st_blocks: size.div_ceil(512),
            st_atime: 0,
            st_mtime: 0,
            st_ctime: 0,
        })
    }
}
