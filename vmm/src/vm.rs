//! A machine from its configuration to its end.
//!
//! [`Vm::new`] builds everything and starts the vCPU threads, paused. [`Vm::run`] is all that most
//! callers want; tests and tools drive the machine themselves with [`Vm::resume`], [`Vm::pause`]
//! and [`Vm::wait`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::SignalKind;
use tokio::sync::mpsc::unbounded_channel;
use tokio::time::error::Elapsed;

use fluke_abi::boot::{Extent, Gate};
use fluke_abi::port::DOORBELL_VECTOR;

use crate::boot::{self, Entrance, FlukeGuest, MachineInfo};
use crate::bus::Bus;
use crate::condition::pages::Parts;
use crate::condition::watch::Watch;
use crate::config::{
    Configuration, ConsoleSink, Guest, MEMORY_MAX, MEMORY_MIN, Preempt, Size, VmConfig,
};
use crate::control::{Control, Event};
use crate::count::{SharedCounts, Visits};
use crate::crash::Symbols;
use crate::devices::Devices;
use crate::doctor;
use crate::error::Error;
use crate::inspect::marked::Marks;
use crate::inspect::{self, Machine, View};
use crate::kick;
use crate::kvm::{self, APIC_TIMER_KHZ, Processor};
use crate::memory::Memory;
use crate::point::{Point, Step};
use crate::profile::Profile;
use crate::remote::{Status, serve};
use crate::snapshot::memory::MemoryLog;
use crate::stats::{VcpuCounters, VcpuStats};
use crate::stop::StopReason;
use crate::store::Store;
use crate::vcpu::{Command, Context, Image, KICK_AGAIN, PauseReason, Registers, Report, Vcpu};

/// A machine.
pub struct Vm {
    pub(crate) fd: VmFd,
    pub(crate) vcpus: Vec<Vcpu>,
    counters: Vec<Arc<VcpuCounters>>,
    pub(crate) memory: Memory,
    pub(crate) memory_log: MemoryLog,
    pub(crate) kind: Kind,
    pub(crate) image: Option<Image>,
    pub(crate) devices: Devices,
    store: Option<Arc<Mutex<Store>>>,
    console: ConsoleSink,
    pub(crate) control: Control,
    pub(crate) watch: Arc<Mutex<Watch>>,
    pub(crate) parts: Parts,
    pub(crate) counts: Option<SharedCounts>,
    created: Instant,
    pub(crate) running: bool,
    /// Name of the program, if that is known.
    program: Option<String>,
}

/// What a machine is from its making to its end, wherever it goes on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Kind {
    /// Of the kernel, if it is ours.
    pub configuration: Option<Configuration>,
    /// Whether programs trap by `syscall`, which not every host can do.
    pub needs_syscall: bool,
    pub processor: Processor,
    /// Frequency of the time-stamp counter, kHz.
    pub tsc_khz: u32,
    /// Where the kernel counts, if it does: physical address and bytes.
    pub stats: Option<(u64, u64)>,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Why.
    pub stop: StopReason,
    /// What the guest printed, if the console went to a buffer.
    pub console: Vec<u8>,
    /// Statistics of every vCPU.
    pub stats: Vec<VcpuStats>,
    /// Instructions of the kernel by entry point, if they were counted.
    pub counts: Vec<Visits>,
    /// Where they were, if that was wanted: folded stacks, see [`Profile::folded`].
    pub profile: Vec<String>,
    /// How often the guest has written its store.
    pub commits: u64,
    /// From building the machine to its first user-mode instruction.
    pub time_to_first_user: Option<Duration>,
    /// From building the machine to its end.
    pub elapsed: Duration,
}

impl Outcome {
    /// What the guest printed, as text.
    pub fn console_text(&self) -> String {
        String::from_utf8_lossy(&self.console).into_owned()
    }
}

