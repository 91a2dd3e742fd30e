//! Schedulers in user mode, on the kernel's CPU inheritance (Ford and Susarla, OSDI '96).
//!
//! A stride scheduler divides its time between two workers and a round-robin scheduler, which in
//! turn divides what it gets between two workers of its own. Then the three ways in which a
//! scheduler can be woken, counted; and, first, a long row of schedulers.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use alloc::boxed::Box;
use alloc::vec::Vec;
use fluke_abi::code::{Status, Wakeup};
use fluke_abi::ipc::{TIME_MAGIC, TimeRequest};
use fluke_abi::state::{PRIORITY_DEFAULT, PRIORITY_MAX};
use libfluke::object::{Cond, Mutex, Port, Pset, Ref, Thread};
use libfluke::rpc::{self, Server};
use libfluke::thread::Handle;
use libfluke::{println, thread};

/// Nanoseconds between two ticks of the stride scheduler.
const QUANTUM_NS: u64 = 40_000_000;
/// Ticks in which the workers compete.
const TICKS: u64 = 60;
/// Times that each client of the second part is woken, and nanoseconds until it sleeps for sure.
const NAPS: u64 = 20;
const NAP_NS: u64 = 10_000_000;
/// Schedulers of the third part, in a row: more than would fit a kernel stack.
const LINKS: usize = 200;
const LINK_STACK_BYTES: u64 = 8 << 10;
/// First word of a tick.
const TICK: u64 = 1;
/// First word of the order to end.
const END: u64 = 2;
/// Least size of messages; what they need beyond the first word is zero.
const WORDS: usize = TimeRequest::WORDS;

/// Somebody to give time to.
struct Client {
    thread: &'static Thread,
    /// What a quantum costs it.
    stride: u64,
    /// What it has had.
    pass: u64,
    /// Ticks that came while it had the time.
    quanta: u64,
    runnable: bool,
}

/// A scheduler, and the port where threads ask it for time.
struct Scheduler {
    pset: &'static Pset,
    port: &'static Port,
    to_port: &'static Ref,
    wakeup: Wakeup,
    clients: Vec<Client>,
    /// Times it was woken from a donation.
    wakeups: u64,
}

impl Scheduler {
    fn new(wakeup: Wakeup) -> Result<Self, Status> {
        let pset = Pset::alloc()?;
        let port = Port::in_set(pset, 0)?;
        Ok(Self {
            pset,
            port,
            to_port: Ref::to(port)?,
            wakeup,
            clients: Vec::new(),
            wakeups: 0,
        })
    }

    /// Takes over a thread from whoever scheduled it. Tickets say how much time it gets.
    fn adopt(&mut self, thread: &'static Thread, tickets: u64) {
        thread.set_scheduler(self.to_port, self.clients.len() as u64);
        self.clients.push(Client {
            thread,
            stride: 1_000_000 / tickets,
            pass: 0,
            quanta: 0,
            runnable: false,
        });
    }

    /// Schedules until told to end.
    fn run(mut self) -> Self {
        let mut buffer = [0; WORDS];
        let mut server = Server::new(self.pset, &mut buffer, &[]);
        let mut running: Option<usize> = None;
        loop {
            // Who has had the least runs next: now, if nobody says otherwise.
            let next = (0..self.clients.len())
                .filter(|&n| self.clients[n].runnable)
                .min_by_key(|&n| self.clients[n].pass);
            if let Some(n) = next {
                running = Some(n);
                let alone = self.clients.iter().filter(|c| c.runnable).count() == 1;
                let wakeup = if alone { self.wakeup } else { Wakeup::OnBlock };
                let status = self.clients[n].thread.schedule(self.port, wakeup);
                self.wakeups += 1;
                if status == Status::TimeUnused {
                    self.clients[n].runnable = false;
                    continue;
                }
            }
            server.wait();
            match *server.words() {
                [TIME_MAGIC, client, _] => {
                    // Who slept has saved nothing up.
                    let floor = self.clients.iter().filter(|c| c.runnable).map(|c| c.pass);
                    let floor = floor.min().unwrap_or(0);
                    if let Some(client) = self.clients.get_mut(client as usize) {
                        client.runnable = true;
                        client.pass = client.pass.max(floor);
                    }
                }
                [END, ..] => return self,
                _ => {
                    if let Some(n) = running {
                        self.clients[n].pass += self.clients[n].stride;
                        self.clients[n].quanta += 1;
                    }
                }
            }
        }
    }
}

