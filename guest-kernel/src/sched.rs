//! The scheduler: which thread runs on which CPU.
//!
//! Every CPU has run queues by priority and takes the first thread of the highest. A thread that
//! becomes ready is queued where it was woken: most often its waker is about to sleep, and runs it
//! next without disturbing anybody. Only when a CPU leaves to user mode with others still queued does
//! it bring in an idle CPU, or one that runs something less important, which takes from it. The
//! timer runs only when somebody else wants the CPU, or somebody sleeps.
//!
//! This is the core of the kernel that cannot be preempted, so it stands apart: it knows of a thread
//! only what is in its [`Entity`], and nothing of the [`Kernel`](crate::kernel::Kernel). What a thread
//! waits for, other than the clock, is the kernel's affair (`wait.rs`): here such a thread is just off.

use core::mem::offset_of;
use core::ptr::NonNull;

use bitflags::bitflags;
use fluke_abi::boot::CPUS_MAX;
use fluke_abi::state::FPU_BYTES;

use crate::arch::apic;
use crate::arch::cpu::{Cpu, count, own};
use crate::arch::entry::Stubs;
use crate::arch::fpu::Fpu;
use crate::arch::instructions;
use crate::arena::{Arena, Id, same};
use crate::boundary::start::is_online;
use crate::clock::Clock;
use crate::lock::scheduler;
use crate::model;
use crate::mutant::mutant;
use crate::queue::{Linked, Links, Queue};
use crate::thread::Thread;

/// Nanoseconds that a thread runs before another of its priority gets the CPU.
pub const QUANTUM_NS: u64 = 10_000_000;

/// Levels of priority.
const PRIORITIES: usize = fluke_abi::state::PRIORITY_MAX as usize + 1;

/// Whether a thread runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not until the kernel says so.
    Off,
    /// In a run queue.
    Ready,
    /// On a CPU.
    Running,
    /// Until its deadline.
    Asleep,
    /// Until it has the kernel mutex.
    Locking,
}

bitflags! {
    /// What a thread has yet to do.
    #[derive(Clone, Copy)]
    struct Duties: u8 {
        /// To sleep until its deadline, as soon as it makes way of its own accord.
        const SLEEP = 1;
        /// To look at what others want of it before it leaves to user mode.
        const ATTEND = 2;
        /// To attend when it wakes from that.
        const ATTEND_AWAKE = 4;
    }
}

/// What the scheduler knows of a thread.
#[repr(C)]
pub struct Entity {
    /// User x87 and SSE registers, while no CPU has them; first, where they have the alignment they want.
    pub fpu: Fpu,
    links: Links<Self>,
    /// Where the thread is: its place in its arena is fixed.
    pub place: NonNull<Thread>,
    /// Its page table; a dead one is as good as none.
    pub table: Option<Id<Table>>,
    /// Until when it sleeps, or is about to, nanoseconds.
    deadline: u64,
    /// What the execution model keeps of it while it does not run.
    stack: model::Stack,
    /// The CPU in whose run queue it is, or on which it runs.
    cpu: u16,
    /// The CPU on which it last ran user code.
    last_cpu: u16,
    state: State,
    /// The priority at which it runs.
    priority: u8,
    /// The same without what it inherits as owner of the kernel mutex.
    own_priority: u8,
    duties: Duties,
}

const _: () = assert!(offset_of!(Entity, fpu) == 0 && Arena::<Entity>::STRIDE.is_multiple_of(16));
const _: () = assert!(CPUS_MAX <= u16::MAX as u32);
// What a thread costs beside those registers (OSDI '99, table 7, calls it the TCB), with its places in the arenas.
const _: () = assert!(Arena::<Thread>::STRIDE + Arena::<Entity>::STRIDE - FPU_BYTES <= 512);

impl Entity {
    /// Whether registers of its that this CPU has are not stale: it has not run user code elsewhere since.
    fn has_left_fpu_here(&self) -> bool {
        self.last_cpu == Cpu::current_number() as u16
    }
}

// SAFETY: `place` is the arena's, which has no thread affinity.
unsafe impl Send for Entity {}

impl Linked for Entity {
    fn links(&mut self) -> &mut Links<Self> {
        &mut self.links
    }
}

/// A page table that CPUs may load.
#[derive(Clone, Copy)]
pub struct Table {
    /// Physical address; for the kernel's own space, which the kernel cannot use, that of no space.
    root: u64,
    /// What else it takes to come from user mode and go there.
    stubs: Stubs,
}

bitflags! {
    /// What a CPU is to do before it goes on in user mode.
    #[derive(Clone, Copy, Default)]
    struct Demands: u8 {
        /// Somebody else should have the CPU.
        const MAKE_WAY = 1;
        /// The thread that runs has to look at what others want of it.
        const ATTEND = 2;
    }
}