impl Vm {
    /// Builds a machine. Its vCPUs wait for [`Vm::resume`].
    ///
    /// # Errors
    /// If the configuration is impossible, an image is bad, or the host refuses.
    pub fn new(config: VmConfig) -> Result<Self, Error> {
        let created = Instant::now();
        check_sizes(&config)?;
        let kvm = kvm::open()?;
        let most = kvm.get_max_vcpus();
        if config.vcpus as usize > most {
            return Err(Error::Config(format!(
                "{} vCPUs are more than KVM on this host can have; give --vcpus {most} or fewer",
                config.vcpus
            )));
        }
        if config.count && !doctor::probe().is_ok_and(|host| host.hardware_breakpoints) {
            return Err(Error::Config(
                "instructions are counted with breakpoints, which this host lacks; \
                 see `flukevm doctor`"
                    .into(),
            ));
        }
        kick::prepare().map_err(Error::host("installing a signal handler"))?;
        if config.count && config.vcpus != 1 {
            return Err(Error::Config(format!(
                "instructions are counted on one vCPU, not {}; leave --vcpus out",
                config.vcpus
            )));
        }
        let host = Processor::new(&kvm)?;
        let (memory, memory_log, processor) = match &config.guest {
            Guest::Snapshot(snapshot) => {
                snapshot.check_host(&host)?;
                let base = snapshot.memory.clone();
                let processor = snapshot.machine.kind.processor.clone();
                (base.copy_on_write()?, MemoryLog::of(base), processor)
            }
            _ => (Memory::new(config.memory)?, MemoryLog::default(), host),
        };
        let fd = kvm::create_vm(&kvm, &memory, config.vcpus, memory_log.is_on())?;
        let fds = (0..config.vcpus)
            .map(|id| fd.create_vcpu(u64::from(id)))
            .collect::<Result<Vec<_>, _>>()
            .map_err(Error::kvm("creating a vCPU; try fewer --vcpus"))?;
        let tsc_khz = fds[0].get_tsc_khz().map_err(Error::kvm(
            "reading the frequency of the time-stamp counter",
        ))?;
        let (kind, entrance, image) = lay_out(&config, &memory, processor, tsc_khz)?;
        let msrs = kvm
            .get_msr_index_list()
            .map_err(Error::kvm("reading the list of MSRs"))?;
        let msrs: Arc<[u32]> = msrs.as_slice().into();

        let mut bus = Bus::default();
        let devices = Devices::new(&mut bus, config.console.clone())
            .map_err(|e| Error::Memory(e.to_string()))?;
        let store = match &config.store {
            Some(path) => {
                let store = Store::new(path, &memory)?.plug(&mut bus);
                Some(store.map_err(|e| Error::Memory(e.to_string()))?)
            }
            None => None,
        };
        let bus = Arc::new(bus);
        let (reports, inbox) = unbounded_channel();
        let counts = config.count.then(SharedCounts::default);
        if let (Some(counts), Some(image), true) = (&counts, &image, config.profile) {
            let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
            counts.profile = Some(Profile::new(image)?);
        }
        let watch: Arc<Mutex<Watch>> = Arc::default();
        let mut vcpus = Vec::new();
        let mut counters = Vec::new();
        for (id, vcpu) in (0..).zip(fds) {
            if kind.tsc_khz != tsc_khz {
                vcpu.set_tsc_khz(kind.tsc_khz).map_err(|_| {
                    Error::Config(format!(
                        "the machine's time-stamp counter runs at {} kHz, and this host can only \
                         do {tsc_khz} kHz",
                        kind.tsc_khz
                    ))
                })?;
            }
            kind.processor.set_up(&vcpu, id, config.vcpus)?;
            if let Some(entrance) = &entrance {
                kind.processor.start(&vcpu, id, entrance)?;
            }
            let counter = Arc::new(VcpuCounters::default());
            counters.push(counter.clone());
            let context = Context {
                id,
                memory: memory.clone(),
                bus: bus.clone(),
                devices: devices.clone(),
                image: image.clone(),
                counters: counter,
                msrs: msrs.clone(),
                watch: watch.clone(),
                counts: counts.clone(),
                reports: reports.clone(),
            };
            vcpus.push(Vcpu::spawn(vcpu, context)?);
        }
        let mut machine = Self {
            fd,
            vcpus,
            counters,
            memory,
            memory_log,
            kind,
            image,
            devices,
            store,
            control: Control::new(&config, inbox)?,
            console: config.console,
            watch,
            parts: Parts::default(),
            counts,
            created,
            running: false,
            program: match &config.guest {
                Guest::Fluke { program, .. } => Some(program.name.clone()),
                _ => None,
            },
        };
        if let Guest::Snapshot(snapshot) = &config.guest {
            machine.reset(snapshot)?;
        }
        Ok(machine)
    }

