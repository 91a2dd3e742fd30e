//! One cell: a scene in one configuration, taken apart at each of its points.
//!
//! A point is an instruction of the kernel's in the scene's marked call. To come to it again and again, the
//! machine is put back to a snapshot a few points before, and steps to it. There the doorbell rings; the machine
//! then runs to the end of the scene.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hasher};
use std::time::{Duration, Instant};

use fluke_abi::audit::{LOST, MARK, News, Outcome, RAISED, TARGET_HASH, Told};
use fluke_abi::code::{Exception, Insanity, Status};
use fluke_abi::entry::{Entry, Row, TABLE};
use fluke_abi::ipc::CallWord;
use fluke_abi::layout::{GATE, KERNEL_STACKS, PAGE_SIZE};
use fluke_abi::port::DOORBELL_VECTOR;
use fluke_abi::state::Registers;
use serde::Serialize;
use zerocopy::{FromBytes, FromZeros};

use crate::config::{Configuration, VmConfig};
use crate::error::Error;
use crate::image;
use crate::inspect::View;
use crate::inspect::marked::Marks;
use crate::memory::Memory;
use crate::paging::{read_virtual, translate};
use crate::point::{Point, Slice};
use crate::snapshot::Snapshot;
use crate::stop::StopReason;
use crate::vm::Vm;

use super::interleave::{Ended, Interleaving, tells};

/// The program that plays the scenes.
pub const PROGRAM: &str = "audit";

/// Memory of the machine, bytes.
const MEMORY: u64 = 24 << 20;
/// The same, until a scene is set.
const SETTING_PATIENCE: Duration = Duration::from_secs(20);
/// A scene that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(5);
/// Instructions to step before a snapshot is worth while.
const SNAPSHOT_STEPS: u64 = 64;

/// Which points of a cell to look at.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Every so many, at least 1.
    pub stride: u64,
    /// Of these at most so many, chosen at random.
    pub budget: Option<u64>,
    /// Of the choice.
    pub seed: u64,
    /// Count how long the state takes at every so many of the points looked at; 0 is never.
    pub delay_stride: u64,
    /// Play on from every point, even if the machine is in a state from which it was played on before.
    pub play_all: bool,
}

/// A cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// Name of the scene.
    pub scene: String,
    /// Kernel.
    #[serde(serialize_with = "display")]
    pub configuration: Configuration,
    /// Number of vCPUs.
    pub vcpus: u32,
}

fn display<S: serde::Serializer>(value: &Configuration, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

/// The state of the target, as the auditor found it; what means nothing is zero.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct State {
    /// The entry point that it is about to call, or none in user code.
    pub entry: Option<&'static str>,
    /// Its registers: rip, rax, rdi, rsi, rdx, r10, r8, r9, r12, r13, r14, r15, rbx, rbp, rsp, rflags.
    pub registers: [u64; 16],
}

impl State {
    fn new(r: &Registers) -> Self {
        let calls = r.rip == GATE;
        let entry = Entry::from_number(CallWord(r.rax).number()).filter(|_| calls);
        Self {
            entry: entry.map(|entry| entry.row().name),
            // rcx and r11 are the trap instruction's.
            registers: [
                r.rip, r.rax, r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9, r.r12, r.r13, r.r14, r.r15,
                r.rbx, r.rbp, r.rsp, r.rflags,
            ],
        }
    }

    /// Whether it is that of the marked call, before it or behind it.
    pub fn is_in_call(&self) -> bool {
        self.registers[13] == MARK
    }

    /// Whether the call that it names, if it is the marked one or what is left of it, may be found there.
    fn is_legal(&self, call: &Row) -> bool {
        let [rip, _, .., rbp, _, _] = self.registers;
        if rip != GATE {
            return true;
        }
        let rest = || call.restart_points.iter().map(|entry| entry.row().name);
        match self.entry {
            Some(name) if rbp == MARK => name == call.name || rest().any(|other| other == name),
            Some(_) => true,
            None => false,
        }
    }
}