/// Ready threads of a CPU.
pub struct RunQueue {
    queues: [Queue<Entity>; PRIORITIES],
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
    pub fn push(&mut self, entities: &mut Arena<Entity>, id: Id<Entity>, priority: u8) {
        self.queues[priority as usize].push(entities, id);
        self.occupied |= 1 << priority;
    }

    /// Takes out a thread that is in the queue of that priority.
    pub fn remove(&mut self, entities: &mut Arena<Entity>, id: Id<Entity>, priority: u8) {
        let queue = &mut self.queues[priority as usize];
        queue.remove(entities, id);
        if queue.is_empty() {
            self.occupied &= !(1 << priority);
        }
    }

    /// Takes out the first thread of the highest priority.
    pub fn pop<'a>(
        &mut self,
        entities: &'a mut Arena<Entity>,
    ) -> Option<(Id<Entity>, &'a mut Entity)> {
        let priority = self.highest()?;
        let queue = &mut self.queues[priority as usize];
        let first = queue.pop(entities)?;
        if queue.is_empty() {
            self.occupied &= !(1 << priority);
        }
        Some(first)
    }
}

/// What the kernel knows of a CPU.
pub struct CpuState {
    /// What the stubs know of it; `None` until it has come up.
    pub hardware: Option<&'static mut Cpu>,
    /// The thread that runs.
    current: Option<Id<Entity>>,
    /// Threads that are ready to.
    ready: RunQueue,
    /// Waits for an interrupt; or has not come up, and will then.
    pub idle: bool,
    demands: Demands,
    /// A page table in use here lost an entry.
    flush: bool,
    /// The page table that is loaded; `None` is that of no space.
    loaded: Option<Id<Table>>,
    /// Its physical address; 0 before the first.
    root: u64,
    /// The thread whose x87 and SSE registers are in the CPU.
    fpu_owner: Option<Id<Entity>>,
    /// When the timer will fire, nanoseconds; 0 if it is off.
    timer: u64,
}

impl Default for CpuState {
    fn default() -> Self {
        Self {
            hardware: None,
            current: None,
            ready: RunQueue::default(),
            idle: true,
            demands: Demands::empty(),
            flush: false,
            loaded: None,
            root: 0,
            fpu_owner: None,
            timer: 0,
        }
    }
}

impl CpuState {
    /// Keeps the x87 and SSE registers of a thread that leaves this CPU, if they are in it.
    #[inline]
    fn save_fpu(&self, id: Id<Entity>, entity: &mut Entity) {
        if same(self.fpu_owner, Some(id)) && entity.has_left_fpu_here() {
            entity.fpu.save();
        }
    }

    /// Makes a thread the current one.
    #[inline]
    fn run(&mut self, id: Id<Entity>, entity: &mut Entity) {
        count!(context_switches);
        entity.state = State::Running;
        entity.cpu = Cpu::current_number() as u16;
        self.current = Some(id);
        if let Some(hardware) = &mut self.hardware {
            let stack = model::entry_stack(&entity.stack, hardware.stack);
            hardware.set_running(entity.place.as_ptr() as u64, stack);
        }
    }

    /// Loads what it needs in user mode: its x87 and SSE registers, and its page table.
    #[inline(always)]
    fn load(&mut self, id: Id<Entity>, entity: &mut Entity, tables: &Arena<Table>, no_table: u64) {
        if !same(self.fpu_owner, Some(id)) || !entity.has_left_fpu_here() {
            entity.fpu.restore();
            entity.last_cpu = Cpu::current_number() as u16;
            self.fpu_owner = Some(id);
        }
        if !same(self.loaded, entity.table) || self.flush {
            self.reload(entity.table, tables, no_table);
        }
    }

    /// Loads a page table, or that of no space, and drops what the CPU remembers of it.
    #[inline(always)]
    fn reload(&mut self, table: Option<Id<Table>>, tables: &Arena<Table>, no_table: u64) {
        let (loaded, root, stubs) = match table.and_then(|table| tables.get(table)) {
            Some(&Table { root, stubs }) => (table, root, stubs),
            None => (None, no_table, Stubs::COMMON),
        };
        self.flush = false;
        (self.loaded, self.root) = (loaded, root);
        if let Some(hardware) = &mut self.hardware {
            hardware.stubs = stubs;
        }
        instructions::set_page_table(root);
    }
}

/// Threads, CPUs, and time.
pub struct Scheduler {
    /// All threads.
    pub entities: Arena<Entity>,
    /// All page tables of spaces.
    tables: Arena<Table>,
    /// Page table of no space.
    no_table: u64,
    /// State of the CPUs.
    pub cpus: &'static mut [CpuState],
    /// Threads that sleep, by deadline.
    sleepers: Queue<Entity>,
    /// Threads that wait for the kernel mutex.
    lockers: Queue<Entity>,
    /// Who sleeps until the host rings; the last one that did.
    listener: Option<Id<Entity>>,
    /// How often the host has rung.
    rings: u64,
    /// Time.
    pub clock: Clock,
}