    /// Runs the machine to its end.
    ///
    /// # Errors
    /// None after [`Vm::new`] succeeded; whatever the guest does is an [`Outcome`].
    pub fn run(mut self) -> Result<Outcome, Error> {
        self.resume();
        let stop = loop {
            if let Some(stop) = self.wait(Duration::MAX) {
                break stop;
            }
        };
        Ok(self.finish(stop))
    }

    /// Lets all vCPUs run.
    pub fn resume(&mut self) {
        self.forget_calls();
        self.control.start();
        self.running = true;
        self.send(&Command::Run);
    }

    /// Whether it has been let run, and has not been paused since.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Lets other processes of the user reach the machine under a name, see [`crate::remote`].
    ///
    /// # Errors
    /// If a machine has the name, or the host refuses.
    pub fn listen(&mut self, name: &str) -> Result<(), Error> {
        self.control.listen(name)
    }

    /// What the machine is, and whether it runs.
    pub fn status(&self) -> Status {
        Status {
            pid: std::process::id(),
            running: self.running,
            vcpus: self.vcpus.len() as u32,
            memory: self.memory.size(),
            kernel: self.kind.configuration.map(|kernel| kernel.to_string()),
            program: self.program.clone(),
            age_ms: self.created.elapsed().as_millis() as u64,
        }
    }

    /// Runs one vCPU to a point while the others stay paused. Returns whether it came there within
    /// `limit`, and did not have to stop at user code; it is paused in either case.
    ///
    /// # Errors
    /// The reason, if the machine stopped for good instead.
    pub fn run_to(&mut self, vcpu: u32, point: Point, limit: Duration) -> Result<bool, StopReason> {
        // Before the time runs; what is wrong with the host the vCPU says.
        let _ = point.awaits_by_out();
        self.control.start();
        self.forget_calls();
        if let Some(vcpu) = self.vcpus.get(vcpu as usize) {
            vcpu.send(Command::RunTo(point));
        }
        let deadline = Instant::now().checked_add(limit);
        loop {
            let left = deadline.map_or(Duration::MAX, |end| end.duration_since(Instant::now()));
            match self.control.next_report(left) {
                Ok(Some((id, Report::Reached))) if id == vcpu => return Ok(true),
                Ok(Some((id, Report::Paused(PauseReason::Barred)))) if id == vcpu => {
                    return Ok(false);
                }
                Ok(Some((_, report))) if report.end().is_none() => {}
                // It stopped, or the time is up: no harm in a pause, which says which.
                _ => return self.pause().map(|()| false),
            }
        }
    }

    /// Stops all vCPUs between two instructions; returns when none runs any more.
    ///
    /// # Errors
    /// The reason, if the machine stopped for good instead.
    pub fn pause(&mut self) -> Result<(), StopReason> {
        self.pause_all(|_, _| {})
    }

    /// As [`Vm::pause`]; `seen` sees each vCPU's report that it does not run any more.
    pub(crate) fn pause_all(
        &mut self,
        mut seen: impl FnMut(u32, &Report),
    ) -> Result<(), StopReason> {
        self.running = false;
        self.send(&Command::Pause);
        let all = 0..self.vcpus.len() as u32;
        let mut running: BTreeSet<u32> = all
            .filter(|id| !self.control.finished.contains(id))
            .collect();
        while !running.is_empty() {
            match self.next_report() {
                Some((id, report)) if report.settles() => {
                    seen(id, &report);
                    running.remove(&id);
                }
                Some(_) => {}
                None => break,
            }
        }
        self.control.stop.clone().map_or(Ok(()), Err)
    }

