//! Machines with several vCPUs, whose interleaving the host chooses: one vCPU runs at a time, by priorities that
//! a seed gives them and changes at a few instructions (probabilistic concurrency testing: Burckhardt,
//! Kothari, Musuvathi, Nagarakatte, ASPLOS 2010).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use fastrand::Rng;
use fluke_abi::layout::KERNEL_IMAGE;
use fluke_abi::port::Event;

use crate::count::HLT;
use crate::inspect::marked::Marks;
use crate::point::{Point, Slice};
use crate::stop::StopReason;
use crate::vcpu::Registers;
use crate::vm::Vm;

/// How often priorities change in a run.
const CHANGES: usize = 3;
/// Longest time of user code, or of an interrupt on its way to a vCPU that was kicked.
const SLICE_PATIENCE: Duration = Duration::from_millis(20);
/// For a timer to fire while all vCPUs are idle.
const IDLE_PATIENCE: Duration = Duration::from_millis(5);
/// `out dx, eax`.
const OUT: u8 = 0xef;
/// A run that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same, while all vCPUs are idle.
const IDLE_LIMIT: Duration = Duration::from_secs(2);

/// All of these on a host on which the kernel is changed to be stopped: KVM that is itself emulated.
const SLOWER: u32 = 10;

/// What ended a run.
pub enum Ended {
    /// A program tells of something, on that vCPU.
    Told(u32),
    /// So many instructions of the call were executed, the last on that vCPU.
    Marked(u32),
    /// The machine stopped.
    Stopped(StopReason),
    /// Nothing happens any more.
    Hangs,
}

/// An interleaving that is being played.
pub struct Interleaving {
    random: Rng,
    /// vCPUs, the most important first.
    order: Vec<u32>,
    /// Instructions after which the vCPU that runs becomes the least important, the next last.
    changes: Vec<u64>,
    /// vCPUs that stand where they would wait for an interrupt.
    halted: BTreeSet<u32>,
    /// Instructions at CPL 0 so far.
    pub steps: u64,
    /// Those in the call.
    pub marked: u64,
}

impl Interleaving {
    /// The one of that seed, of a run of about so many instructions.
    pub fn new(seed: u64, vcpus: u32, steps: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let mut order: Vec<_> = (0..vcpus).collect();
        random.shuffle(&mut order);
        let mut changes: Vec<_> = (0..CHANGES).map(|_| random.u64(0..steps.max(1))).collect();
        changes.sort_unstable_by(|a, b| b.cmp(a));
        Self {
            random,
            order,
            changes,
            // All but the first, to which the scene was set.
            halted: (1..vcpus).collect(),
            steps: 0,
            marked: 0,
        }
    }

    /// A vCPU by chance, which becomes the most important.
    pub fn raise(&mut self) -> u32 {
        let vcpu = self.order.remove(self.random.usize(0..self.order.len()));
        self.order.insert(0, vcpu);
        vcpu
    }

    /// Lets the vCPUs run in turn until a program tells of something, or `marked` instructions of the call
    /// were executed from the start.
    pub fn run(&mut self, vm: &mut Vm, marks: &Marks, marked: u64) -> Ended {
        let slower = match Point::Slice(Slice::to_halt()).awaits_by_out() {
            Ok(true) => SLOWER,
            _ => 1,
        };
        let started = Instant::now();
        let (mut idle, mut idles) = (started, 0);
        while started.elapsed() < PATIENCE * slower && idle.elapsed() < IDLE_LIMIT * slower {
            let says = |vcpu: u32| vm.memory().get::<u8>(marks.idle[vcpu as usize]);
            let waits =
                |vcpu| self.halted.contains(&vcpu) && says(vcpu).is_ok_and(|idle| idle != 0);
            let ready = self.order.iter().copied().find(|&vcpu| !waits(vcpu));
            let (vcpu, patience) = match ready {
                Some(vcpu) => (vcpu, SLICE_PATIENCE),
                None => (self.order[idles % self.order.len()], IDLE_PATIENCE),
            };
            let until = self
                .changes
                .last()
                .map_or(u64::MAX, |&at| at.max(self.steps + 1));
            let slice = Slice {
                steps: until - self.steps,
                call: marks.calls[vcpu as usize],
                marked: marked - self.marked,
            };
            let came = match vm.run_to(vcpu, Point::Slice(slice), patience * slower) {
                Ok(came) => came,
                Err(stop) => return Ended::Stopped(stop),
            };
            let steps = vm.steps(vcpu);
            self.steps += steps;
            self.marked += vm.instructions(vcpu);
            match steps {
                0 => idles += 1,
                _ => idle = Instant::now(),
            }
            match stands(vm, vcpu).0 {
                [_, HLT] => self.halted.insert(vcpu),
                // It was paused while it waited.
                [HLT, _] if steps == 0 => self.halted.insert(vcpu),
                _ => self.halted.remove(&vcpu),
            };
            // It may have come there when its time was up.
            if (came || steps > 0) && tells(vm, vcpu) {
                return Ended::Told(vcpu);
            }
            if self.marked == marked {
                return Ended::Marked(vcpu);
            }
            let changes = self.steps >= until;
            if changes {
                self.changes.pop();
            }
            // Who only waits lets others be first, and so does user code that takes long.
            if changes || ready.is_some() {
                self.demote(vcpu);
            }
        }
        Ended::Hangs
    }

    fn demote(&mut self, vcpu: u32) {
        self.order.retain(|&other| other != vcpu);
        self.order.push(vcpu);
    }
}

/// Whether a vCPU stands behind the instruction by which the kernel passes on what a program tells.
pub fn tells(vm: &mut Vm, vcpu: u32) -> bool {
    let (code, rax) = stands(vm, vcpu);
    code[0] == OUT && rax as u32 == Event::Told as u32
}

/// The last byte of kernel code before where a vCPU stands, and the first from there; and its `rax`.
fn stands(vm: &mut Vm, vcpu: u32) -> ([u8; 2], u64) {
    let Some(Registers { general, .. }) = vm.registers(vcpu) else {
        return ([0; 2], 0);
    };
    let before = general.rip.wrapping_sub(KERNEL_IMAGE + 1);
    (vm.memory().get(before).unwrap_or_default(), general.rax)
}
