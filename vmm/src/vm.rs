//! A machine from its configuration to its end.
//!
//! [`Vm::new`] builds everything and starts the vCPU threads, paused. [`Vm::run`] is all that most
//! callers want; tests and tools drive the machine themselves with [`Vm::resume`], [`Vm::pause`]
//! and [`Vm::wait`]. The control plane (reports, timeout, signals, sampling) is a tokio runtime in
//! the caller's thread; it never waits for anything while holding what a vCPU needs.

use std::collections::BTreeSet;
use std::future::pending;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::error::Elapsed;
use tokio::time::{Interval, MissedTickBehavior, interval, sleep_until, timeout};

use fluke_abi::boot::Extent;

use crate::boot::{self, Entrance, FlukeGuest, MachineInfo};
use crate::bus::Bus;
use crate::config::{ConsoleSink, Guest, MEMORY_MAX, MEMORY_MIN, Preempt, Size, VmConfig};
use crate::count::{SharedCounts, Visits};
use crate::devices::Devices;
use crate::doctor;
use crate::error::Error;
use crate::kick;
use crate::kvm::{self, APIC_TIMER_KHZ, Processor};
use crate::memory::Memory;
use crate::stats::{VcpuCounters, VcpuStats};
use crate::stop::StopReason;
use crate::store::Store;
use crate::vcpu::{Command, Context, Image, KICK_AGAIN, Registers, Report, Vcpu};

/// A machine.
pub struct Vm {
    vcpus: Vec<Vcpu>,
    counters: Vec<Arc<VcpuCounters>>,
    memory: Memory,
    stats: Option<Extent>,
    devices: Devices,
    store: Option<Arc<Mutex<Store>>>,
    console: ConsoleSink,
    control: Control,
    counts: Option<SharedCounts>,
    created: Instant,
}

