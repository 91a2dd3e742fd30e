//! Takes a scene apart at each of its points.
//!
//! A point is an instruction of the kernel's in the scene's marked call. To come to it again and again, the
//! machine is put back to a snapshot a few points before, and steps to it. There the doorbell rings; the machine
//! then runs to the end of the scene.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use fluke_abi::audit::{MARK, News, Outcome, TARGET_HASH, Told};
use fluke_abi::entry::{Row, TABLE};
use fluke_abi::layout::KERNEL_IMAGE;
use fluke_abi::port::DOORBELL_VECTOR;
use zerocopy::{FromBytes, FromZeros};

use super::cell::{Cell, Divergence, Findings, PROGRAM, Plan};
use super::elsewhere::Elsewhere;
use super::interleave::{Ended, Interleaving, tells};
use super::state::{State, difference};
use crate::config::{Configuration, VmConfig};
use crate::count::SWAPGS_IRETQ;
use crate::error::Error;
use crate::image;
use crate::inspect::View;
use crate::inspect::marked::Marks;
use crate::paging::read_virtual;
use crate::point::{Point, Slice};
use crate::snapshot::Snapshot;
use crate::stop::StopReason;
use crate::vm::Vm;

/// Until a scene is set.
pub(super) const SETTING_PATIENCE: Duration = Duration::from_secs(20);
/// A scene that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(5);
/// Of the flags.
const INTERRUPT_FLAG: u64 = 1 << 9;
/// Instructions to step before a snapshot is worth while.
const SNAPSHOT_STEPS: u64 = 64;

/// What a scene without a point does.
const NO_POINTS: &str = "comes to its end, but this host does not stop at the kernel's instructions in it, so that \
                         there is nothing to verify; `flukevm doctor` says what the host can do";

/// How a scene ended.
pub(super) enum End {
    Done(Box<Outcome>),
    Stopped(StopReason),
    Hangs,
}

/// Why a cell cannot be explored.
pub(super) enum Unplayable {
    /// The host fails.
    Host(Error),
    /// The scene does something else than come to its end.
    Scene(String),
}

impl Unplayable {
    /// For who can do nothing without that cell.
    pub(super) fn of(self, cell: &Cell) -> Error {
        match self {
            Self::Host(error) => error,
            Self::Scene(why) => {
                let (why, threads) = why.split_once('\n').unwrap_or((&why, ""));
                if !threads.is_empty() {
                    tracing::warn!("{cell}\n{threads}");
                }
                Error::Control(format!("{cell}: the scene {why}"))
            }
        }
    }
}

impl From<Error> for Unplayable {
    fn from(error: Error) -> Self {
        Self::Host(error)
    }
}

/// A cell that is being explored.
pub struct Explorer {
    cell: Cell,
    row: &'static Row,
    pub(super) vm: Vm,
    pub(super) marks: Marks,
    pub(super) ready: Snapshot,
    /// The snapshot to step on from, its point, and the pages in which it may differ from `ready`.
    pub(super) base: (Snapshot, u64, BTreeSet<u64>),
    /// The machine has been stepped on from the point that it was put to.
    left: bool,
    /// States of the machine from which it was played on, with the divergence that came of it.
    played: HashMap<u128, Option<usize>>,
    undisturbed: Outcome,
    /// Points that there are.
    pub points: u64,
    /// Instructions at CPL 0 of an undisturbed run.
    steps: u64,
    /// Of a kernel stack.
    pub(super) stack_bytes: u64,
    /// Where the target is put together, if not where it is taken apart.
    elsewhere: Option<Elsewhere>,
}

impl Explorer {
    /// Sets the scene, plays it undisturbed, and counts its points. `into`: the target is put together in a second
    /// machine, of that configuration.
    ///
    /// # Errors
    /// If the machine cannot be built, or the scene does not come to its end.
    pub(super) fn new(cell: Cell, into: Option<Configuration>) -> Result<Self, Unplayable> {
        let elsewhere = into.map(Elsewhere::new).transpose()?;
        let machine = match &elsewhere {
            Some(elsewhere) => elsewhere.machine(&cell)?,
            None => cell.machine()?,
        };
        let explorer = Self::with(cell, machine, None)?;
        Ok(Self {
            elsewhere,
            ..explorer
        })
    }