impl Scheduler {
    /// A scheduler of no threads.
    pub const fn new(
        entities: Arena<Entity>,
        tables: Arena<Table>,
        no_table: u64,
        cpus: &'static mut [CpuState],
        clock: Clock,
    ) -> Self {
        Self {
            entities,
            tables,
            no_table,
            cpus,
            sleepers: Queue::new(),
            lockers: Queue::new(),
            listener: None,
            rings: 0,
            clock,
        }
    }

    /// A thread that is off. `None`: there is no room.
    pub fn create(
        &mut self,
        place: NonNull<Thread>,
        stack: model::Stack,
        priority: u8,
    ) -> Option<Id<Entity>> {
        let entity = Entity {
            fpu: Fpu::INITIAL,
            links: Links::new(),
            place,
            table: None,
            deadline: 0,
            stack,
            cpu: 0,
            last_cpu: 0,
            state: State::Off,
            priority,
            own_priority: priority,
            duties: Duties::empty(),
        };
        self.entities.insert(entity).ok()
    }

    /// Forgets a thread that is off; returns what the execution model kept of it.
    pub fn remove(&mut self, id: Id<Entity>) -> Option<model::Stack> {
        self.forget_fpu(id);
        self.entities.remove(id).map(|entity| entity.stack)
    }

    /// State of the CPU that runs this.
    #[inline]
    pub fn cpu(&mut self) -> &mut CpuState {
        own(self.cpus)
    }

    /// The thread that runs on this CPU.
    #[inline]
    pub fn current(&mut self) -> Option<Id<Entity>> {
        self.cpu().current
    }

    /// Whether the thread that runs on this CPU may go on: nobody else should have the CPU, or wants
    /// anything of the thread.
    #[inline]
    pub fn goes_on(&mut self) -> bool {
        self.cpu().demands.is_empty()
    }

    /// Whether somebody else should have this CPU.
    #[inline]
    pub fn must_make_way(&mut self) -> bool {
        let cpu = self.cpu();
        cpu.current.is_some() && cpu.demands.contains(Demands::MAKE_WAY)
    }

    /// Where the execution model keeps what it keeps of a thread.
    pub fn stack(&mut self, id: Id<Entity>) -> &mut model::Stack {
        &mut self.entities[id].stack
    }

    /// Whether a thread sleeps by the clock, or is about to.
    pub fn is_asleep(&self, id: Id<Entity>) -> bool {
        let entity = &self.entities[id];
        entity.state == State::Asleep || entity.duties.contains(Duties::SLEEP)
    }

    /// Lets a thread that is off run.
    pub fn make_ready(&mut self, id: Id<Entity>, priority: u8) {
        let entity = &mut self.entities[id];
        entity.own_priority = priority;
        if entity.state == State::Off {
            entity.priority = priority;
            self.queue(id);
        }
    }

    /// Puts a thread into this CPU's run queue.
    fn queue(&mut self, id: Id<Entity>) {
        let entity = &mut self.entities[id];
        entity.state = State::Ready;
        entity.cpu = Cpu::current_number() as u16;
        let priority = entity.priority;
        let cpu = own(self.cpus);
        cpu.ready.push(&mut self.entities, id, priority);
        let running = cpu.current.map(|current| self.entities[current].priority);
        if running.is_some_and(|running| running < priority) {
            cpu.demands |= Demands::MAKE_WAY;
        }
    }

    /// Takes a thread off, wherever it is, and with it what it was doing in the kernel. Not one that is
    /// on a CPU: `false`.
    pub fn take_out(&mut self, id: Id<Entity>) -> bool {
        let entity = &mut self.entities[id];
        let (priority, cpu) = (entity.priority, entity.cpu);
        entity.duties.remove(Duties::SLEEP);
        match entity.state {
            State::Running => return false,
            State::Ready => {
                let queue = &mut self.cpus[cpu as usize].ready;
                queue.remove(&mut self.entities, id, priority);
            }
            State::Asleep if mutant!(sleeper_left) => {}
            State::Asleep => self.sleepers.remove(&mut self.entities, id),
            State::Locking => self.lockers.remove(&mut self.entities, id),
            State::Off => {}
        }
        let entity = &mut self.entities[id];
        entity.state = State::Off;
        model::abandon(&mut entity.stack);
        true
    }

    /// The running thread goes off when it leaves its CPU: where the execution model keeps what it keeps
    /// of it.
    #[inline]
    pub fn block(&mut self, id: Id<Entity>) -> &mut model::Stack {
        let entity = &mut self.entities[id];
        entity.state = State::Off;
        entity.duties.remove(Duties::SLEEP);
        &mut entity.stack
    }

