//! A vCPU: a thread, and the machine of states that it goes through.
//!
//! ```text
//!            Run                  a stop reason
//!   Paused ───────▶ Running ─────────────────────▶ Finished ──────▶ (the thread ends)
//!     ▲   ◀────────                                   │     Finish
//!     │     Pause, a point                            │
//!     └───────────────────────────────────────────────┘
//!                 Restore (also from Paused)
//! ```
//!
//! A vCPU starts paused. It is told what to do by [`Command`]s, each followed by a kick, and tells
//! what it did by [`Report`]s; nothing else is shared. Before it reports that it paused it has
//! completed any pending I/O, so that its registers are those between two instructions. A thread
//! that fails or panics still reports [`Report::Ended`], with the reason. `Finish` ends the
//! thread from everywhere.

use std::cell::OnceCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use tokio::sync::mpsc::UnboundedSender;

use fluke_abi::port::{Event, PROBE};

use crate::bus::{Bus, Signal};
use crate::condition::watch::{Verdict, Watch};
use crate::count::{Counter, SharedCounts, Ways};
use crate::crash::{self, Crash};
use crate::devices::Devices;
use crate::error::Error;
use crate::exit;
use crate::kick;
use crate::memory::Memory;
use crate::point::{Point, Progress, Way, is_halted};
use crate::snapshot::tsc::Moment;
use crate::snapshot::vcpu::VcpuState;
use crate::stats::{Cause, VcpuCounters};
use crate::stop::StopReason;

/// After this time a vCPU that has not done what it was told is kicked again: an emulating host has
/// been seen to stay in KVM_RUN with a signal pending.
pub const KICK_AGAIN: Duration = Duration::from_millis(100);

/// What to do next.
#[derive(Clone, Debug)]
pub enum Command {
    /// Run the guest.
    Run,
    /// Run the guest, and pause at a point.
    RunTo(Point),
    /// Leave the guest and wait.
    Pause,
    /// Note whether user, kernel, or no code is running, and go on.
    Sample,
    /// Report the registers; only while paused.
    Registers,
    /// Take general and floating-point registers, and report all; only while paused.
    SetRegisters(Box<Registers>),
    /// Report the whole state; only while paused.
    Save,
    /// Take the state of the vCPU with the same number and pause; only while paused or finished.
    Restore(Arc<Restored>),
    /// End the thread.
    Finish,
}

/// What was done.
#[derive(Debug)]
pub enum Report {
    /// The vCPU is out of the guest, and waits.
    Paused(PauseReason),
    /// The vCPU is out of the guest at the point that it was told to run to, and waits.
    Reached,
    /// The registers.
    Registers(Box<Registers>),
    /// The whole state, or why it cannot be had.
    Saved(Result<Box<VcpuState>, Error>),
    /// The vCPU has the state that it was given.
    Restored,
    /// The command is not possible in the state the vCPU is in; nothing changed.
    Refused,
    /// The vCPU wants to end the machine, and will only run again with another state.
    Finished(StopReason),
    /// The thread is about to end; with a reason if it cannot go on.
    Ended(Option<StopReason>),
}

impl Report {
    /// Whether it answers a command to pause: the vCPU is out of the guest, for now or for good.
    pub fn settles(&self) -> bool {
        matches!(self, Self::Paused(_)) || self.end().is_some()
    }

    /// Whether the vCPU will not run any more by itself; the reason if it has one.
    pub fn end(&self) -> Option<Option<&StopReason>> {
        match self {
            Self::Finished(stop) => Some(Some(stop)),
            Self::Ended(stop) => Some(stop.as_ref()),
            _ => None,
        }
    }
}

/// States for vCPUs.
#[derive(Debug)]
pub struct Restored {
    /// By the numbers of the vCPUs.
    pub vcpus: Arc<Vec<VcpuState>>,
    /// When.
    pub moment: Moment,
}