/// Sends a tick each `period` nanoseconds until `done`.
fn tick(port: &Ref, period: u64, done: &AtomicBool) {
    while !done.load(Relaxed) {
        thread::sleep(period);
        let _ = rpc::send(port, &[TICK, 0, 0]);
    }
}

static DONE: AtomicBool = AtomicBool::new(false);
static WORK: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
static QUANTA: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];
/// Tickets of the clients of the stride scheduler; the last is the round-robin scheduler.
const TICKETS: [u64; 3] = [3, 2, 3];

/// Computes, and counts.
fn work(counter: &AtomicU64) {
    while !DONE.load(Relaxed) {
        counter.fetch_add(1, Relaxed);
    }
}

/// What each of the workers has counted.
fn compete() -> Result<[u64; 4], Status> {
    let important = PRIORITY_MAX.min(PRIORITY_DEFAULT + 1);
    let mut stride = Scheduler::new(Wakeup::OnBlock)?;
    let mut robin = Scheduler::new(Wakeup::OnBlock)?;
    let mut workers = Vec::new();
    for counter in &WORK {
        workers.push(thread::spawn(move || work(counter))?);
    }
    stride.adopt(workers[0].thread(), TICKETS[0]);
    stride.adopt(workers[1].thread(), TICKETS[1]);
    robin.adopt(workers[2].thread(), 1);
    robin.adopt(workers[3].thread(), 1);
    let (to_stride, to_robin) = (stride.to_port, robin.to_port);
    let inner = thread::spawn(move || {
        robin.run();
    })?;
    stride.adopt(inner.thread(), TICKETS[2]);
    for counter in &WORK {
        counter.store(0, Relaxed);
    }
    let outer = thread::spawn(move || {
        for (count, client) in QUANTA.iter().zip(stride.run().clients) {
            count.store(client.quanta, Relaxed);
        }
    })?;
    let mut tickers = Vec::new();
    for (port, period) in [(to_stride, QUANTUM_NS), (to_robin, 2 * QUANTUM_NS)] {
        let ticker = thread::spawn(move || tick(port, period, &DONE))?;
        ticker.set_priority(important);
        tickers.push(ticker);
    }
    thread::sleep(TICKS * QUANTUM_NS);
    // On a busy host a worker may not have had the CPU in any of its quanta.
    for _ in 0..20 * TICKS {
        if WORK.iter().all(|counter| counter.load(Relaxed) > 0) {
            break;
        }
        thread::sleep(QUANTUM_NS);
    }
    let work = WORK.each_ref().map(|counter| counter.load(Relaxed));
    DONE.store(true, Relaxed);
    tickers.into_iter().for_each(Handle::join);
    workers.iter().try_for_each(retire)?;
    rpc::send(to_robin, &[END, 0, 0])?;
    retire(&inner)?;
    rpc::send(to_stride, &[END, 0, 0])?;
    outer.join();
    inner.join();
    workers.into_iter().for_each(Handle::join);
    Ok(work)
}

/// Waits until a thread is done and gives it back to the kernel's scheduler: it may not be
/// destroyed while another scheduler may yet name it.
fn retire(handle: &Handle) -> Result<(), Status> {
    let nobody = Ref::alloc()?;
    while !handle.is_done() {
        thread::sleep(NAP_NS);
    }
    handle.thread().set_scheduler(nobody, 0);
    Ok(())
}

/// Counts how often it is rung.
struct Bell {
    mutex: Mutex,
    cond: Cond,
    rings: AtomicU64,
}

impl Bell {
    fn alloc() -> Result<&'static Self, Status> {
        let bell = Box::leak(Box::new(Self {
            mutex: Mutex::new(),
            cond: Cond::new(),
            rings: AtomicU64::new(0),
        }));
        bell.mutex.create()?;
        bell.cond.create()?;
        Ok(bell)
    }

    fn ring(&self) {
        self.mutex.lock();
        self.rings.fetch_add(1, Relaxed);
        self.cond.signal();
        self.mutex.unlock();
    }

    /// Sleeps until it has been rung more than `heard` times.
    fn wait(&self, heard: u64) {
        self.mutex.lock();
        while self.rings.load(Relaxed) == heard {
            self.cond.wait(&self.mutex);
        }
        self.mutex.unlock();
    }
}