    /// The running thread is to make way and sleep until a time. `attend`: it has something to look at
    /// when it wakes.
    pub fn sleep_until(&mut self, id: Id<Entity>, deadline: u64, attend: bool) {
        let entity = &mut self.entities[id];
        entity.deadline = deadline;
        entity.duties |= Duties::SLEEP;
        entity.duties.set(Duties::ATTEND_AWAKE, attend);
        self.cpu().demands |= Demands::MAKE_WAY;
    }

    /// The running thread is to make way and sleep until the host rings, as in
    /// [`sleep_until`](Self::sleep_until); unless it has rung other than `heard` times: how often.
    pub fn listen(&mut self, id: Id<Entity>, heard: u64, attend: bool) -> Option<u64> {
        if self.rings != heard {
            return Some(self.rings);
        }
        self.listener = Some(id);
        self.sleep_until(id, u64::MAX, attend);
        None
    }

    /// The host has rung: who listens wakes.
    pub fn rung(&mut self) {
        self.rings += 1;
        let Some(id) = self.listener.take() else {
            return;
        };
        let Some(entity) = self.entities.get_mut(id) else {
            return;
        };
        entity.duties.remove(Duties::SLEEP);
        if !mutant!(doorbell_lost) {
            self.wake_sleeper(id);
        }
    }

    /// A thread that sleeps by the clock wakes before its time.
    fn wake_sleeper(&mut self, id: Id<Entity>) {
        if self.entities[id].state == State::Asleep {
            self.sleepers.remove(&mut self.entities, id);
            self.queue(id);
        }
    }

    /// The running thread makes way of its own accord: it sleeps, if it is to. As [`block`](Self::block).
    pub fn make_way(&mut self, id: Id<Entity>) -> &mut model::Stack {
        if self.entities[id].duties.contains(Duties::SLEEP) {
            self.insert_sleeper(id);
        }
        self.stack(id)
    }

    fn insert_sleeper(&mut self, id: Id<Entity>) {
        let deadline = self.entities[id].deadline;
        let mut next = self.sleepers.first(&self.entities);
        while let Some(other) = next.filter(|&other| self.entities[other].deadline <= deadline) {
            next = self.sleepers.after(&mut self.entities, other);
        }
        self.sleepers.insert_before(&mut self.entities, id, next);
        let entity = &mut self.entities[id];
        entity.state = State::Asleep;
        let attends = entity.duties.contains(Duties::ATTEND_AWAKE);
        entity.duties.remove(Duties::SLEEP | Duties::ATTEND_AWAKE);
        if attends {
            entity.duties |= Duties::ATTEND;
        }
    }

    /// Makes a thread look at what others want of it before it goes on in user mode; says whether it is
    /// on a CPU now.
    pub fn call_attention(&mut self, id: Id<Entity>) -> bool {
        let entity = &mut self.entities[id];
        entity.duties |= Duties::ATTEND;
        if entity.state != State::Running {
            return false;
        }
        let cpu = u32::from(entity.cpu);
        if mutant!(stop_unheard) {
            let heard = cpu == Cpu::current_number();
            entity.duties.set(Duties::ATTEND, heard);
        }
        self.cpus[cpu as usize].demands |= Demands::ATTEND;
        self.kick(cpu);
        true
    }

    /// Makes a thread that is not off look at what others want of it as soon as it can: one that sleeps by the
    /// clock wakes for it.
    pub fn rouse(&mut self, id: Id<Entity>) {
        if !self.call_attention(id) {
            self.wake_sleeper(id);
        }
    }

    /// Whether the running thread has something to look at; it will now.
    pub fn take_attention(&mut self, id: Id<Entity>) -> bool {
        let cpu = self.cpu();
        if !cpu.demands.contains(Demands::ATTEND) {
            return false;
        }
        cpu.demands.remove(Demands::ATTEND);
        let entity = &mut self.entities[id];
        let attends = entity.duties.contains(Duties::ATTEND);
        entity.duties.remove(Duties::ATTEND);
        attends
    }

    /// The running thread goes on at another priority.
    pub fn set_priority(&mut self, id: Id<Entity>, priority: u8) {
        let entity = &mut self.entities[id];
        let inherited = entity.priority > entity.own_priority;
        entity.own_priority = priority;
        if !inherited || entity.priority < priority {
            entity.priority = priority;
        }
    }

    /// The running thread sleeps, when it leaves its CPU, until it is given the kernel mutex. The
    /// owner, at that offset, inherits its priority.
    pub fn wait_for_kernel(&mut self, id: Id<Entity>, owner: u32) {
        self.entities[id].state = State::Locking;
        self.lockers.push(&mut self.entities, id);
        let priority = self.entities[id].priority;
        let Some(owner) = self.entities.id_at(owner) else {
            return;
        };
        let old = self.entities[owner].priority;
        if old >= priority {
            return;
        }
        let Entity { state, cpu, .. } = self.entities[owner];
        if state == State::Ready {
            let queue = &mut self.cpus[cpu as usize].ready;
            queue.remove(&mut self.entities, owner, old);
            self.entities[owner].priority = priority;
            self.queue(owner);
        } else {
            self.entities[owner].priority = priority;
        }
    }