/// The control plane.
struct Control {
    runtime: Runtime,
    reports: UnboundedReceiver<(u32, Report)>,
    /// The first reason to stop that a vCPU gave; the machine has stopped when there is one.
    stop: Option<StopReason>,
    /// vCPUs that will not report any more.
    finished: BTreeSet<u32>,
    timeout: Option<Duration>,
    /// When the machine first ran.
    started: Option<Instant>,
    interrupt: Option<(Signal, Signal)>,
    sampling: Option<Interval>,
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
        let memory = Memory::new(config.memory)?;
        let vm = kvm::create_vm(&kvm, &memory, config.vcpus)?;
        let processor = Processor::new(&kvm)?;
        let fds = (0..config.vcpus)
            .map(|id| vm.create_vcpu(u64::from(id)))
            .collect::<Result<Vec<_>, _>>()
            .map_err(Error::kvm("creating a vCPU; try fewer --vcpus"))?;
        let tsc_khz = fds[0].get_tsc_khz().map_err(Error::kvm(
            "reading the frequency of the time-stamp counter",
        ))?;
        let (entrance, image) = lay_out(&config, &memory, u64::from(tsc_khz))?;

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
        let mut vcpus = Vec::new();
        let mut counters = Vec::new();
        for (id, fd) in (0..).zip(fds) {
            processor.set_up(&fd, id, config.vcpus, &entrance)?;
            let counter = Arc::new(VcpuCounters::default());
            counters.push(counter.clone());
            let context = Context {
                id,
                memory: memory.clone(),
                bus: bus.clone(),
                devices: devices.clone(),
                image: image.clone(),
                counters: counter,
                counts: counts.clone(),
                reports: reports.clone(),
            };
            vcpus.push(Vcpu::spawn(fd, context)?);
        }
        Ok(Self {
            vcpus,
            counters,
            memory,
            stats: entrance.stats,
            devices,
            store,
            control: Control::new(&config, inbox)?,
            console: config.console,
            counts,
            created,
        })
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
        self.control.started.get_or_insert_with(Instant::now);
        self.send(Command::Run);
    }

    /// Stops all vCPUs between two instructions; returns when none runs any more.
    ///
    /// # Errors
    /// The reason, if the machine stopped for good instead.
    pub fn pause(&mut self) -> Result<(), StopReason> {
        self.send(Command::Pause);
        let all = 0..self.vcpus.len() as u32;
        let mut running: BTreeSet<u32> = all
            .filter(|id| !self.control.finished.contains(id))
            .collect();
        while !running.is_empty() {
            match self.next_report() {
                Some((id, Report::Paused(_) | Report::Finished(_))) => drop(running.remove(&id)),
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
        loop {
            match self.next_report()? {
                (id, Report::Registers(registers)) if id == vcpu => return Some(*registers),
                (id, Report::Refused(_) | Report::Finished(_)) if id == vcpu => return None,
                _ => {}
            }
        }
    }

    /// Waits for a report; none if no vCPU is left to make one.
    fn next_report(&mut self) -> Option<(u32, Report)> {
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
    pub fn wait(&mut self, limit: Duration) -> Option<StopReason> {
        let Self { vcpus, control, .. } = self;
        control.wait(limit, || vcpus.iter().for_each(|v| v.send(Command::Sample)))
    }

    /// Ends all vCPUs and says how it went.
    pub fn finish(mut self, stop: StopReason) -> Outcome {
        let elapsed = self.created.elapsed();
        self.send(Command::Finish);
        self.vcpus.iter_mut().for_each(Vcpu::join);
        self.devices.flush();
        let stats = (0..)
            .zip(&self.counters)
            .map(|(id, counters)| VcpuStats::collect(id, counters, &self.memory, self.stats))
            .collect();
        let counted =
            |counts: SharedCounts| counts.lock().unwrap_or_else(PoisonError::into_inner).rows();
        let counts = self.counts.take().map(counted).unwrap_or_default();
        let console = match &self.console {
            ConsoleSink::Buffer(buffer) => buffer
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            _ => Vec::new(),
        };
        let commits = self.store.take().map_or(0, |store| {
            store
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .commits()
        });
        let first_user = self.devices.first_user.get();
        Outcome {
            stop,
            console,
            stats,
            counts,
            commits,
            time_to_first_user: first_user.map(|t| t.duration_since(self.created)),
            elapsed,
        }
    }

    fn send(&self, command: Command) {
        self.vcpus.iter().for_each(|v| v.send(command));
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // All at once, rather than each with its own wait.
        self.send(Command::Finish);
    }
}

impl Control {
    fn new(config: &VmConfig, reports: UnboundedReceiver<(u32, Report)>) -> Result<Self, Error> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::host("starting the control plane"))?;
        let guard = runtime.enter();
        let interrupt = match config.signals {
            true => Some((
                signal(SignalKind::interrupt()).map_err(Error::host("catching SIGINT"))?,
                signal(SignalKind::terminate()).map_err(Error::host("catching SIGTERM"))?,
            )),
            false => None,
        };
        let sampling = config.sampling.map(|period| {
            let mut ticks = interval(period);
            // Samples missed while the host was busy would not be samples of different times.
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            ticks
        });
        drop(guard);
        Ok(Self {
            runtime,
            reports,
            stop: None,
            finished: BTreeSet::new(),
            timeout: config.timeout,
            started: None,
            interrupt,
            sampling,
        })
    }

    /// Waits for a report, at most for `limit`; none if no vCPU is left to make one.
    fn next_report(&mut self, limit: Duration) -> Result<Option<(u32, Report)>, Elapsed> {
        let report = self
            .runtime
            .block_on(async { timeout(limit, self.reports.recv()).await })?;
        if let Some((id, Report::Finished(stop))) = &report {
            self.finished.insert(*id);
            if self.stop.is_none() {
                self.stop.clone_from(stop);
            }
        }
        Ok(report)
    }

    fn wait(&mut self, limit: Duration, sample: impl Fn()) -> Option<StopReason> {
        if let Some(stop) = &self.stop {
            return Some(stop.clone());
        }
        let now = Instant::now();
        let limit = now.checked_add(limit);
        let timeout = self.timeout;
        let deadline = timeout.and_then(|t| self.started.unwrap_or(now).checked_add(t));
        let Self {
            reports,
            interrupt,
            sampling,
            finished,
            ..
        } = self;
        let found = self.runtime.block_on(async {
            loop {
                tokio::select! {
                    biased;
                    report = reports.recv() => match report {
                        Some((id, Report::Finished(stop))) => {
                            finished.insert(id);
                            if stop.is_some() {
                                return stop;
                            }
                        }
                        Some(_) => {}
                        None => return Some(StopReason::VcpuFailed {
                            vcpu: 0,
                            why: "all vCPU threads ended without a reason".into(),
                            crash: None,
                        }),
                    },
                    name = interrupted(interrupt) => return Some(StopReason::Interrupted(name)),
                    () = until(deadline) => {
                        return Some(StopReason::Timeout(timeout.unwrap_or_default()));
                    }
                    () = until(limit) => return None,
                    () = tick(sampling) => sample(),
                }
            }
        });
        self.stop.clone_from(&found);
        found
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time.into()).await,
        None => pending().await,
    }
}

async fn tick(ticks: &mut Option<Interval>) {
    match ticks {
        Some(ticks) => drop(ticks.tick().await),
        None => pending().await,
    }
}

/// Waits for a signal that ends the machine; its name.
async fn interrupted(signals: &mut Option<(Signal, Signal)>) -> &'static str {
    match signals {
        Some((interrupt, terminate)) => tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
        },
        None => pending().await,
    }
}

fn check_sizes(config: &VmConfig) -> Result<(), Error> {
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
    if !config.memory.is_multiple_of(4096) {
        return Err(Error::Config(format!(
            "{memory} of memory is no whole number of pages; give a multiple of 4 KiB"
        )));
    }
    Ok(())
}

/// Fills the memory. Returns how vCPUs start, and the image that has the symbols.
fn lay_out(
    config: &VmConfig,
    memory: &Memory,
    tsc_khz: u64,
) -> Result<(Entrance, Option<Image>), Error> {
    match &config.guest {
        Guest::Flat(code) => Ok((boot::flat(memory, code)?, None)),
        Guest::Fluke {
            kernel,
            preempt,
            root,
            program,
            args,
            files,
        } => {
            let machine = MachineInfo {
                cpus: config.vcpus,
                gate: doctor::gate()?,
                tsc_khz,
                apic_timer_khz: APIC_TIMER_KHZ,
                preemption_points: *preempt != Preempt::None,
                clock: config.clock,
                store: config.store.is_some(),
            };
            let guest = FlukeGuest {
                kernel,
                root,
                program,
                args,
                files,
            };
            let entrance = boot::fluke(memory, &machine, &guest)?;
            Ok((entrance, Some(Arc::new(kernel.clone()))))
        }
    }
}
