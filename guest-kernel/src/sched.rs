//! Scheduling: which thread runs on which CPU.
//!
//! Every CPU has run queues by priority and takes the first thread of the highest. A thread that
//! becomes ready is queued where it was woken: most often its waker is about to sleep, and runs it
//! next without disturbing anybody. Only when a CPU leaves to user mode with others still queued does
//! it bring in an idle CPU, or one that runs something less important, which takes from it. The
//! timer runs only when somebody else wants the CPU, or somebody sleeps.

use fluke_abi::stats::CpuStats;

use crate::arch::apic;
use crate::arch::cpu::Cpu;
use crate::arena::{Arena, Id};
use crate::boundary::start::is_online;
use crate::kernel::Kernel;
use crate::mm::Space;
use crate::model;
use crate::queue::Queue;
use crate::thread::{Run, Thread, Wait};

/// Nanoseconds that a thread runs before another of its priority gets the CPU.
pub const QUANTUM_NS: u64 = 10_000_000;

/// Levels of priority.
const PRIORITIES: usize = fluke_abi::state::PRIORITY_MAX as usize + 1;

/// Ready threads of a CPU.
pub struct RunQueue {
    queues: [Queue<Thread>; PRIORITIES],
    /// Bit `p`: queue `p` is not empty.
    occupied: u32,
}

impl Default for RunQueue {
    fn default() -> Self {
        Self {
            queues: [const { Queue::new() }; PRIORITIES],
            occupied: 0,
        }
    }
}

impl RunQueue {
    /// Whether nobody is ready.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.occupied == 0
    }

    /// Highest priority of a ready thread.
    #[inline]
    pub const fn highest(&self) -> Option<u8> {
        if self.occupied == 0 {
            None
        } else {
            Some(31 - self.occupied.leading_zeros() as u8)
        }
    }

    /// Appends a thread of the given priority.
    pub fn push(&mut self, threads: &mut Arena<Thread>, id: Id<Thread>, priority: u8) {
        self.queues[priority as usize].push(threads, id);
        self.occupied |= 1 << priority;
    }

    /// Takes out a thread that is in the queue of that priority.
    pub fn remove(&mut self, threads: &mut Arena<Thread>, id: Id<Thread>, priority: u8) {
        let queue = &mut self.queues[priority as usize];
        queue.remove(threads, id);
        if queue.is_empty() {
            self.occupied &= !(1 << priority);
        }
    }

    /// Takes out the first thread of the highest priority.
    pub fn pop(&mut self, threads: &mut Arena<Thread>) -> Option<Id<Thread>> {
        let priority = self.highest()?;
        let id = self.queues[priority as usize].first()?;
        self.remove(threads, id, priority);
        Some(id)
    }
}

/// What the kernel knows of a CPU.
pub struct CpuState {
    /// What the stubs know of it; `None` until it has come up.
    pub hardware: Option<&'static mut Cpu>,
    /// The thread that runs.
    pub current: Option<Id<Thread>>,
    /// Waits for an interrupt; or has not come up, and will then.
    pub idle: bool,
    /// Somebody else should have the CPU.
    pub reschedule: bool,
    /// A page table in use here lost an entry.
    pub flush: bool,
    /// The space whose page table is loaded.
    pub loaded: Option<Id<Space>>,
    /// The thread whose x87 and SSE registers are in the CPU.
    pub fpu_owner: Option<Id<Thread>>,
    /// When the timer will fire, nanoseconds; 0 if it is off.
    pub timer: u64,
    /// Counters for the host, in memory that the host reads.
    pub stats: Stats,
}

impl Default for CpuState {
    fn default() -> Self {
        Self {
            hardware: None,
            current: None,
            idle: true,
            reschedule: false,
            flush: false,
            loaded: None,
            fpu_owner: None,
            timer: 0,
            stats: Default::default(),
        }
    }
}