/// How often a scheduler is woken that has two clients which wake in turn, each when the other has
/// gone to sleep.
fn wakeups(wakeup: Wakeup) -> Result<u64, Status> {
    let mut scheduler = Scheduler::new(wakeup)?;
    let (bells, echo) = ([Bell::alloc()?, Bell::alloc()?], Bell::alloc()?);
    let mut clients = Vec::new();
    for bell in bells {
        let client = thread::spawn(move || {
            (0..NAPS).for_each(|heard| {
                bell.wait(heard);
                echo.ring();
            });
        })?;
        scheduler.adopt(client.thread(), 1);
        clients.push(client);
    }
    let port = scheduler.to_port;
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let handle = thread::spawn(move || COUNT.store(scheduler.run().wakeups, Relaxed))?;
    for round in 0..NAPS {
        for (n, bell) in (0..).zip(bells) {
            thread::sleep(NAP_NS);
            bell.ring();
            echo.wait(2 * round + n);
        }
    }
    clients.iter().try_for_each(retire)?;
    rpc::send(port, &[END, 0, 0])?;
    handle.join();
    clients.into_iter().for_each(Handle::join);
    Ok(COUNT.load(Relaxed))
}

/// Servers that are each scheduled by the next, all asleep. A message for the first wakes it, so that
/// it asks the second for time, which wakes that, and so on: says whether the last one asks.
fn chain() -> Result<bool, Status> {
    let end = Pset::alloc()?;
    let mut last = Port::in_set(end, 0)?;
    let mut links = Vec::new();
    for _ in 0..LINKS {
        let pset = Pset::alloc()?;
        let server = thread::spawn_with_stack(LINK_STACK_BYTES, move || {
            let mut buffer = [0; WORDS];
            let mut server = Server::new(pset, &mut buffer, &[]);
            loop {
                server.wait();
            }
        })?;
        links.push((server, Ref::to(last)?));
        last = Port::in_set(pset, 0)?;
    }
    // The first link is the one made last. Each goes to sleep on time of this thread's.
    let first = Ref::to(last)?;
    let nobody = Port::alloc()?;
    for (server, scheduler) in links.iter().rev() {
        server.thread().set_scheduler(scheduler, 0);
    }
    for (server, _) in links.iter().rev() {
        server.thread().schedule(nobody, Wakeup::OnBlock);
    }
    let sender = thread::spawn(move || {
        // It is never delivered.
        let _ = rpc::send(first, &[TICK, 0, 0]);
    })?;
    let mut buffer = [0; WORDS];
    let mut server = Server::new(end, &mut buffer, &[]);
    server.wait();
    let asked = matches!(server.words(), [TIME_MAGIC, ..]);
    sender.destroy();
    for (server, _) in links {
        server.destroy();
    }
    Ok(asked)
}

fn test() -> Result<bool, Status> {
    let mut ok = chain()?;
    println!("schedulers: a request went through {LINKS} schedulers");
    let work = compete()?;
    let all: u64 = work.iter().sum::<u64>().max(1);
    for (n, (work, due)) in work.into_iter().zip([37, 25, 18, 18]).enumerate() {
        let share = work * 100 / all;
        println!("schedulers: worker {n} has {share} % of the work, due are {due}");
        ok &= work > 0;
    }
    // Work is a matter of the host's load, and of what a scheduler's own calls cost. Quanta are not.
    let quanta = QUANTA.each_ref().map(|count| count.load(Relaxed));
    let (all, tickets) = (quanta.iter().sum::<u64>(), TICKETS.iter().sum::<u64>());
    for (quanta, due) in quanta.into_iter().zip(TICKETS.map(|t| all * t / tickets)) {
        println!("schedulers: {quanta} quanta of {all}, due are {due}");
        ok &= quanta.abs_diff(due) <= 2 + all / 16 && quanta > 0;
    }
    let mut counts = [0; 3];
    for (count, &wakeup) in counts.iter_mut().zip(Wakeup::ALL) {
        *count = wakeups(wakeup)?;
        println!("schedulers: {count} wake-ups {}", wakeup.name());
    }
    // On a block, at least once for each nap; on a switch, not if nobody else wants the time; on a
    // conflict, not if everybody else sleeps.
    let [block, switch, conflict] = counts;
    ok &= block >= 2 * NAPS && switch >= NAPS && conflict * 2 <= switch;
    Ok(ok)
}

/// The program.
pub fn main() -> u64 {
    match test() {
        Ok(true) => {
            println!("schedulers: ok");
            0
        }
        Ok(false) => crate::FAILED,
        Err(status) => {
            println!("schedulers: cannot begin: {status:?}");
            crate::FAILED
        }
    }
}