    /// As [`new`](Self::new), on a machine that plays the cell's scene; undisturbed it must do the same as `like`,
    /// if given.
    pub(super) fn with(
        cell: Cell,
        machine: VmConfig,
        like: Option<&Self>,
    ) -> Result<Self, Unplayable> {
        let fails = |why: String| Unplayable::Scene(why);
        let entry = cell.scene.split('-').next();
        let row = TABLE.iter().find(|row| Some(row.name) == entry);
        let row = row.ok_or_else(|| fails("names no entry point".into()))?;
        let mut vm = Vm::new(machine)?;
        let set = |came| match came {
            Ok(true) => Ok(()),
            Ok(false) => Err(fails("cannot be set".into())),
            Err(stop) => Err(fails(format!("cannot be set: {stop}"))),
        };
        set(vm.run_to(0, Point::FirstUser, SETTING_PATIENCE))?;
        for vcpu in 1..cell.vcpus {
            set(vm.run_to(vcpu, Point::Slice(Slice::to_halt()), SETTING_PATIENCE))?;
        }
        set(vm.run_to(0, Point::Told, SETTING_PATIENCE))?;
        if told(&mut vm, 0).is_none_or(|told| told.news != News::Ready as u64) {
            return Err(fails("cannot be set".into()));
        }
        let ready = vm.snapshot()?;
        let image = ready
            .image
            .as_ref()
            .ok_or_else(|| fails("has no kernel".into()))?;
        let stack_bytes = image::check_kernel(PROGRAM, image)?.1.stack_bytes;
        let marks = vm
            .marks(TARGET_HASH, MARK)
            .map_err(|error| fails(error.to_string()))?;
        let mut explorer = Self {
            undisturbed: Outcome::new_zeroed(),
            points: 0,
            steps: 0,
            stack_bytes,
            elsewhere: None,
            cell,
            row,
            vm,
            marks,
            base: (ready.clone(), 0, BTreeSet::new()),
            left: false,
            ready,
            played: HashMap::new(),
        };
        // Twice, step by step and, on one vCPU, without: both come to the same end, and one counts.
        explorer.undisturbed = explorer.stepped()?;
        if explorer.points == 0 {
            return Err(fails(NO_POINTS.into()));
        }
        let again = match explorer.cell.vcpus {
            1 => {
                explorer.vm.reset(&explorer.ready)?;
                let (end, _) = play_out(&mut explorer.vm, PATIENCE);
                explorer.ended(end)?
            }
            _ => explorer.stepped()?,
        };
        if again != explorer.undisturbed {
            return Err(fails("does not always end the same way".into()));
        }
        if let Some(what) = like.and_then(|like| difference(&again, &like.undisturbed)) {
            return Err(fails(format!("ends otherwise: {what}")));
        }
        Ok(explorer)
    }

    /// The undisturbed outcome, of a run in which instructions are counted.
    fn stepped(&mut self) -> Result<Outcome, Unplayable> {
        let mut interleaving = Interleaving::new(self.steps, self.cell.vcpus, self.steps);
        self.vm.reset(&self.ready)?;
        let (end, _) = self.interleaved(&mut interleaving);
        (self.points, self.steps) = (interleaving.marked, interleaving.steps);
        self.ended(end)
    }

    fn ended(&mut self, end: End) -> Result<Outcome, Unplayable> {
        match end {
            End::Done(outcome) => Ok(*outcome),
            End::Stopped(stop) => Err(Unplayable::Scene(stop.to_string())),
            End::Hangs => Err(Unplayable::Scene(format!("hangs\n{}", self.threads()))),
        }
    }