    /// The owner of the kernel mutex gives it up, and what it inherited: who gets it next, and whether
    /// others wait still.
    pub fn next_for_kernel(&mut self, owner: Id<Entity>) -> (Option<Id<Entity>>, bool) {
        let entity = &mut self.entities[owner];
        entity.priority = entity.own_priority;
        let mut next = self.lockers.first(&self.entities);
        let mut best = next;
        while let Some(id) = next {
            let most = best.map_or(0, |best| self.entities[best].priority);
            if self.entities[id].priority > most {
                best = next;
            }
            next = self.lockers.after(&mut self.entities, id);
        }
        if let Some(best) = best {
            self.lockers.remove(&mut self.entities, best);
            self.queue(best);
        }
        (best, !self.lockers.is_empty())
    }

    /// The priority of what runs on a CPU.
    fn priority_on(&self, cpu: u32) -> Option<u8> {
        let current = self.cpus[cpu as usize].current?;
        Some(self.entities[current].priority)
    }

    /// Before this CPU leaves the kernel with threads queued: brings in the CPU that has least to do,
    /// if it has less to do than the first of them is worth.
    #[inline(never)]
    fn share(&mut self) {
        let here = Cpu::current_number();
        let Some(waiting) = self.cpu().ready.highest() else {
            return;
        };
        let mut best: Option<(u32, Option<u8>)> = None;
        for (number, cpu) in (0..).zip(self.cpus.iter()) {
            let running = self.priority_on(number);
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
            if cpu.current.is_some() {
                cpu.demands |= Demands::MAKE_WAY;
            }
            cpu.idle = false;
            self.kick(number);
        }
    }

    /// When the first sleeper wakes that does not sleep for ever, nanoseconds.
    #[inline]
    fn next_deadline(&self) -> Option<u64> {
        let first = self.sleepers.first(&self.entities)?;
        let deadline = self.entities[first].deadline;
        (deadline != u64::MAX).then_some(deadline)
    }

    /// The timer of this CPU fired.
    pub fn timer_fired(&mut self) {
        count!(timer_interrupts);
        self.alarm();
    }