    /// Registers of a paused vCPU; none if it is not paused or does not exist.
    pub fn registers(&mut self, vcpu: u32) -> Option<Registers> {
        if self.control.finished.contains(&vcpu) {
            return None;
        }
        self.vcpus.get(vcpu as usize)?.send(Command::Registers);
        self.next_registers(vcpu)
    }

    /// The registers that a vCPU was told to report.
    pub(crate) fn next_registers(&mut self, vcpu: u32) -> Option<Registers> {
        loop {
            match self.next_report()? {
                (id, Report::Registers(registers)) if id == vcpu => return Some(*registers),
                (id, Report::Refused) if id == vcpu => return None,
                (id, report) if id == vcpu && report.end().is_some() => return None,
                _ => {}
            }
        }
    }

    /// Looks into the paused machine.
    ///
    /// # Errors
    /// If it runs no kernel that can be looked into, or there is no such thing to see.
    pub fn inspect(&mut self, view: &View) -> inspect::Result<inspect::Report> {
        self.look(|machine| inspect::look(machine, view))
    }

    /// Where a paused vCPU is, on one line.
    ///
    /// # Errors
    /// If there is no such vCPU, or it runs no kernel.
    pub fn place(&mut self, vcpu: u32) -> inspect::Result<String> {
        self.look(|machine| inspect::code::place(machine, vcpu))
    }

    /// Where a call of the thread with that hash, marked in `rbp`, is recognised in the paused machine.
    ///
    /// # Errors
    /// If there is no such thread, or the machine runs no kernel.
    pub fn marks(&mut self, hash: u64, mark: u64) -> inspect::Result<Marks> {
        self.look(|machine| inspect::marked::marks(machine, hash, mark))
    }

    /// The kernel's instructions that were counted on a vCPU's way to its last point.
    pub fn instructions(&self, vcpu: u32) -> u64 {
        let counters = self.counters.get(vcpu as usize);
        counters.map_or(0, |counters| counters.instructions.load(Ordering::Relaxed))
    }

    /// The kernel's instructions that were executed one by one on that way.
    pub fn steps(&self, vcpu: u32) -> u64 {
        let counters = self.counters.get(vcpu as usize);
        counters.map_or(0, |counters| counters.steps.load(Ordering::Relaxed))
    }

    /// How often the guest has written its store.
    pub fn commits(&self) -> u64 {
        let store = self.store.as_ref();
        store.map_or(0, |store| {
            store
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .commits()
        })
    }

    /// Those instructions, if they were noted ([`Point::ToldTraced`]).
    pub fn trace(&self, vcpu: u32) -> Vec<Step> {
        let counters = self.counters.get(vcpu as usize);
        counters.map_or_else(Vec::new, |counters| {
            let trace = counters.trace.lock();
            std::mem::take(&mut *trace.unwrap_or_else(PoisonError::into_inner))
        })
    }

    /// The kernel's function at an address, or the address.
    pub fn symbol(&self, address: u64) -> String {
        let symbols = self.image.as_ref().and_then(|image| Symbols::new(image));
        let frames = symbols.map(|symbols| symbols.frames(address));
        let frame = frames.and_then(|frames| frames.into_iter().next());
        frame.unwrap_or_else(|| format!("{address:#x}"))
    }