    /// Looks at the points of the plan. `tick` is called after each; it says whether to go on.
    ///
    /// # Errors
    /// If the host fails.
    pub fn explore(
        mut self,
        plan: &Plan,
        tick: &dyn Fn(&Findings) -> bool,
    ) -> Result<Findings, Error> {
        let started = Instant::now();
        let mut findings = Findings::none(self.cell.clone(), self.points);
        let points = plan.points(self.points);
        // Points before this one that are as good as this one.
        let mut waiting = 0;
        for (number, &point) in points.iter().enumerate() {
            if self.cell.vcpus > 1 {
                self.disturb_interleaved(plan.seed, point, &mut findings)?;
                if tick(&findings) {
                    continue;
                }
                break;
            }
            let number = number as u64;
            if plan.delay_stride != 0
                && number.is_multiple_of(plan.delay_stride)
                && self.go(point)?
            {
                let delay = self.delay()?;
                *findings.delays.entry(delay).or_default() += u64::from(delay != 0);
            }
            let next = points.get(number as usize + 1);
            if !self.go(point)? {
                findings.missed += 1 + std::mem::take(&mut waiting);
            } else if self.elsewhere.is_some() {
                self.disturb_elsewhere(point, &mut findings)?;
            } else if !plan.play_all && next == Some(&(point + 1)) && self.is_as_next()? {
                waiting += 1;
            } else if self.left && !self.go(point)? {
                findings.missed += 1 + std::mem::take(&mut waiting);
            } else {
                let divergence = self.disturb(point, plan.play_all, &mut findings)?;
                findings.run += waiting;
                findings.same += waiting;
                if let Some(number) = divergence {
                    findings.diverged[number].same += waiting;
                }
                waiting = 0;
            }
            if !tick(&findings) {
                break;
            }
        }
        findings.seconds = started.elapsed().as_secs_f64();
        Ok(findings)
    }

    /// What there is to see at one point, and what comes of it.
    ///
    /// # Errors
    /// If there is no such point, or the host fails.
    pub fn replay(mut self, seed: u64, point: u64) -> Result<(String, Findings), Error> {
        let mut findings = Findings::none(self.cell.clone(), self.points);
        if self.cell.vcpus > 1 {
            self.disturb_interleaved(seed, point, &mut findings)?;
            return Ok((self.threads(), findings));
        }
        if !(1..=self.points).contains(&point) || !self.go(point)? {
            return Err(Error::Config(format!(
                "{} has no point {point}; give one from 1 to {}",
                self.cell, self.points
            )));
        }
        let stack = self.vm.inspect(&View::Stack { cpu: 0 });
        let stack = stack.map_or_else(|error| error.to_string(), |seen| seen.text);
        let text = format!("{stack}\n{}\n", self.threads());
        match self.elsewhere {
            Some(_) => self.disturb_elsewhere(point, &mut findings)?,
            None => {
                self.disturb(point, true, &mut findings)?;
            }
        }
        Ok((text, findings))
    }

    /// Puts the machine to a point, not before the last one; false if it does not come there. A point that is
    /// far is the one to step on from.
    fn go(&mut self, point: u64) -> Result<bool, Error> {
        self.left = false;
        self.vm.reset(&self.base.0)?;
        let points = point - self.base.1;
        if points == 0 {
            return Ok(true);
        }
        let to = Point::Marked(self.marks.calls[0], points);
        let came = self.vm.run_to(0, to, PATIENCE);
        if !matches!(came, Ok(true)) || self.vm.instructions(0) != points {
            return Ok(false);
        }
        if self.vm.steps(0) > SNAPSHOT_STEPS {
            self.base.2.extend(self.vm.written()?);
            (self.base.0, self.base.1) = (self.vm.snapshot()?, point);
        }
        Ok(true)
    }

    /// The instruction that is next on a vCPU.
    fn place(&mut self, vcpu: u32) -> u64 {
        let registers = self.vm.registers(vcpu);
        registers.map_or(0, |registers| registers.general.rip)
    }

    /// Rings, and sees what comes of it: here, where the target goes on as a checkpoint that was read back, and in
    /// another machine.
    fn disturb_elsewhere(&mut self, point: u64, findings: &mut Findings) -> Result<(), Error> {
        let place = self.place(0);
        let commits = self.vm.commits();
        self.vm.ring(0)?;
        findings.run += 1;
        let (end, mut state) = play_out(&mut self.vm, SETTING_PATIENCE);
        let in_time = state.is_some();
        if !in_time {
            late(&mut self.vm, PATIENCE, &mut state);
        }
        let mut what = self.judge(end, state.as_ref());
        if let (None, true, Some(elsewhere)) = (&what, in_time, &self.elsewhere) {
            what = match self.vm.commits() > commits {
                true => elsewhere.goes_on(&self.undisturbed)?,
                false => Some("the target cannot be written to a file".into()),
            };
        }
        self.note(point, place, what, state, findings);
        Ok(())
    }