    /// Wakes the sleepers whose time has come, and sees who should have this CPU now.
    fn alarm(&mut self) {
        let now = self.clock.now();
        while self.next_deadline().is_some_and(|deadline| deadline <= now) {
            if let Some((id, _)) = self.sleepers.pop(&mut self.entities) {
                self.queue(id);
            }
        }
        let running = self.priority_on(Cpu::current_number());
        let cpu = own(self.cpus);
        let highest = cpu.ready.highest();
        cpu.timer = 0;
        if highest >= running && highest.is_some() {
            cpu.demands |= Demands::MAKE_WAY;
        } else if let Some(deadline) = self.next_deadline() {
            // Who runs may stay in the kernel for long, and the timer was set for somebody who is gone.
            self.arm(deadline);
        }
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
    #[inline(never)]
    fn set_timer(&mut self) {
        let cpu = self.cpu();
        let contended = !cpu.ready.is_empty() && cpu.current.is_some();
        let alarm = self.next_deadline();
        if !contended && alarm.is_none() {
            return;
        }
        let slice = if contended {
            self.clock.now() + QUANTUM_NS
        } else {
            u64::MAX
        };
        self.arm(slice.min(alarm.unwrap_or(u64::MAX)));
    }

    /// Sees that this CPU's timer fires at that time, or before.
    fn arm(&mut self, deadline: u64) {
        let timer = &mut self.cpu().timer;
        if *timer == 0 || deadline < *timer {
            *timer = deadline;
            apic::set_timer(self.clock.ticks_until(deadline));
        }
    }

    /// Takes the current thread off this CPU, wherever it goes next: back into a run queue, behind its
    /// equals, if it could run on.
    #[inline(always)]
    pub fn take_off(&mut self) {
        let cpu = own(self.cpus);
        let Some(id) = cpu.current.take() else { return };
        let entity = &mut self.entities[id];
        cpu.save_fpu(id, entity);
        if entity.state == State::Running {
            self.queue(id);
        }
    }

    /// The CPU whose first thread has the highest priority, above this one.
    fn richer(&self, priority: Option<u8>) -> Option<usize> {
        let (mut best, mut found) = (priority, None);
        for (number, cpu) in self.cpus.iter().enumerate() {
            let highest = cpu.ready.highest();
            if highest > best {
                (best, found) = (highest, Some(number));
            }
        }
        found
    }

    /// Chooses the thread to run on this CPU and makes it the current one.
    #[inline(always)]
    pub fn choose(&mut self) -> Option<&mut model::Stack> {
        if let Some(deadline) = self.next_deadline() {
            // Who is chosen may go on in the kernel, for long.
            self.arm(deadline);
        }
        // Its own threads first, unless somebody else has one that is worth more.
        let elsewhere = if self.cpus.len() > 1 {
            let own = self.cpu().ready.highest();
            self.richer(own)
        } else {
            None
        };
        let from = match elsewhere {
            Some(number) => &mut self.cpus[number],
            None => own(self.cpus),
        };
        let (id, entity) = from.ready.pop(&mut self.entities)?;
        let cpu = own(self.cpus);
        cpu.demands = if entity.duties.contains(Duties::ATTEND) {
            Demands::ATTEND
        } else {
            Demands::empty()
        };
        cpu.run(id, entity);
        Some(&mut entity.stack)
    }

    /// The running thread goes off, and one that is off has the CPU, and is ready to go on in user mode. Or
    /// nothing, and `false`, if another thread would be chosen, or that one has something to look at before.
    #[inline(always)]
    pub fn hand_over(&mut self, from: Id<Entity>, to: Id<Entity>, priority: u8) -> bool {
        let cpu = own(self.cpus);
        let turn = cpu.demands.is_empty() && cpu.ready.highest() < Some(priority);
        if !turn || self.cpus.len() > 1 && self.richer(Some(priority)).is_some() {
            return false;
        }
        let Some((from_entity, entity)) = self.entities.both(from, to) else {
            return false;
        };
        if entity.state != State::Off || !entity.duties.is_empty() {
            return false;
        }
        from_entity.state = State::Off;
        let cpu = own(self.cpus);
        cpu.save_fpu(from, from_entity);
        (entity.own_priority, entity.priority) = (priority, priority);
        model::abandon(&mut entity.stack);
        cpu.run(to, entity);
        cpu.load(to, entity, &self.tables, self.no_table);
        self.enter_user();
        true
    }

    /// Runs a thread on this CPU, wherever it was.
    #[cfg(test)]
    pub(crate) fn run_now(&mut self, id: Id<Entity>) {
        self.take_out(id);
        self.cpus[0].current = Some(id);
        self.entities[id].state = State::Running;
    }

    /// Forgets that a CPU holds the registers of a thread that is going away, or is to have others.
    pub fn forget_fpu(&mut self, id: Id<Entity>) {
        for cpu in self.cpus.iter_mut().filter(|cpu| cpu.fpu_owner == Some(id)) {
            cpu.fpu_owner = None;
        }
    }

    /// Gives a thread that is off other x87 and SSE registers.
    pub fn set_fpu(&mut self, id: Id<Entity>, image: &[u8; FPU_BYTES]) {
        self.forget_fpu(id);
        self.entities[id].fpu.import(image);
    }

    /// The last steps before user mode, on behalf of the current thread: its registers, its page
    /// table, the timer. Or nothing, and `false`, if it may not go on.
    #[inline(always)]
    pub fn prepare_user(&mut self, id: Id<Entity>) -> bool {
        let cpu = own(self.cpus);
        if !cpu.demands.is_empty() {
            return false;
        }
        cpu.load(id, &mut self.entities[id], &self.tables, self.no_table);
        self.enter_user();
        true
    }

    /// The last of those steps: others get their share of the time.
    #[inline(always)]
    fn enter_user(&mut self) {
        let sleepers = !self.sleepers.is_empty() && self.next_deadline().is_some();
        if sleepers || !self.cpu().ready.is_empty() {
            self.share();
            self.set_timer();
        }
        if let Some(hardware) = &self.cpu().hardware {
            hardware.in_user.set();
        }
    }

    /// Before waiting for an interrupt: the timer; and whether nothing can ever happen again.
    pub fn prepare_idle(&mut self) -> bool {
        // A page table that is going away must not stay loaded.
        let loaded = self.cpu().loaded;
        if loaded.is_some_and(|loaded| self.tables.get(loaded).is_none()) {
            own(self.cpus).reload(None, &self.tables, self.no_table);
        }
        self.set_timer();
        if !self.sleepers.is_empty() {
            // Not for ever, should a host lose the interrupt that ends it.
            self.arm(u64::MAX);
        }
        self.cpu().idle = true;
        let asleep = |cpu: &CpuState| cpu.idle && cpu.current.is_none() && cpu.ready.is_empty();
        self.sleepers.is_empty() && self.cpus.iter().all(asleep)
    }

    /// Brings a CPU into the kernel if it runs user code or is idle.
    fn kick(&mut self, cpu: u32) {
        if cpu != Cpu::current_number() {
            count!(ipis_sent);
            apic::kick(cpu);
        }
    }

    /// A page table that CPUs may load from now on. `None`: there is no room.
    pub fn add_table(&mut self, root: u64) -> Option<Id<Table>> {
        let stubs = Stubs::COMMON;
        self.tables.insert(Table { root, stubs }).ok()
    }

    /// The same for the kernel's own space: the stubs load it, and that of no space again.
    pub fn add_own_table(&mut self) -> Option<Id<Table>> {
        let (root, stubs) = (self.no_table, Stubs::OWN);
        self.tables.insert(Table { root, stubs }).ok()
    }

    /// Whether some CPU has the table at that physical address loaded, dead or alive.
    pub fn has_loaded(&self, root: u64) -> bool {
        self.cpus.iter().any(|cpu| cpu.root == root)
    }

    /// CPUs that have a table loaded look at it again before they run user code.
    fn mark_stale(&mut self, table: Id<Table>) {
        let cpus = self.cpus.iter_mut();
        for cpu in cpus.filter(|cpu| cpu.loaded == Some(table)) {
            cpu.flush = true;
        }
    }

    /// Whether a CPU runs user code with a table that has changed, or is gone.
    fn uses_stale(&self, cpu: usize, table: Id<Table>) -> bool {
        let cpu = &self.cpus[cpu];
        cpu.loaded == Some(table)
            && cpu.flush
            && cpu
                .hardware
                .as_ref()
                .is_some_and(|hardware| hardware.in_user.is_set())
    }
}

/// A page table lost entries: no CPU goes on using them.
pub fn shoot_down(table: Id<Table>) {
    scheduler().mark_stale(table);
    await_stale(table);
}

/// A page table goes away: no CPU goes on using it. One that does not run user code may have it loaded
/// still ([`Scheduler::has_loaded`]), but will not use it.
pub fn remove_table(table: Id<Table>) {
    let mut held = scheduler();
    held.tables.remove(table);
    held.mark_stale(table);
    drop(held);
    await_stale(table);
}

/// Waits until no CPU runs user code with what it remembers of a table. It looks before it goes back.
fn await_stale(table: Id<Table>) {
    let cpus = scheduler().cpus.len();
    for cpu in 0..cpus {
        if scheduler().uses_stale(cpu, table) {
            scheduler().kick(cpu as u32);
            while scheduler().uses_stale(cpu, table) {
                core::hint::spin_loop();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::tests::arena;
    use std::boxed::Box;
    use std::vec::Vec;

    /// One CPU that is this thread, and a thread for each priority given.
    fn threads<const N: usize>(priorities: [u8; N]) -> (Scheduler, [Id<Entity>; N]) {
        let mut threads = arena(1);
        let thread = threads.insert(Thread::new(1)).ok().unwrap();
        let place = NonNull::from(&mut threads[thread]);
        let mut scheduler = Scheduler::new(
            arena(N),
            arena(1),
            0,
            Box::leak(Box::new([CpuState::default()])),
            Clock::new(1_000_000, 1_000_000, 0),
        );
        let ids = priorities.map(|priority| {
            let stack = model::Stack::default();
            scheduler.create(place, stack, priority).unwrap()
        });
        (scheduler, ids)
    }

    /// Who runs next, as the current thread makes way.
    fn next(scheduler: &mut Scheduler) -> Option<Id<Entity>> {
        scheduler.cpus[0].current = None;
        scheduler.choose()?;
        scheduler.current()
    }

    #[test]
    fn the_highest_priority_runs_first_and_equals_in_order() {
        let (mut scheduler, ids) = threads([3, 31, 3, 0]);
        for id in ids {
            let priority = scheduler.entities[id].own_priority;
            scheduler.make_ready(id, priority);
        }
        assert!(scheduler.take_out(ids[1]));
        let order: Vec<_> = core::iter::from_fn(|| next(&mut scheduler)).collect();
        assert_eq!(order, [ids[0], ids[2], ids[3]]);
        assert!(!scheduler.take_out(ids[3]), "it is on a CPU");
    }

    #[test]
    fn registers_that_stayed_behind_on_a_cpu_are_not_saved() {
        /// The SSE registers in an image.
        const XMM: core::ops::Range<usize> = 160..416;
        let (mut scheduler, [id]) = threads([3]);
        scheduler.run_now(id);
        assert!(scheduler.prepare_user(id));
        scheduler.take_off();
        // It runs user code elsewhere, has other registers by then, and comes back in the middle of a call.
        let mut image = *Fpu::INITIAL.image();
        image[XMM].fill(0x5a);
        scheduler.entities[id].fpu.import(&image);
        scheduler.entities[id].last_cpu = 1;
        scheduler.run_now(id);
        scheduler.take_off();
        assert!(scheduler.entities[id].fpu.image()[XMM] == image[XMM]);
    }

    #[test]
    fn the_cpu_is_handed_over_to_who_would_be_chosen() {
        let (mut scheduler, [from, to, other]) = threads([3, 5, 5]);
        scheduler.run_now(from);
        scheduler.make_ready(other, 5);
        assert!(!scheduler.hand_over(from, to, 5), "another was first");
        assert!(scheduler.take_out(other));
        scheduler.make_ready(other, 4);
        scheduler.cpus[0].demands = Demands::MAKE_WAY;
        assert!(!scheduler.hand_over(from, to, 5), "it makes way");
        scheduler.cpus[0].demands = Demands::empty();
        scheduler.call_attention(to);
        assert!(
            !scheduler.hand_over(from, to, 5),
            "it has something to look at"
        );
        assert!(scheduler.current() == Some(from));
        scheduler.entities[to].duties = Duties::empty();
        scheduler.cpus[0].fpu_owner = Some(from);
        assert!(scheduler.hand_over(from, to, 5));
        assert!(scheduler.current() == Some(to) && scheduler.cpus[0].fpu_owner == Some(to));
        assert_eq!(scheduler.entities[from].state, State::Off);
        assert_eq!(scheduler.entities[to].state, State::Running);
        assert_eq!(next(&mut scheduler), Some(other));
    }

    #[test]
    fn sleepers_wake_in_order_of_their_deadlines_and_then_attend() {
        let (mut scheduler, ids) = threads([5, 5, 5]);
        for (id, deadline) in ids.into_iter().zip([3, 1, 2]) {
            scheduler.run_now(id);
            scheduler.sleep_until(id, deadline, deadline == 2);
            assert!(scheduler.is_asleep(id) && !scheduler.goes_on());
            scheduler.make_way(id);
            scheduler.cpus[0].demands = Demands::empty();
        }
        assert_eq!(scheduler.next_deadline(), Some(1));
        scheduler.cpus[0].current = None;
        scheduler.alarm();
        let order: Vec<_> = core::iter::from_fn(|| next(&mut scheduler)).collect();
        assert_eq!(order, [ids[1], ids[2], ids[0]]);
        let attends = ids.map(|id| scheduler.entities[id].duties.contains(Duties::ATTEND));
        assert_eq!(attends, [false, false, true]);
    }

    #[test]
    fn who_is_roused_attends_even_if_it_has_just_fallen_asleep() {
        let (mut scheduler, [id]) = threads([5]);
        scheduler.run_now(id);
        scheduler.sleep_until(id, u64::MAX, false);
        scheduler.make_way(id);
        scheduler.rouse(id);
        scheduler.cpus[0].demands = Demands::empty();
        assert_eq!(next(&mut scheduler), Some(id));
        assert!(scheduler.take_attention(id));
    }

    /// Preemption points look at it: without, who stays in the kernel for long would not make way.
    #[test]
    fn the_timer_stays_set_for_who_sleeps() {
        const DEADLINE: u64 = u64::MAX - 1;
        let (mut scheduler, [sleeper, other]) = threads([6, 5]);
        scheduler.run_now(sleeper);
        scheduler.sleep_until(sleeper, DEADLINE, false);
        scheduler.make_way(sleeper);
        scheduler.make_ready(other, 5);
        assert_eq!(next(&mut scheduler), Some(other));
        assert_eq!(scheduler.cpus[0].timer, DEADLINE);
        // As at the end of a time slice when nobody else wants the CPU any more.
        scheduler.cpus[0].timer = 1;
        scheduler.cpus[0].demands = Demands::empty();
        scheduler.poll_timer();
        assert!(scheduler.goes_on());
        assert_eq!(scheduler.cpus[0].timer, DEADLINE);
    }

    #[test]
    fn no_timer_is_set_for_who_sleeps_for_ever() {
        let (mut scheduler, [sleeper, other]) = threads([6, 5]);
        scheduler.run_now(sleeper);
        scheduler.sleep_until(sleeper, u64::MAX, false);
        scheduler.make_way(sleeper);
        scheduler.make_ready(other, 5);
        assert_eq!(next(&mut scheduler), Some(other));
        assert_eq!(scheduler.cpus[0].timer, 0);
    }

    #[test]
    fn the_owner_of_the_kernel_mutex_inherits_and_gives_back() {
        let (mut scheduler, [owner, middle, low, high]) = threads([1, 10, 2, 20]);
        scheduler.make_ready(owner, 1);
        scheduler.make_ready(middle, 10);
        for locker in [low, high] {
            scheduler.run_now(locker);
            scheduler.wait_for_kernel(locker, owner.offset());
        }
        // Before the middle one, although it is worth less by itself.
        assert_eq!(next(&mut scheduler), Some(owner));
        // The most important comes first, and others wait still.
        assert_eq!(scheduler.next_for_kernel(owner), (Some(high), true));
        assert_eq!(scheduler.entities[owner].priority, 1);
        assert_eq!(next(&mut scheduler), Some(high));
        assert_eq!(scheduler.next_for_kernel(high), (Some(low), false));
    }

    #[test]
    fn who_is_taken_out_waits_for_the_kernel_mutex_no_more() {
        let (mut scheduler, [owner, other]) = threads([1, 2]);
        scheduler.run_now(other);
        scheduler.wait_for_kernel(other, owner.offset());
        assert!(scheduler.take_out(other));
        assert_eq!(scheduler.next_for_kernel(owner), (None, false));
    }
}