/// Why a vCPU paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PauseReason {
    /// It has not run yet, or not since it was given its state.
    Start,
    /// It was told to.
    Command,
    /// It came to the point that it was told to run to.
    Point,
    /// It came to user code on the way to its point, which is not stepped through.
    Barred,
    /// It stopped for a debugger; with the value of DR6.
    Hit(u64),
    /// It came to a probe point or place when another vCPU had, and will come there again.
    Again,
}

/// Registers of a paused vCPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Registers {
    /// General registers.
    pub general: kvm_regs,
    /// Segment and control registers.
    pub special: kvm_sregs,
    /// Floating-point and vector registers; zero for a vCPU that only exists as a snapshot.
    pub float: kvm_fpu,
    /// Whether it waits for an interrupt.
    pub halted: bool,
}

/// A kernel image that all vCPUs share.
pub type Image = Arc<Vec<u8>>;

/// What a vCPU thread works with.
pub struct Context {
    /// Number of the vCPU.
    pub id: u32,
    /// Guest memory.
    pub memory: Memory,
    /// Port bus.
    pub bus: Arc<Bus>,
    /// Devices behind it.
    pub devices: Devices,
    /// Kernel image, for symbols.
    pub image: Option<Image>,
    /// Counters.
    pub counters: Arc<VcpuCounters>,
    /// The MSRs that KVM lists.
    pub msrs: Arc<[u32]>,
    /// What to pause for when it is come to.
    pub watch: Arc<Mutex<Watch>>,
    /// Where to count the kernel's instructions, if that is wanted.
    pub counts: Option<SharedCounts>,
    /// Where reports go.
    pub reports: UnboundedSender<(u32, Report)>,
}

/// The handle of a vCPU thread.
#[derive(Debug)]
pub struct Vcpu {
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread, paused.
    ///
    /// # Errors
    /// If the host has no thread to spare.
    pub fn spawn(fd: VcpuFd, context: Context) -> Result<Self, Error> {
        let (commands, inbox) = mpsc::channel();
        let thread = thread::Builder::new()
            .name(format!("vcpu{}", context.id))
            .spawn(move || {
                let mut runner = Runner {
                    fd,
                    context,
                    inbox,
                    counter: None,
                    way: None,
                    ways: OnceCell::new(),
                };
                let caught = catch_unwind(AssertUnwindSafe(|| runner.main()));
                let stop = caught.unwrap_or_else(|panic| Some(runner.panicked(&*panic)));
                runner.report(Report::Ended(stop));
            })
            .map_err(Error::host("starting a vCPU thread; try fewer --vcpus"))?;
        Ok(Self {
            commands,
            thread: Some(thread),
        })
    }

    /// Tells the vCPU what to do. One that has finished does not hear it.
    pub fn send(&self, command: Command) {
        // The command first, the kick second: whoever sees the kick sees the command.
        if self.commands.send(command).is_ok() {
            self.nudge();
        }
    }

    /// Kicks the vCPU, to do what it was told.
    pub fn nudge(&self) {
        if let Some(thread) = &self.thread {
            kick::kick(thread);
        }
    }