    /// Rings the doorbell, [`DOORBELL_VECTOR`], on a vCPU.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn ring(&self, vcpu: u32) -> Result<(), Error> {
        self.inject(vcpu, DOORBELL_VECTOR)
    }

    pub(crate) fn look<T>(
        &mut self,
        look: impl FnOnce(&Machine<'_>) -> inspect::Result<T>,
    ) -> inspect::Result<T> {
        let vcpus = 0..self.vcpus.len() as u32;
        let vcpus = vcpus.map(|id| self.registers(id)).collect();
        let image = self.image.as_ref().ok_or(inspect::Error::NoKernel)?;
        look(&Machine {
            memory: &self.memory,
            vcpus,
            image,
        })
    }

    /// Waits until every vCPU has answered the command it was sent; the answers, in order of vCPUs.
    /// `answer` takes them out of the reports.
    ///
    /// # Errors
    /// If a vCPU does not do what it was told.
    pub(crate) fn answers<T>(
        &mut self,
        answer: impl Fn(Report) -> Option<Result<T, Error>>,
    ) -> Result<Vec<T>, Error> {
        let mut answers = BTreeMap::new();
        while answers.len() < self.vcpus.len() {
            if self.control.ended {
                let stop = self.control.stop.as_ref();
                let why = stop.map_or("its vCPUs have ended".into(), ToString::to_string);
                return Err(Error::Config(format!("the machine has failed: {why}")));
            }
            match self.next_report() {
                Some((id, Report::Refused)) => {
                    return Err(Error::Config(format!("vCPU {id} is not paused")));
                }
                Some((id, report)) => {
                    if let Some(answer) = answer(report) {
                        answers.insert(id, answer?);
                    }
                }
                None => self.control.ended = true,
            }
        }
        Ok(answers.into_values().collect())
    }

    /// Waits for a report; none if no vCPU is left to make one.
    pub(crate) fn next_report(&mut self) -> Option<(u32, Report)> {
        loop {
            match self.control.next_report(KICK_AGAIN) {
                Ok(report) => return report,
                Err(Elapsed { .. }) => self.vcpus.iter().for_each(Vcpu::nudge),
            }
        }
    }

    /// Guest memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Waits until the machine stops, at most for `limit`; none if it still runs then.
    ///
    /// Meanwhile it answers other processes, if it [listens](Vm::listen): they may pause it.
    pub fn wait(&mut self, limit: Duration) -> Option<StopReason> {
        let limit = Instant::now().checked_add(limit);
        loop {
            match self.next_event(limit) {
                Event::Stopped(stop) => return Some(stop),
                Event::Due => return None,
                Event::Asked((request, answer)) => {
                    // Whoever asked may be gone.
                    let _ = answer.send(serve(self, &request));
                }
                // Nobody debugs a machine that is waited for so.
                Event::Hit(..) | Event::Said(_) => {}
            }
        }
    }

    /// Waits until something happens, at most until `limit`.
    pub(crate) fn next_event(&mut self, limit: Option<Instant>) -> Event {
        let Self { vcpus, control, .. } = self;
        let sample = || vcpus.iter().for_each(|v| v.send(Command::Sample));
        control.wait(limit, sample)
    }

    /// From now on a signal ends a [`Vm::wait`] as its limit does.
    ///
    /// # Errors
    /// If the host refuses.
    pub fn notice(&mut self, kind: SignalKind) -> Result<(), Error> {
        self.control.notice(kind)
    }

    /// Frequency of the guest's time-stamp counter, kHz.
    pub fn tsc_khz(&self) -> u32 {
        self.kind.tsc_khz
    }

    /// Configuration of the kernel, if it is ours.
    pub fn configuration(&self) -> Option<Configuration> {
        self.kind.configuration
    }

    /// Ends all vCPUs and says how it went.
    pub fn finish(mut self, stop: StopReason) -> Outcome {
        let elapsed = self.created.elapsed();
        self.send(&Command::Finish);
        self.vcpus.iter_mut().for_each(Vcpu::join);
        self.devices.flush();
        let stats = self.kind.stats;
        let stats = stats.map(|(start, size)| Extent { start, size });
        let stats = (0..)
            .zip(&self.counters)
            .map(|(id, counters)| VcpuStats::collect(id, counters, &self.memory, stats))
            .collect();
        let counted = |counts: SharedCounts| {
            let counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
            let profile = counts.profile.as_ref().zip(self.image.as_ref());
            let folded = profile.map(|(profile, image)| profile.folded(image));
            (counts.rows(), folded.unwrap_or_default())
        };
        let (counts, profile) = self.counts.take().map(counted).unwrap_or_default();
        let console = match &self.console {
            ConsoleSink::Buffer(buffer) => buffer
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            _ => Vec::new(),
        };
        let commits = self.commits();
        self.store = None;
        let first_user = self.devices.first_user.get();
        Outcome {
            stop,
            console,
            stats,
            counts,
            profile,
            commits,
            time_to_first_user: first_user.map(|t| t.duration_since(self.created)),
            elapsed,
        }
    }

    pub(crate) fn send(&self, command: &Command) {
        self.vcpus.iter().for_each(|v| v.send(command.clone()));
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // All at once, rather than each with its own wait.
        self.send(&Command::Finish);
    }
}