    /// Whether the doorbell, if it rings here, is heard no sooner than if it rings at the next point: between them is
    /// one instruction of the kernel's, before and after which interrupts are off (SDM vol. 3, 7.8.1). Takes that step.
    fn is_as_next(&mut self) -> Result<bool, Error> {
        let off = |vm: &mut Vm| {
            let registers = vm.registers(0)?;
            let open = registers.general.rflags & INTERRUPT_FLAG != 0;
            (!open).then_some(registers.general.rip)
        };
        let Some(rip) = off(&mut self.vm) else {
            return Ok(false);
        };
        // The way to user code is one step, and so is all that happens there.
        let code: Option<[u8; 3]> = self.vm.memory().get(rip.wrapping_sub(KERNEL_IMAGE)).ok();
        if code.is_none_or(|code| SWAPGS_IRETQ.starts_with(&code)) {
            return Ok(false);
        }
        self.left = true;
        let next = Point::Marked(self.marks.calls[0], 1);
        let came = matches!(self.vm.run_to(0, next, PATIENCE), Ok(true));
        Ok(came && self.vm.steps(0) == 1 && off(&mut self.vm).is_some())
    }

    /// Rings, and sees what comes of it: the number of the divergence, if there is one.
    fn disturb(
        &mut self,
        point: u64,
        play: bool,
        findings: &mut Findings,
    ) -> Result<Option<usize>, Error> {
        let place = self.place(0);
        self.vm.ring(0)?;
        findings.run += 1;
        let doorbell = Point::Interrupt(DOORBELL_VECTOR);
        // Where the machine may be in a state that it was in before: at the interrupt, and once the target's
        // state has been taken, with nothing on its kernel stack.
        let (mut end, mut state) = (None, None);
        let mut machine = Vec::new();
        if !play {
            for to in [doorbell, Point::Told] {
                if !matches!(self.vm.run_to(0, to, PATIENCE), Ok(true)) {
                    break;
                }
                if tells(&mut self.vm, 0) {
                    end = heard(&mut self.vm, 0, &mut state);
                }
                if end.is_some() {
                    break;
                }
                let digest = self.digest(to == Point::Told)?;
                if let Some(divergence) = self.played.get(&digest) {
                    findings.same += 1;
                    if let Some(number) = *divergence {
                        findings.diverged[number].same += 1;
                    }
                    let divergence = *divergence;
                    self.played
                        .extend(machine.into_iter().map(|other| (other, divergence)));
                    return Ok(divergence);
                }
                machine.push(digest);
            }
        }
        let end = match end {
            Some(end) => end,
            None => {
                let (end, taken) = play_out(&mut self.vm, PATIENCE);
                state = state.or(taken);
                end
            }
        };
        if let (End::Done(_), None) = (&end, &state) {
            late(&mut self.vm, PATIENCE, &mut state);
        }
        let what = self.judge(end, state.as_ref());
        let number = what.as_ref().map(|_| findings.diverged.len());
        self.played
            .extend(machine.into_iter().map(|digest| (digest, number)));
        self.note(point, place, what, state, findings);
        Ok(number)
    }

    /// As [`disturb`](Self::disturb), on several vCPUs: one of the interleavings of that seed and point.
    fn disturb_interleaved(
        &mut self,
        seed: u64,
        point: u64,
        findings: &mut Findings,
    ) -> Result<(), Error> {
        self.vm.reset(&self.ready)?;
        let seed = seed << 32 ^ point;
        let mut interleaving = Interleaving::new(seed, self.cell.vcpus, self.steps);
        let end = match interleaving.run(&mut self.vm, &self.marks, point) {
            Ended::Marked(vcpu) => {
                let place = self.place(vcpu);
                self.vm.ring(interleaving.raise())?;
                findings.run += 1;
                let (end, mut state) = self.interleaved(&mut interleaving);
                if let (End::Done(_), None) = (&end, &state)
                    && let Ended::Told(vcpu) = interleaving.run(&mut self.vm, &self.marks, u64::MAX)
                {
                    heard(&mut self.vm, vcpu, &mut state);
                }
                let what = self.judge(end, state.as_ref());
                self.note(point, place, what, state, findings);
                return Ok(());
            }
            // In this interleaving the call is shorter.
            Ended::Told(_) => {
                findings.missed += 1;
                return Ok(());
            }
            Ended::Stopped(stop) => End::Stopped(stop),
            Ended::Hangs => End::Hangs,
        };
        findings.run += 1;
        let what = self.judge(end, None);
        self.note(point, 0, what, None, findings);
        Ok(())
    }