    /// Waits for the thread to end. It must have been told to.
    pub fn join(&mut self) {
        let mut patience = Duration::from_micros(100);
        while self.thread.as_ref().is_some_and(|t| !t.is_finished()) {
            thread::sleep(patience);
            patience = (patience * 2).min(KICK_AGAIN);
            if patience == KICK_AGAIN {
                self.nudge();
            }
        }
        if let Some(thread) = self.thread.take() {
            // The thread catches its own panics.
            let _ = thread.join();
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.send(Command::Finish);
        self.join();
    }
}

/// States of a vCPU thread.
enum State {
    Paused(PauseReason),
    Running,
    Finished(StopReason),
    /// The thread ends; with a reason if it cannot go on.
    Ended(Option<StopReason>),
}

/// What a stay in the guest ended with.
enum Left {
    /// One instruction further, or at a breakpoint.
    Stepped,
    /// A kick, or nothing at all.
    Kicked,
    /// The end of the way to the point that the vCPU was told to run to, with an access pending or not.
    Point(bool, PauseReason),
    /// An access that KVM completes when the guest is next entered.
    Access,
    /// Something that ends the machine.
    Stop(StopReason),
}

/// An exit, free of borrows from the vCPU.
enum Exit {
    /// With DR6.
    Debug(u64),
    Pio,
    Read(u64),
    Write(u64, Vec<u8>),
    Shutdown,
    InternalError,
    FailedEntry(u64),
    Other(String),
}

struct Runner {
    fd: VcpuFd,
    context: Context,
    inbox: Receiver<Command>,
    counter: Option<Counter>,
    /// Where to pause.
    way: Option<Way>,
    /// Where the kernel is entered and left, once that was needed.
    ways: OnceCell<Option<Ways>>,
}

impl Runner {
    fn main(&mut self) -> Option<StopReason> {
        if let Err(error) = kick::arm(&self.fd) {
            return Some(self.failed(format!("setting its signal mask: {error}"), None));
        }
        if let (Some(counts), Some(image)) = (&self.context.counts, &self.context.image) {
            self.counter = Counter::new(&self.fd, image, counts.clone());
            if self.counter.is_none() {
                return Some(self.failed("this host or kernel cannot be stepped".into(), None));
            }
        }
        let mut state = State::Paused(PauseReason::Start);
        loop {
            state = match state {
                State::Paused(why) => self.paused(why),
                State::Running => self.running(),
                State::Finished(stop) => self.finished(stop),
                State::Ended(stop) => return stop,
            };
        }
    }

    /// Waits for a command.
    fn paused(&mut self, why: PauseReason) -> State {
        loop {
            // A sender that is gone means that nobody waits for this vCPU any more.
            match self.inbox.recv().unwrap_or(Command::Finish) {
                Command::Run => return State::Running,
                Command::RunTo(point) => {
                    let Context { memory, image, .. } = &self.context;
                    let ways = || {
                        let find = || Ways::of(image.as_ref()?);
                        *self.ways.get_or_init(find)
                    };
                    match Way::start(&self.fd, memory, ways, point) {
                        Ok(Some(way)) => self.way = Some(way),
                        Ok(None) => return self.pause(false, PauseReason::Barred),
                        Err(error) => {
                            return State::Ended(Some(self.failed(error.to_string(), None)));
                        }
                    }
                    return State::Running;
                }
                Command::Finish => return State::Ended(None),
                // Pausing twice is no error, and says the same thing.
                Command::Pause => self.report(Report::Paused(why)),
                Command::Registers => self.registers(),
                Command::SetRegisters(registers) => {
                    let set = self.fd.set_regs(&registers.general);
                    match set.and_then(|()| self.fd.set_fpu(&registers.float)) {
                        Ok(()) => self.registers(),
                        Err(_) => self.report(Report::Refused),
                    }
                }
                Command::Save => {
                    let state = VcpuState::save(&self.fd, &self.context.msrs);
                    self.report(Report::Saved(state.map(Box::new)));
                }
                Command::Restore(states) => return self.restore(&states),
                Command::Sample => {}
            }
        }
    }

    fn registers(&self) {
        let registers = || {
            Ok::<_, kvm_ioctls::Error>(Registers {
                general: self.fd.get_regs()?,
                special: self.fd.get_sregs()?,
                float: self.fd.get_fpu()?,
                halted: is_halted(&self.fd),
            })
        };
        self.report(match registers() {
            Ok(registers) => Report::Registers(Box::new(registers)),
            Err(_) => Report::Refused,
        });
    }

    /// After a stop, waits for a state to go on with.
    fn finished(&mut self, stop: StopReason) -> State {
        self.report(Report::Finished(stop));
        loop {
            match self.inbox.recv().unwrap_or(Command::Finish) {
                Command::Finish => return State::Ended(None),
                Command::Restore(states) => {
                    self.drop_access();
                    return self.restore(&states);
                }
                _ => {}
            }
        }
    }

    fn restore(&mut self, states: &Restored) -> State {
        let result = match states.vcpus.get(self.context.id as usize) {
            Some(state) => state.restore(&self.fd, &states.moment),
            None => Err(Error::Config("there is no state for it".into())),
        };
        match result {
            Ok(()) => {
                self.report(Report::Restored);
                State::Paused(PauseReason::Start)
            }
            Err(error) => State::Ended(Some(self.failed(error.to_string(), None))),
        }
    }

