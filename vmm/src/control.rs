//! The control plane: what a machine hears from its vCPUs, from the clock, from signals and from other
//! processes.
//!
//! It is a tokio runtime in the caller's thread, and never waits for anything while holding what a
//! vCPU needs.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::error::Elapsed;
use tokio::time::{Interval, MissedTickBehavior, interval, sleep_until, timeout};

use crate::config::VmConfig;
use crate::error::Error;
use crate::gdb::address::Address;
use crate::gdb::line::{Line, Said};
use crate::remote::server::{Asked, Server};
use crate::stop::StopReason;
use crate::vcpu::{PauseReason, Report};

/// The control plane of a machine.
pub struct Control {
    runtime: Runtime,
    reports: UnboundedReceiver<(u32, Report)>,
    /// The first reason to stop that a vCPU gave; the machine has stopped when there is one.
    pub stop: Option<StopReason>,
    /// vCPUs that have stopped for good, and do not answer.
    pub finished: BTreeSet<u32>,
    /// Whether a vCPU has ended its thread.
    pub ended: bool,
    /// vCPUs that have stopped for the debugger, which has not heard of it, with DR6.
    pub hits: BTreeMap<u32, u64>,
    timeout: Option<Duration>,
    /// When the machine first ran.
    started: Option<Instant>,
    interrupt: Option<(Signal, Signal)>,
    /// A signal that ends a wait.
    notice: Option<Signal>,
    sampling: Option<Interval>,
    /// Where other processes ask.
    server: Option<Server>,
    /// Where a debugger connects.
    debugger: Option<Line>,
}

/// What ended a wait.
pub enum Event {
    /// The machine has stopped.
    Stopped(StopReason),
    /// Another process asks for something.
    Asked(Asked),
    /// A vCPU has stopped for the debugger, with this in DR6.
    Hit(u32, u64),
    /// The debugger says something.
    Said(Said),
    /// The time is up, or the signal came.
    Due,
}

impl Control {
    /// For vCPUs that report to the other end of `reports`.
    ///
    /// # Errors
    /// If the host refuses.
    pub fn new(
        config: &VmConfig,
        reports: UnboundedReceiver<(u32, Report)>,
    ) -> Result<Self, Error> {
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
            ended: false,
            hits: BTreeMap::new(),
            timeout: config.timeout,
            started: None,
            interrupt,
            notice: None,
            sampling,
            server: None,
            debugger: None,
        })
    }

    /// The machine runs; its time counts from the first time.
    pub fn start(&mut self) {
        self.started.get_or_insert_with(Instant::now);
    }

    /// From now on this signal ends a wait.
    ///
    /// # Errors
    /// If the host refuses.
    pub fn notice(&mut self, kind: SignalKind) -> Result<(), Error> {
        let _guard = self.runtime.enter();
        let caught = signal(kind).map_err(Error::host("catching a signal"))?;
        self.notice = Some(caught);
        Ok(())
    }

    /// From now on waits end when another process asks for something under this name.
    ///
    /// # Errors
    /// If a machine has the name, or the host refuses.
    pub fn listen(&mut self, name: &str) -> Result<(), Error> {
        let _guard = self.runtime.enter();
        self.server = Some(Server::open(name)?);
        Ok(())
    }

    /// From now on waits end when a debugger that connects there says something. Returns where that is, with
    /// the port that was free.
    ///
    /// # Errors
    /// If the host refuses.
    pub fn expect_debugger(&mut self, address: &Address) -> Result<Address, Error> {
        let _guard = self.runtime.enter();
        let line = Line::open(address)?;
        let address = line.address().clone();
        self.debugger = Some(line);
        Ok(address)
    }

    /// Says something to the debugger. Whether it takes it.
    pub fn answer_debugger(&mut self, text: &[u8]) -> bool {
        match &mut self.debugger {
            Some(line) => self.runtime.block_on(line.say(text)),
            None => false,
        }
    }

    /// Hangs up on the debugger; another may connect.
    pub fn drop_debugger(&mut self) {
        if let Some(line) = &mut self.debugger {
            line.hang_up();
        }
    }

    /// All vCPUs have been given a state: whatever stopped the machine is undone.
    pub fn start_over(&mut self) {
        self.stop = None;
        self.finished.clear();
        self.started = None;
    }

    /// Waits for a report, at most for `limit`; none if no vCPU is left to make one.
    pub fn next_report(&mut self, limit: Duration) -> Result<Option<(u32, Report)>, Elapsed> {
        let report = self
            .runtime
            .block_on(async { timeout(limit, self.reports.recv()).await })?;
        if let Some((id, Report::Paused(PauseReason::Hit(dr6)))) = &report {
            self.hits.insert(*id, *dr6);
        }
        if let Some((id, report)) = &report
            && let Some(stop) = report.end()
        {
            self.finished.insert(*id);
            self.ended |= matches!(report, Report::Ended(_));
            if self.stop.is_none() {
                self.stop = stop.cloned();
            }
        }
        Ok(report)
    }

    /// Waits until the machine stops, another process asks for something, or the signal noticed comes;
    /// at most until `limit`.
    pub fn wait(&mut self, limit: Option<Instant>, sample: impl Fn()) -> Event {
        if let Some(stop) = &self.stop {
            return Event::Stopped(stop.clone());
        }
        if let Some((vcpu, dr6)) = self.hits.pop_first() {
            return Event::Hit(vcpu, dr6);
        }
        let now = Instant::now();
        let timeout = self.timeout;
        let deadline = timeout.and_then(|t| self.started.unwrap_or(now).checked_add(t));
        let Self {
            reports,
            interrupt,
            notice,
            sampling,
            finished,
            ended,
            server,
            debugger,
            ..
        } = self;
        let event = self.runtime.block_on(async {
            loop {
                tokio::select! {
                    biased;
                    report = reports.recv() => match report {
                        Some((id, Report::Paused(PauseReason::Hit(dr6)))) => {
                            return Event::Hit(id, dr6);
                        }
                        Some((id, report)) => {
                            if let Some(stop) = report.end() {
                                finished.insert(id);
                                *ended |= matches!(report, Report::Ended(_));
                                if let Some(stop) = stop {
                                    return Event::Stopped(stop.clone());
                                }
                            }
                        }
                        None => return Event::Stopped(StopReason::VcpuFailed {
                            vcpu: 0,
                            why: "all vCPU threads ended without a reason".into(),
                            crash: None,
                        }),
                    },
                    name = interrupted(interrupt) => {
                        return Event::Stopped(StopReason::Interrupted(name));
                    }
                    () = until(deadline) => {
                        let timeout = timeout.unwrap_or_default();
                        return Event::Stopped(StopReason::Timeout(timeout));
                    }
                    () = until(limit) => return Event::Due,
                    () = noticed(notice) => return Event::Due,
                    asked = asked(server) => return Event::Asked(asked),
                    said = said(debugger) => return Event::Said(said),
                    () = tick(sampling) => sample(),
                }
            }
        });
        if let Event::Stopped(stop) = &event {
            self.stop = Some(stop.clone());
        }
        event
    }
}

/// Waits for a request of another process.
async fn asked(server: &mut Option<Server>) -> Asked {
    if let Some(server) = server
        && let Some(asked) = server.next().await
    {
        return asked;
    }
    pending().await
}

/// Waits for the debugger to say something.
async fn said(debugger: &mut Option<Line>) -> Said {
    match debugger {
        Some(line) => line.next().await,
        None => pending().await,
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

async fn noticed(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
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