    /// What is wrong with an end.
    fn judge(&mut self, end: End, state: Option<&State>) -> Option<String> {
        let what = match end {
            End::Done(_) if state.is_none() => Some(format!(
                "the auditor does not hear the doorbell:\n{}",
                self.threads()
            )),
            End::Done(outcome) => difference(&outcome, &self.undisturbed),
            End::Stopped(stop) => Some(stop.to_string()),
            End::Hangs => Some(format!("the scene hangs:\n{}", self.threads())),
        };
        let illegal = state.filter(|state| !state.is_legal(self.row));
        what.or(illegal.map(|state| format!("no entry into the kernel: {state:x?}")))
    }

    fn note(
        &mut self,
        point: u64,
        place: u64,
        what: Option<String>,
        state: Option<State>,
        findings: &mut Findings,
    ) {
        if let Some(what) = what {
            findings.diverged.push(Divergence {
                point,
                place: self.vm.symbol(place),
                what,
                same: 0,
            });
        }
        findings.states.extend(state);
    }

    fn threads(&mut self) -> String {
        let seen = self.vm.inspect(&View::Threads);
        seen.map_or_else(|error| error.to_string(), |seen| seen.text)
    }

    /// The same on several vCPUs.
    fn interleaved(&mut self, interleaving: &mut Interleaving) -> (End, Option<State>) {
        let mut state = None;
        loop {
            let end = match interleaving.run(&mut self.vm, &self.marks, u64::MAX) {
                Ended::Told(vcpu) => heard(&mut self.vm, vcpu, &mut state),
                Ended::Stopped(stop) => Some(End::Stopped(stop)),
                Ended::Hangs | Ended::Marked(_) => Some(End::Hangs),
            };
            if let Some(end) = end {
                return (end, state);
            }
        }
    }

    /// Rings, and counts the kernel's instructions until the auditor has the state; 0 if it does not get it.
    fn delay(&mut self) -> Result<u64, Error> {
        self.vm.ring(0)?;
        let came = self.vm.run_to(0, Point::ToldCounted, PATIENCE);
        let taken = matches!(came, Ok(true))
            && told(&mut self.vm, 0).is_some_and(|told| told.news == News::Taken as u64);
        Ok(if taken { self.vm.instructions(0) } else { 0 })
    }
}

/// Runs to the end of the scene; with the state of the target, if it was taken.
pub(super) fn play_out(vm: &mut Vm, patience: Duration) -> (End, Option<State>) {
    let mut state = None;
    loop {
        match vm.run_to(0, Point::Told, patience) {
            Ok(true) => {}
            Ok(false) => return (End::Hangs, state),
            Err(stop) => return (End::Stopped(stop), state),
        }
        if let Some(end) = heard(vm, 0, &mut state) {
            return (end, state);
        }
    }
}

/// The same, when the scene has ended: the doorbell may have rung too late for the state to be taken before.
fn late(vm: &mut Vm, patience: Duration, state: &mut Option<State>) {
    if matches!(vm.run_to(0, Point::Told, patience), Ok(true)) {
        heard(vm, 0, state);
    }
}

/// What the program has told on a vCPU: the end, perhaps.
fn heard(vm: &mut Vm, vcpu: u32, state: &mut Option<State>) -> Option<End> {
    let told = told(vm, vcpu)?;
    match News::from_number(told.news)? {
        News::Taken => *state = Some(State::new(&told.state.registers)),
        News::Done => return Some(End::Done(Box::new(told.outcome))),
        News::Ready | News::Failed => {}
    }
    None
}

/// What the program has told.
fn told(vm: &mut Vm, vcpu: u32) -> Option<Told> {
    let registers = vm.registers(vcpu)?;
    let (root, at) = (registers.special.cr3, registers.general.rdi);
    let bytes = read_virtual(vm.memory(), root, at, size_of::<Told>());
    Told::read_from_bytes(&bytes).ok()
}