/// A point after which the machine did not do what it does undisturbed.
#[derive(Clone, Debug, Serialize)]
pub struct Divergence {
    /// Number of the point, from 1.
    pub point: u64,
    /// Where the kernel was.
    pub place: String,
    /// What happened instead.
    pub what: String,
    /// Later points that were the same.
    pub same: u64,
}

/// What was found in a cell.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    /// The cell.
    #[serde(flatten)]
    pub cell: Cell,
    /// Points that there are.
    pub points: u64,
    /// Points looked at.
    pub run: u64,
    /// Of these, points after which the doorbell's interrupt found all registers and all memory, but for times,
    /// as after an earlier one: what comes of it is known.
    pub same: u64,
    /// Points that were not come to again: something else, the clock most often, happened before.
    pub missed: u64,
    /// What went wrong.
    pub diverged: Vec<Divergence>,
    /// States that were extracted.
    pub states: BTreeSet<State>,
    /// How many kernel instructions from the doorbell until the auditor had the state, and how often.
    pub delays: BTreeMap<u64, u64>,
    /// Time, seconds.
    pub seconds: f64,
}

/// How a scene ended.
enum End {
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

impl From<Error> for Unplayable {
    fn from(error: Error) -> Self {
        Self::Host(error)
    }
}

/// A cell that is being explored.
pub struct Explorer {
    cell: Cell,
    row: &'static Row,
    vm: Vm,
    marks: Marks,
    ready: Snapshot,
    /// The snapshot to step on from, its point, and the pages in which it may differ from `ready`.
    base: (Snapshot, u64, BTreeSet<u64>),
    /// States of the machine from which it was played on, with the divergence that came of it.
    played: HashMap<u128, Option<usize>>,
    undisturbed: Outcome,
    /// Points that there are.
    pub points: u64,
    /// Instructions at CPL 0 of an undisturbed run.
    steps: u64,
    /// Of a kernel stack.
    stack_bytes: u64,
}

impl Explorer {
    /// Sets the scene, plays it undisturbed, and counts its points.
    ///
    /// # Errors
    /// If the machine cannot be built, or the scene does not come to its end.
    pub fn new(cell: Cell) -> Result<Self, Error> {
        let machine = cell.machine()?;
        Self::with(cell.clone(), machine, None).map_err(|unplayable| match unplayable {
            Unplayable::Host(error) => error,
            Unplayable::Scene(why) => {
                let (why, threads) = why.split_once('\n').unwrap_or((&why, ""));
                if !threads.is_empty() {
                    tracing::warn!("{cell}\n{threads}");
                }
                Error::Config(format!("{cell}: the scene {why}"))
            }
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
            cell,
            row,
            vm,
            marks,
            base: (ready.clone(), 0, BTreeSet::new()),
            ready,
            played: HashMap::new(),
        };
        // Twice, step by step and, on one vCPU, without: both come to the same end, and one counts.
        explorer.undisturbed = explorer.stepped()?;
        let again = match explorer.cell.vcpus {
            1 => {
                explorer.vm.reset(&explorer.ready)?;
                let (end, _) = explorer.end();
                explorer.ended(end)?
            }
            _ => explorer.stepped()?,
        };
        if again != explorer.undisturbed {
            return Err(fails("does not always end the same way".into()));
        }
        if let Some(what) = like.and_then(|like| like.difference(&again)) {
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
        let mut findings = self.nothing();
        for (number, point) in plan.points(self.points).into_iter().enumerate() {
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
            if self.go(point)? {
                self.disturb(point, plan.play_all, &mut findings)?;
            } else {
                findings.missed += 1;
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
        let mut findings = self.nothing();
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
        self.disturb(point, true, &mut findings)?;
        Ok((text, findings))
    }

    /// Nothing found yet.
    fn nothing(&self) -> Findings {
        Findings {
            cell: self.cell.clone(),
            points: self.points,
            run: 0,
            same: 0,
            missed: 0,
            diverged: Vec::new(),
            states: BTreeSet::new(),
            delays: BTreeMap::new(),
            seconds: 0.0,
        }
    }

    /// Puts the machine to a point, not before the last one; false if it does not come there. A point that is
    /// far is the one to step on from.
    fn go(&mut self, point: u64) -> Result<bool, Error> {
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

    /// Rings, and sees what comes of it.
    fn disturb(&mut self, point: u64, play: bool, findings: &mut Findings) -> Result<(), Error> {
        let place = self
            .vm
            .registers(0)
            .map_or(0, |registers| registers.general.rip);
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
                    end = self.heard(0, &mut state);
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
                    return Ok(());
                }
                machine.push(digest);
            }
        }
        let end = match end {
            Some(end) => end,
            None => {
                let (end, taken) = self.end();
                state = state.or(taken);
                end
            }
        };
        let what = self.judge(end, state.as_ref());
        let number = what.as_ref().map(|_| findings.diverged.len());
        self.played
            .extend(machine.into_iter().map(|digest| (digest, number)));
        self.note(point, place, what, state, findings);
        Ok(())
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
                let registers = self.vm.registers(vcpu);
                let place = registers.map_or(0, |registers| registers.general.rip);
                self.vm.ring(interleaving.raise())?;
                findings.run += 1;
                let (end, state) = self.interleaved(&mut interleaving);
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
            End::Done(_) if state.is_none() && !self.is_taken() => {
                Some("the auditor does not hear the doorbell".into())
            }
            End::Done(outcome) => self.difference(&outcome),
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

    /// Pages of the kernel stacks that have nothing on them, by physical address, once the target is stopped.
    fn dead(&mut self) -> BTreeSet<u64> {
        let Some((top, pointer)) = self.marks.stack else {
            return BTreeSet::new();
        };
        let Some(registers) = self.vm.registers(0) else {
            return BTreeSet::new();
        };
        let memory = self.vm.memory();
        let stopped = memory.get::<u64>(pointer).is_ok_and(|pointer| pointer == 0);
        let cpu = KERNEL_STACKS + 2 * self.stack_bytes;
        let tops = [Some(cpu), stopped.then_some(top)];
        let pages = tops.into_iter().flatten().flat_map(|top| {
            let pages = (top - self.stack_bytes..top).step_by(PAGE_SIZE as usize);
            pages.filter_map(|page| translate(memory, registers.special.cr3, page))
        });
        pages
            .map(|translation| translation.pa & !(PAGE_SIZE - 1))
            .collect()
    }

    /// Whether the state is taken once the scene has ended, as far as that can be said: the doorbell may ring too
    /// late for it to be taken before.
    fn is_taken(&mut self) -> bool {
        self.cell.vcpus > 1
            || matches!(self.vm.run_to(0, Point::Told, PATIENCE), Ok(true))
                && told(&mut self.vm, 0).is_some_and(|told| told.news == News::Taken as u64)
    }

    /// Digest of all that the paused machine is, but for times: registers, and memory as far as it is not that
    /// of the scene when it was set. `taken`: kernel stacks that have nothing on them are left out, which are the
    /// target's and the CPU's while a thread runs on its own.
    fn digest(&mut self, taken: bool) -> Result<u128, Error> {
        let mut hashers = [(); 2].map(|()| DefaultHasher::new());
        let mut add = |bytes: &[u8]| hashers.iter_mut().for_each(|hasher| hasher.write(bytes));
        if let Some(registers) = self.vm.registers(0) {
            add(format!("{registers:x?}").as_bytes());
        }
        let mut pages = self.base.2.clone();
        pages.extend(self.vm.written()?);
        let dead = if taken { self.dead() } else { BTreeSet::new() };
        for at in pages.difference(&dead).copied() {
            let read = |memory: &Memory| -> Result<_, Error> {
                let mut page = [0; PAGE_SIZE as usize];
                memory.read(at, &mut page)?;
                Ok(page)
            };
            let mut page = read(self.vm.memory())?;
            for &time in self
                .marks
                .times
                .iter()
                .filter(|&&time| time & !(PAGE_SIZE - 1) == at)
            {
                let from = (time - at) as usize;
                page[from..from + 8].fill(0);
            }
            if page != read(&self.ready.memory)? {
                add(&at.to_le_bytes());
                add(&page);
            }
        }
        // Both hash the same; what comes after tells them apart.
        hashers[1].write(&[1]);
        let [first, second] = hashers.map(|hasher| u128::from(hasher.finish()));
        Ok(first << 64 | second)
    }

    fn threads(&mut self) -> String {
        let seen = self.vm.inspect(&View::Threads);
        seen.map_or_else(|error| error.to_string(), |seen| seen.text)
    }

    /// Runs to the end of the scene; with the state of the target, if it was taken.
    fn end(&mut self) -> (End, Option<State>) {
        let mut state = None;
        loop {
            match self.vm.run_to(0, Point::Told, PATIENCE) {
                Ok(true) => {}
                Ok(false) => return (End::Hangs, state),
                Err(stop) => return (End::Stopped(stop), state),
            }
            if let Some(end) = self.heard(0, &mut state) {
                return (end, state);
            }
        }
    }

    /// The same on several vCPUs.
    fn interleaved(&mut self, interleaving: &mut Interleaving) -> (End, Option<State>) {
        let mut state = None;
        loop {
            let end = match interleaving.run(&mut self.vm, &self.marks, u64::MAX) {
                Ended::Told(vcpu) => self.heard(vcpu, &mut state),
                Ended::Stopped(stop) => Some(End::Stopped(stop)),
                Ended::Hangs | Ended::Marked(_) => Some(End::Hangs),
            };
            if let Some(end) = end {
                return (end, state);
            }
        }
    }

    /// What the program has told on a vCPU: the end, perhaps.
    fn heard(&mut self, vcpu: u32, state: &mut Option<State>) -> Option<End> {
        let told = told(&mut self.vm, vcpu)?;
        match News::from_number(told.news)? {
            News::Taken => *state = Some(State::new(&told.state.registers)),
            News::Done => return Some(End::Done(Box::new(told.outcome))),
            News::Ready | News::Failed => {}
        }
        None
    }

    /// Rings, and counts the kernel's instructions until the auditor has the state; 0 if it does not get it.
    fn delay(&mut self) -> Result<u64, Error> {
        self.vm.ring(0)?;
        let came = self.vm.run_to(0, Point::ToldCounted, PATIENCE);
        let taken = matches!(came, Ok(true))
            && told(&mut self.vm, 0).is_some_and(|told| told.news == News::Taken as u64);
        Ok(if taken { self.vm.instructions(0) } else { 0 })
    }

    /// In what an outcome differs from the undisturbed one.
    fn difference(&self, outcome: &Outcome) -> Option<String> {
        let pairs = |who, now: &[u64], then: &[u64]| {
            let mut pairs = now.iter().zip(then).enumerate();
            pairs
                .find(|(_, (now, then))| now != then)
                .map(|(n, (&now, &then))| {
                    let (now, then) = (result(now), result(then));
                    format!("call {} of the {who} ended with {now}, not {then}", n + 1)
                })
        };
        let undisturbed = &self.undisturbed;
        pairs("target", &outcome.target, &undisturbed.target)
            .or_else(|| pairs("partner", &outcome.partner, &undisturbed.partner))
            .or_else(|| {
                (outcome.memory != undisturbed.memory)
                    .then(|| "the memory that the calls fill is otherwise".into())
            })
    }
}

/// The result of a call for people.
fn result(rax: u64) -> String {
    let of = |mark: u64| rax >> 48 == mark >> 48;
    let (code, subcode) = (rax >> 32 & 0xffff, rax & 0xffff_ffff);
    let name = match Exception::from_number(code) {
        _ if of(LOST) => "lost registers".into(),
        Some(Exception::Insanity) if of(RAISED) => Insanity::from_number(subcode)
            .map_or("an insanity".into(), |insanity| {
                format!("the insanity {}", insanity.name())
            }),
        Some(exception) if of(RAISED) => format!("the exception {}", exception.name()),
        _ => CallWord(rax)
            .status()
            .map_or("no status", Status::name)
            .into(),
    };
    format!("{name} ({rax:#x})")
}

impl Plan {
    /// How many of so many points to look at.
    pub fn count(&self, points: u64) -> u64 {
        self.points(points).len() as u64
    }

    /// Numbers of the points to look at, of so many, in order.
    fn points(&self, points: u64) -> Vec<u64> {
        let mut random = fastrand::Rng::with_seed(self.seed);
        let first = 1 + random.u64(0..self.stride.max(1));
        let mut chosen: Vec<_> = (first..=points)
            .step_by(self.stride.max(1) as usize)
            .collect();
        if let Some(budget) = self.budget {
            random.shuffle(&mut chosen);
            chosen.truncate(budget as usize);
            chosen.sort_unstable();
        }
        chosen
    }
}

/// Scenes that tell who comes first by priorities, which on several vCPUs does not hold.
const IN_ORDER: [&str; 6] = [
    "thread_get_state",
    "thread_interrupt",
    "thread_sleep",
    "thread_sleep-state",
    "thread_schedule",
    "mutex_lock-interrupt",
];

impl Cell {
    /// Whether the scene can be played on several vCPUs.
    pub fn is_for_several(&self) -> bool {
        !IN_ORDER.contains(&self.scene.as_str())
    }

    /// The machine that plays its scene.
    ///
    /// # Errors
    /// If there is no such kernel or program.
    pub fn machine(&self) -> Result<VmConfig, Error> {
        let scene = std::slice::from_ref(&self.scene);
        let config = VmConfig::fluke(self.configuration, PROGRAM, scene)?;
        Ok(config.memory(MEMORY).vcpus(self.vcpus))
    }
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} in {}/{}", self.scene, self.configuration, self.vcpus)
    }
}

/// What the program has told.
fn told(vm: &mut Vm, vcpu: u32) -> Option<Told> {
    let registers = vm.registers(vcpu)?;
    let (root, at) = (registers.special.cr3, registers.general.rdi);
    let bytes = read_virtual(vm.memory(), root, at, size_of::<Told>());
    Told::read_from_bytes(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(stride: u64, budget: Option<u64>) -> Plan {
        Plan {
            stride,
            budget,
            seed: 7,
            delay_stride: 0,
            play_all: false,
        }
    }

    #[test]
    fn all_points_are_looked_at_or_a_choice() {
        assert_eq!(plan(1, None).points(5), [1, 2, 3, 4, 5]);
        let some = plan(3, None).points(100);
        assert!(
            some.windows(2).all(|pair| pair[1] - pair[0] == 3),
            "{some:?}"
        );
        assert!(some[0] <= 3 && some.last().unwrap() > &97);
        let few = plan(1, Some(4)).points(1000);
        assert!(few.len() == 4 && few.is_sorted(), "{few:?}");
        assert_eq!(few, plan(1, Some(4)).points(1000));
        assert!(plan(1, Some(4)).points(0).is_empty());
    }

    #[test]
    fn what_is_left_of_a_call_is_legal_and_nothing_else() {
        let state = |entry: Entry, rip, rbp| {
            State::new(&Registers {
                rax: entry as u64,
                rip,
                rbp,
                ..Registers::default()
            })
        };
        let call = Entry::cond_wait.row();
        assert!(state(Entry::cond_wait, GATE, MARK).is_legal(call));
        assert!(state(Entry::mutex_lock, GATE, MARK).is_legal(call));
        assert!(!state(Entry::mutex_unlock, GATE, MARK).is_legal(call));
        assert!(state(Entry::mutex_unlock, GATE, 0).is_legal(call));
        assert!(state(Entry::mutex_unlock, 0x1000, MARK).is_legal(call));
    }
}