    /// Runs the guest until a command, a point, or a reason to stop.
    fn running(&mut self) -> State {
        let state = self.run();
        if let Some(way) = self.way.take() {
            if let Some(left) = way.left() {
                self.watch().instructions = left;
            }
            way.end(&self.fd, &self.context.memory);
        }
        state
    }

    fn run(&mut self) -> State {
        let mut access_pending = false;
        loop {
            match self.enter() {
                Left::Stop(reason) => return State::Finished(reason),
                Left::Point(access_pending, why) => return self.pause(access_pending, why),
                Left::Access => {
                    access_pending = true;
                    continue;
                }
                Left::Stepped => continue,
                Left::Kicked => {}
            }
            kick::drain();
            while let Ok(command) = self.inbox.try_recv() {
                match command {
                    Command::Run | Command::RunTo(_) => {}
                    Command::Sample => self.sample(),
                    Command::Finish => return State::Ended(None),
                    Command::Registers
                    | Command::SetRegisters(_)
                    | Command::Save
                    | Command::Restore(_) => self.report(Report::Refused),
                    Command::Pause => return self.pause(access_pending, PauseReason::Command),
                }
            }
            access_pending = false;
        }
    }

    fn pause(&mut self, access_pending: bool, why: PauseReason) -> State {
        if access_pending && let Some(reason) = self.complete_access() {
            return State::Finished(reason);
        }
        if access_pending && why == PauseReason::Again && !self.take_back_probe() {
            return State::Finished(self.failed("its registers cannot be changed".into(), None));
        }
        if let Some(way) = &mut self.way {
            let counters = &self.context.counters;
            let mut trace = counters
                .trace
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *trace = std::mem::take(&mut way.trace);
            counters.instructions.store(way.counted, Ordering::Relaxed);
            counters.steps.store(way.stepped, Ordering::Relaxed);
        }
        self.report(match why {
            PauseReason::Point => Report::Reached,
            _ => Report::Paused(why),
        });
        State::Paused(why)
    }

    /// Puts the vCPU back before the `out dx, eax` of a probe point, which has no effect in the guest.
    fn take_back_probe(&self) -> bool {
        const OUT_BYTES: u64 = 1;
        let Ok(mut regs) = self.fd.get_regs() else {
            return false;
        };
        regs.rip -= OUT_BYTES;
        self.fd.set_regs(&regs).is_ok()
    }

    fn watch(&self) -> MutexGuard<'_, Watch> {
        let watch = self.context.watch.lock();
        watch.unwrap_or_else(PoisonError::into_inner)
    }

    /// What a verdict means for a vCPU with an access pending or not.
    fn left(access_pending: bool, verdict: Verdict) -> Left {
        match verdict {
            Verdict::Further if access_pending => Left::Access,
            Verdict::Further => Left::Stepped,
            Verdict::Pause => Left::Point(access_pending, PauseReason::Point),
            Verdict::Again => Left::Point(access_pending, PauseReason::Again),
        }
    }

    /// Lets KVM complete an access: its effect on registers is only seen after the next entry,
    /// which `immediate_exit` ends before any instruction.
    fn complete_access(&mut self) -> Option<StopReason> {
        self.fd.set_kvm_immediate_exit(1);
        // A string instruction may go on to its next part.
        let stop = loop {
            match self.enter() {
                Left::Access | Left::Stepped | Left::Point(..) => {}
                Left::Kicked => break None,
                Left::Stop(reason) => break Some(reason),
            }
        };
        self.fd.set_kvm_immediate_exit(0);
        stop
    }

    /// Lets KVM forget an access that a stopped vCPU may have pending: completed later, it would
    /// change the state that the vCPU is given.
    fn drop_access(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        while self
            .fd
            .run()
            .is_ok_and(|exit| !matches!(exit, VcpuExit::Intr))
        {}
        self.fd.set_kvm_immediate_exit(0);
    }