/// Where a CPU counts.
#[derive(Default)]
pub struct Stats(Option<&'static mut CpuStats>);

impl Stats {
    /// Counts in the host's block.
    pub const fn new(block: &'static mut CpuStats) -> Self {
        Self(Some(block))
    }

    /// Counts something.
    #[inline]
    pub fn count(&mut self, counter: fn(&mut CpuStats) -> &mut u64) {
        if let Some(block) = &mut self.0 {
            *counter(block) += 1;
        }
    }
}

impl Kernel {
    /// Lets a thread run: queues it on this CPU, or with whoever schedules it. A thread that runs
    /// already runs on.
    pub fn make_ready(&mut self, id: Id<Thread>) {
        let number = self.cpu_number();
        if matches!(self.threads[id].run, Run::Running(_) | Run::Ready(_)) {
            return;
        }
        let Some(priority) = self.entitlement(id) else {
            return self.ask_for_time(id);
        };
        self.queue(id, priority);
        let running = self.runs_at(number);
        let cpu = &mut self.cpus[number as usize];
        cpu.reschedule |= running.is_some_and(|running| running < priority);
    }

    /// Puts a thread into this CPU's run queue.
    fn queue(&mut self, id: Id<Thread>, priority: u8) {
        let number = self.cpu_number();
        let thread = &mut self.threads[id];
        thread.run = Run::Ready(number);
        thread.runs_at = priority;
        self.ready[number as usize].push(&mut self.threads, id, priority);
    }

    /// The priority of what runs on a CPU.
    fn runs_at(&self, cpu: u32) -> Option<u8> {
        let current = self.cpus[cpu as usize].current?;
        Some(self.threads[current].runs_at)
    }

    /// Before this CPU leaves the kernel with threads queued: brings in the CPU that has least to do,
    /// if it has less to do than the first of them is worth.
    fn share(&mut self) {
        let here = self.cpu_number();
        let Some(waiting) = self.ready[here as usize].highest() else {
            return;
        };
        let mut best: Option<(u32, Option<u8>)> = None;
        for (number, cpu) in (0..).zip(self.cpus.iter()) {
            let running = self.runs_at(number);
            let free = if running.is_none() {
                cpu.idle && is_online(number)
            } else {
                running < Some(waiting)
            };
            if number != here && free && best.is_none_or(|(_, other)| running < other) {
                best = Some((number, running));
            }
        }
        if let Some((number, _)) = best {
            let cpu = &mut self.cpus[number as usize];
            cpu.reschedule = cpu.current.is_some();
            cpu.idle = false;
            self.kick(number);
        }
    }

    /// Puts a thread to sleep, which is in no queue.
    pub fn sleep(&mut self, id: Id<Thread>, wait: Wait) {
        self.threads[id].run = Run::Waiting(wait);
        let threads = &mut self.threads;
        match wait {
            Wait::Mutex(on) => self.mutexes[on].waiters.push(threads, id),
            Wait::Cond(on) => self.conds[on].waiters.push(threads, id),
            Wait::Port(on) => self.ports[on].clients.push(threads, id),
            Wait::Pset(on) => self.psets[on].servers.push(threads, id),
            Wait::Stop(on) => {
                let mut stoppers = core::mem::take(&mut threads[on].stoppers);
                stoppers.push(threads, id);
                threads[on].stoppers = stoppers;
            }
            Wait::Sleep(deadline) => self.insert_sleeper(id, deadline),
            Wait::Schedule { target, port } => {
                self.ports[port].donors.push(threads, id);
                return self.begin_donation(id, target);
            }
            Wait::Ask(on) => return self.ports[on].clients.push(threads, id),
            Wait::Time(on) => return self.ports[on].wanting.push(threads, id),
            Wait::Reply(_)
            | Wait::Send(_)
            | Wait::Receive(_)
            | Wait::Over(_)
            | Wait::Ack(_)
            | Wait::Forever => {}
        }
        if self.threads[id].donor.is_some() {
            self.threads[id].asked = false;
            self.time_unused(id);
        }
    }

    /// Takes a thread out of the queue of what it waits for.
    pub fn unqueue(&mut self, id: Id<Thread>, wait: Wait) {
        let threads = &mut self.threads;
        match wait {
            Wait::Mutex(on) => self.mutexes[on].waiters.remove(threads, id),
            Wait::Cond(on) => self.conds[on].waiters.remove(threads, id),
            Wait::Port(on) => self.ports[on].clients.remove(threads, id),
            Wait::Pset(on) => self.psets[on].servers.remove(threads, id),
            Wait::Stop(on) => {
                let mut stoppers = core::mem::take(&mut threads[on].stoppers);
                stoppers.remove(threads, id);
                threads[on].stoppers = stoppers;
            }
            Wait::Sleep(_) => self.sleepers.remove(threads, id),
            Wait::Schedule { target, port } => {
                self.ports[port].donors.remove(threads, id);
                self.end_donation(target);
            }
            Wait::Ask(on) => self.ports[on].clients.remove(threads, id),
            Wait::Time(on) => self.ports[on].wanting.remove(threads, id),
            Wait::Reply(_)
            | Wait::Send(_)
            | Wait::Receive(_)
            | Wait::Over(_)
            | Wait::Ack(_)
            | Wait::Forever => {}
        }
    }

    /// Wakes a sleeping thread: it looks at its registers again.
    pub fn wake(&mut self, id: Id<Thread>) {
        if let Run::Waiting(wait) = self.threads[id].run {
            self.unqueue(id, wait);
            self.make_ready(id);
        }
    }

    fn insert_sleeper(&mut self, id: Id<Thread>, deadline: u64) {
        let mut next = self.sleepers.first();
        while let Some(other) = next {
            match self.threads[other].wait() {
                Some(Wait::Sleep(theirs)) if theirs > deadline => break,
                _ => next = self.sleepers.after(&mut self.threads, other),
            }
        }
        self.sleepers.insert_before(&mut self.threads, id, next);
    }

    /// When the first sleeper wakes, nanoseconds.
    fn next_deadline(&self) -> Option<u64> {
        match self.threads[self.sleepers.first()?].wait() {
            Some(Wait::Sleep(deadline)) => Some(deadline),
            _ => None,
        }
    }

    /// The timer of this CPU fired.
    pub fn timer_fired(&mut self) {
        self.stats().count(|stats| &mut stats.timer_interrupts);
        self.alarm();
    }

    /// Wakes the sleepers whose time has come, and sees who should have this CPU now.
    fn alarm(&mut self) {
        let now = self.clock.now();
        while self.next_deadline().is_some_and(|deadline| deadline <= now) {
            if let Some(id) = self.sleepers.first() {
                self.wake(id);
            }
        }
        let number = self.cpu_number() as usize;
        let highest = self.ready[number].highest();
        let running = self.runs_at(number as u32);
        let cpu = &mut self.cpus[number];
        cpu.timer = 0;
        cpu.reschedule |= highest >= running && highest.is_some();
    }

    /// Looks whether this CPU's timer is due, with interrupts off. Its interrupt comes later and
    /// finds nothing to do.
    pub fn poll_timer(&mut self) {
        let due = self.cpu().timer;
        if due != 0 && self.clock.now() >= due {
            self.alarm();
        }
    }

    /// Sets this CPU's timer, if somebody needs it: another ready thread, or a sleeper.
    fn set_timer(&mut self) {
        let number = self.cpu_number() as usize;
        let contended = !self.ready[number].is_empty() && self.cpus[number].current.is_some();
        let alarm = self.next_deadline();
        if !contended && alarm.is_none() {
            return;
        }
        let slice = if contended {
            self.clock.now() + QUANTUM_NS
        } else {
            u64::MAX
        };
        let deadline = slice.min(alarm.unwrap_or(u64::MAX));
        let armed = self.cpus[number].timer;
        if armed == 0 || deadline < armed {
            self.cpus[number].timer = deadline;
            apic::set_timer(self.clock.ticks_until(deadline));
        }
    }

    /// Takes the current thread off this CPU, wherever it goes next.
    pub fn take_off(&mut self) {
        let number = self.cpu_number();
        let cpu = &mut self.cpus[number as usize];
        cpu.reschedule = false;
        let Some(id) = cpu.current.take() else { return };
        let thread = &mut self.threads[id];
        if cpu.fpu_owner == Some(id) {
            thread.fpu.save();
        }
        if thread.stop_requested {
            if let Run::Waiting(_) = thread.run {
                self.interrupt_wait(id);
            }
            model::abandon(&mut self.threads[id]);
            self.threads[id].run = Run::Stopped;
            self.time_unused(id);
            self.stopped(id);
        } else if thread.run == Run::Running(number) {
            // Back into a run queue, behind its equals; unless its time was taken away.
            match self.entitlement(id) {
                Some(priority) => self.queue(id, priority),
                None => self.wait_for_time(id),
            }
        }
    }

    /// Chooses the thread to run on this CPU and makes it the current one.
    pub fn choose(&mut self) -> Option<Id<Thread>> {
        let number = self.cpu_number() as usize;
        // Its own threads first, unless somebody else has one that is worth more.
        let (from, _) = (0..).zip(self.ready.iter()).fold(
            (number, self.ready[number].highest()),
            |best, (other, queue)| {
                if queue.highest() > best.1 {
                    (other, queue.highest())
                } else {
                    best
                }
            },
        );
        let id = self.ready[from].pop(&mut self.threads)?;
        let cpu = &mut self.cpus[number];
        cpu.current = Some(id);
        cpu.stats.count(|stats| &mut stats.context_switches);
        let thread = &mut self.threads[id];
        thread.run = Run::Running(number as u32);
        if let Some(hardware) = &mut cpu.hardware {
            hardware.set_frame(&thread.frame);
        }
        Some(id)
    }

    /// Forgets that a CPU holds the registers of a thread that is going away.
    pub fn forget_fpu(&mut self, id: Id<Thread>) {
        for cpu in self.cpus.iter_mut().filter(|cpu| cpu.fpu_owner == Some(id)) {
            cpu.fpu_owner = None;
        }
    }

    /// The last steps before user mode, on behalf of the current thread: its registers, its page
    /// table, the timer.
    pub fn prepare_user(&mut self, id: Id<Thread>) {
        let number = self.cpu_number() as usize;
        let space = self.threads[id].space;
        self.load_space(space);
        let cpu = &mut self.cpus[number];
        let thread = &mut self.threads[id];
        // Registers that stayed behind are stale if the thread has since run elsewhere.
        if cpu.fpu_owner != Some(id) || thread.last_cpu != number as u32 {
            thread.fpu.restore();
            thread.last_cpu = number as u32;
            cpu.fpu_owner = Some(id);
        }
        if !self.ready[number].is_empty() {
            self.share();
        }
        self.set_timer();
    }

    /// Before waiting for an interrupt: the timer; and whether nothing can ever happen again.
    pub fn prepare_idle(&mut self) -> bool {
        self.set_timer();
        self.cpu().idle = true;
        let asleep = |cpu: &CpuState| cpu.idle && cpu.current.is_none();
        self.sleepers.is_empty()
            && self.cpus.iter().all(asleep)
            && self.ready.iter().all(RunQueue::is_empty)
    }

    /// Brings a CPU into the kernel if it runs user code or is idle.
    pub fn kick(&mut self, cpu: u32) {
        if cpu != self.cpu_number() {
            self.stats().count(|stats| &mut stats.ipis_sent);
            apic::kick(cpu);
        }
    }

    /// Waits until a CPU is not in user mode. It cannot go back there while we hold the kernel lock.
    pub fn await_kernel(&mut self, cpu: u32) {
        let running = |kernel: &Self| {
            kernel.cpus[cpu as usize]
                .hardware
                .as_ref()
                .is_some_and(|hardware| hardware.in_user())
        };
        if running(self) {
            self.kick(cpu);
            while running(self) {
                core::hint::spin_loop();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::tests::arena;

    #[test]
    fn the_highest_priority_runs_first_and_equals_in_order() {
        let mut threads = arena(4);
        let ids: Vec<_> = (0..4u64)
            .map(|n| threads.insert(Thread::new(n)).ok().unwrap())
            .collect();
        let mut queue = RunQueue::default();
        for (id, priority) in ids.iter().zip([3, 31, 3, 0]) {
            queue.push(&mut threads, *id, priority);
        }
        queue.remove(&mut threads, ids[1], 31);
        assert_eq!(queue.highest(), Some(3));
        let order: Vec<_> = core::iter::from_fn(|| queue.pop(&mut threads)).collect();
        assert_eq!(order, [ids[0], ids[2], ids[3]]);
        assert!(queue.is_empty());
    }
}