pub(crate) fn check_sizes(config: &VmConfig) -> Result<(), Error> {
    let memory = Size(config.memory);
    if config.vcpus == 0 {
        return Err(Error::Config(
            "a machine needs a vCPU; give --vcpus 1 or more".into(),
        ));
    }
    if config.memory < MEMORY_MIN {
        return Err(Error::Config(format!(
            "{memory} of memory is too little; give --mem {} or more",
            Size(MEMORY_MIN)
        )));
    }
    if config.memory > MEMORY_MAX {
        return Err(Error::Config(format!(
            "{memory} of memory is too much; give --mem {} or less",
            Size(MEMORY_MAX)
        )));
    }
    if let Guest::Snapshot(snapshot) = &config.guest
        && (config.vcpus, config.memory) != (snapshot.vcpus(), snapshot.memory_size())
    {
        return Err(Error::Config(
            "a saved machine has the vCPUs and the memory that it had".into(),
        ));
    }
    if !config.memory.is_multiple_of(4096) {
        return Err(Error::Config(format!(
            "{memory} of memory is no whole number of pages; give a multiple of 4 KiB"
        )));
    }
    Ok(())
}

/// Fills the memory. Returns what the machine is, how its vCPUs start if they do not go on from
/// somewhere, and the image that has the symbols.
pub(crate) fn lay_out(
    config: &VmConfig,
    memory: &Memory,
    processor: Processor,
    tsc_khz: u32,
) -> Result<(Kind, Option<Entrance>, Option<Image>), Error> {
    let mut kind = Kind {
        configuration: None,
        needs_syscall: false,
        processor,
        tsc_khz,
        stats: None,
    };
    match &config.guest {
        Guest::Flat(code) => Ok((kind, Some(boot::flat(memory, code)?), None)),
        Guest::Fluke {
            kernel,
            configuration,
            root,
            program,
            args,
            files,
            mutant,
        } => {
            let gate = doctor::gate()?;
            let machine = MachineInfo {
                cpus: config.vcpus,
                gate,
                tsc_khz: u64::from(tsc_khz) * u64::from(config.slowness),
                apic_timer_khz: APIC_TIMER_KHZ * u64::from(config.slowness),
                preemption_points: configuration.preempt() != Preempt::None,
                clock: config.clock,
                store: config.store.is_some(),
            };
            let guest = FlukeGuest {
                kernel,
                root,
                program,
                args,
                files,
                mutant: *mutant,
            };
            let entrance = boot::fluke(memory, &machine, &guest)?;
            kind.configuration = Some(*configuration);
            kind.needs_syscall = gate == Gate::Syscall;
            kind.stats = entrance.stats.map(|stats| (stats.start, stats.size));
            Ok((kind, Some(entrance), Some(Arc::new(kernel.clone()))))
        }
        Guest::Snapshot(snapshot) => {
            let image = snapshot.image.clone();
            Ok((snapshot.machine.kind.clone(), None, image))
        }
    }
}