    /// One stay in the guest, and what it asked for.
    fn enter(&mut self) -> Left {
        let exit = match self.fd.run() {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => Exit::Pio,
            Ok(VcpuExit::MmioRead(address, data)) => {
                data.fill(0xff);
                Exit::Read(address)
            }
            Ok(VcpuExit::MmioWrite(address, data)) => Exit::Write(address, data.into()),
            Ok(VcpuExit::Debug(debug)) => Exit::Debug(debug.dr6),
            Ok(VcpuExit::Shutdown) => Exit::Shutdown,
            Ok(VcpuExit::InternalError) => Exit::InternalError,
            Ok(VcpuExit::FailEntry(reason, _)) => Exit::FailedEntry(reason),
            Ok(VcpuExit::Intr) => {
                self.context.counters.count(Cause::Kick);
                return Left::Kicked;
            }
            Ok(other) => Exit::Other(format!("{other:?}")),
            Err(error) => match error.errno() {
                libc::EINTR | libc::EAGAIN => {
                    self.context.counters.count(Cause::Kick);
                    return Left::Kicked;
                }
                _ => Exit::Other(io::Error::from(error).to_string()),
            },
        };
        match exit {
            Exit::Pio if self.is_probe() => self.probe(),
            Exit::Pio if self.comes_to_place() => self.debugged(0),
            Exit::Pio => self.pio(),
            Exit::Debug(dr6) => self.debugged(dr6),
            // Only a page that is watched can be written to here.
            Exit::Write(address, data) if self.context.memory.write(address, &data).is_ok() => {
                let verdict = self.watch().write(self.context.id, address, data.len());
                Self::left(true, verdict)
            }
            Exit::Read(address) | Exit::Write(address, _) => {
                self.context.counters.count(Cause::Mmio);
                let what = match exit {
                    Exit::Read(_) => "read from",
                    _ => "wrote to",
                };
                let crash = self.crash();
                Left::Stop(self.failed(
                    format!(
                        "it {what} physical address {address:#x}, where nothing is, on {crash}"
                    ),
                    Some(crash),
                ))
            }
            Exit::Shutdown => {
                self.context.counters.count(Cause::Shutdown);
                Left::Stop(StopReason::TripleFault(self.crash()))
            }
            Exit::InternalError => {
                self.context.counters.count(Cause::InternalError);
                let error = exit::internal_error(&mut self.fd);
                tracing::debug!(vcpu = self.context.id, "KVM's data: {:x?}", error.data);
                Left::Stop(StopReason::EmulationFailure {
                    suberror: error.suberror,
                    crash: self.crash(),
                })
            }
            Exit::FailedEntry(reason) => {
                let why = format!("the CPU refused to enter the guest (reason {reason:#x})");
                Left::Stop(self.failed(why, Some(self.crash())))
            }
            Exit::Other(what) => {
                self.context.counters.count(Cause::Other);
                let why = format!("KVM_RUN ended with {what}");
                Left::Stop(self.failed(why, Some(self.crash())))
            }
        }
    }

    fn is_probe(&mut self) -> bool {
        let pio = exit::pio(&mut self.fd);
        pio.write && pio.port == PROBE
    }

    fn probe(&mut self) -> Left {
        self.context.counters.count(Cause::PioWrite);
        match self.fd.get_regs() {
            Ok(regs) => Self::left(true, self.watch().probe(self.context.id, &regs)),
            Err(error) => Left::Stop(self.failed(format!("reading registers: {error}"), None)),
        }
    }

    fn comes_to_place(&mut self) -> bool {
        let pio = exit::pio(&mut self.fd);
        let comes = |way: &Way| way.comes_by(pio.port);
        pio.write && self.way.as_ref().is_some_and(comes)
    }

    /// Where a vCPU is stopped by a step or a breakpoint, or what stands for one.
    fn debugged(&mut self, dr6: u64) -> Left {
        if let Some(counter) = &mut self.counter {
            counter.stopped(&self.fd, &self.context.memory);
        }
        let memory = &self.context.memory;
        match self.way.as_mut().map(|way| way.stopped(&self.fd, memory)) {
            Some(Ok(Progress::There)) => self.at_point(),
            Some(Ok(Progress::Hit)) => Left::Point(false, PauseReason::Hit(dr6)),
            Some(Ok(Progress::Barred)) => Left::Point(false, PauseReason::Barred),
            Some(Err(error)) => Left::Stop(self.failed(error.to_string(), None)),
            _ => Left::Stepped,
        }
    }

    /// At the end of the way: whether to pause is for others to say, if others may be there too.
    fn at_point(&mut self) -> Left {
        let Some(way) = self.way.as_mut().filter(|way| way.is_shared()) else {
            return Left::Point(false, PauseReason::Point);
        };
        let Ok(regs) = self.fd.get_regs() else {
            return Left::Point(false, PauseReason::Point);
        };
        let watch = self.context.watch.lock();
        let mut watch = watch.unwrap_or_else(PoisonError::into_inner);
        let verdict = match way.left() {
            Some(0) => watch.counted(self.context.id, regs.rip),
            _ => watch.place(self.context.id, regs.rip),
        };
        drop(watch);
        if verdict == Verdict::Further
            && let Err(error) = way.step_off(&self.fd, &self.context.memory)
        {
            return Left::Stop(self.failed(error.to_string(), None));
        }
        Self::left(false, verdict)
    }

    fn pio(&mut self) -> Left {
        let id = self.context.id;
        let pio = exit::pio(&mut self.fd);
        let (cause, result) = if pio.write {
            let written = self.context.bus.write(id, pio.port, pio.size, pio.data);
            (Cause::PioWrite, written)
        } else {
            let read = self.context.bus.read(id, pio.port, pio.size, pio.data);
            (Cause::PioRead, read.map(|()| None))
        };
        let port = pio.port;
        self.context.counters.count(cause);
        match result {
            Ok(Some(Signal::Event(event)))
                if self.way.as_ref().is_some_and(|way| way.ends_at(event)) =>
            {
                Left::Point(true, PauseReason::Point)
            }
            Ok(None | Some(Signal::Event(Event::FirstUser | Event::Told))) => Left::Access,
            Ok(Some(Signal::Exit(status))) => Left::Stop(StopReason::Exited(status)),
            Ok(Some(Signal::Event(Event::Deadlock))) => Left::Stop(StopReason::Deadlock),
            Ok(Some(Signal::Event(Event::Panic))) => {
                let log = &self.context.devices.log;
                let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
                let message = log.panic_message(id);
                drop(log);
                Left::Stop(StopReason::KernelPanic {
                    message,
                    crash: self.crash(),
                })
            }
            Err(_) => {
                // As on real hardware: reads are all ones, writes go nowhere.
                if self.context.counters.count(Cause::UnknownPort) == 0 {
                    tracing::warn!(vcpu = id, "access to port {port:#x}, where nothing is");
                }
                Left::Access
            }
        }
    }

    fn sample(&self) {
        let counters = &self.context.counters;
        let counter = match self.fd.get_sregs() {
            _ if is_halted(&self.fd) => &counters.idle_samples,
            Ok(sregs) if sregs.cs.dpl == 3 => &counters.user_samples,
            _ => &counters.kernel_samples,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn crash(&self) -> Box<Crash> {
        let Context {
            id, memory, image, ..
        } = &self.context;
        let image = image.as_ref().map(|i| i.as_slice());
        Box::new(crash::examine(&self.fd, *id, memory, image))
    }

    fn failed(&self, why: String, crash: Option<Box<Crash>>) -> StopReason {
        StopReason::VcpuFailed {
            vcpu: self.context.id,
            why,
            crash,
        }
    }

    fn panicked(&self, panic: &(dyn std::any::Any + Send)) -> StopReason {
        let message = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        self.failed(format!("its thread panicked: {message}"), None)
    }

    fn report(&self, report: Report) {
        // Nobody listens once the machine is being dropped.
        let _ = self.context.reports.send((self.context.id, report));
    }
}
