//! Random calls of all entry points, with random and half-valid parameters, by several threads at
//! once on shared objects. Threads that sleep in their calls are interrupted, stopped, or destroyed
//! and made again. In the end the kernel must be alive, and hold what it held before.
//!
//! `fuzz [CALLS [SEED [THREADS]]]`

mod arena;
mod random;
mod worker;

use alloc::boxed::Box;
use alloc::vec::Vec;

use fluke_abi::code::Status;
use fluke_abi::state::{Census, PRIORITY_MAX};
use libfluke::{println, startup, sys, thread};

use crate::handler;
use arena::Arena;
use random::Random;
use worker::{Rescues, Worker};

/// Calls, if not said otherwise.
const CALLS: u64 = 1700;
/// Threads, if not said otherwise.
const THREADS: u64 = 8;
/// Calls of the round before the first count, which leaves behind what is never given back: page
/// tables of the program's own memory.
const WARM_UP_CALLS: u64 = 200;
/// Nanoseconds between two looks at the workers.
const LOOK_NS: u64 = 8_000_000;
/// Looks between two times that objects are made again.
const POPULATE_LOOKS: u64 = 32;
/// Without a single call in this time, nanoseconds, the kernel hangs.
const PATIENCE_NS: u64 = 30_000_000_000;
/// Calls from which on it is worth to say how far one is.
const LONG: u64 = 50_000;

/// What went wrong.
enum Trouble {
    Status(Status),
    /// A worker does not go on.
    Hang,
}

impl From<Status> for Trouble {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

fn census() -> Census {
    let mut census = Census::default();
    // SAFETY: a local to be written.
    unsafe { sys::machine_census(&raw mut census) };
    census
}

/// Makes `calls` calls with `threads` threads. Unmakes all it has made.
fn round(
    arena: &'static Arena,
    calls: u64,
    threads: u64,
    random: &mut Random,
) -> Result<(Rescues, u64), Trouble> {
    let mut rescues = Rescues::default();
    for _ in 0..POPULATE_LOOKS {
        arena.populate(random);
    }
    let mut workers = Vec::new();
    for n in 0..threads {
        let share = calls / threads + u64::from(n < calls % threads);
        workers.push(Worker::spawn(arena, random.next(), share)?);
    }
    let (mut looks, mut since, mut seen, mut told) = (0, startup::now(), 0, 0);
    while !workers.iter().all(Worker::is_finished) {
        thread::sleep(LOOK_NS);
        looks += 1;
        if looks % POPULATE_LOOKS == 0 {
            arena.populate(random);
        }
        for worker in &mut workers {
            worker.look(random, &mut rescues)?;
        }
        let made = workers.iter().map(Worker::calls).sum::<u64>();
        if made != seen {
            (seen, since) = (made, startup::now());
        } else if startup::now() - since > PATIENCE_NS {
            for worker in &workers {
                let (rip, name) = worker.describe();
                println!(
                    "fuzz: a worker hangs at rip {rip:#x}, {}",
                    name.unwrap_or("?")
                );
            }
            return Err(Trouble::Hang);
        }
        if calls >= LONG && made * 20 / calls != told {
            told = made * 20 / calls;
            println!("fuzz: {made} of {calls} calls");
        }
    }
    workers.into_iter().for_each(Worker::join);
    Ok((rescues, arena.clear() as u64))
}

fn test(calls: u64, seed: u64, threads: u64) -> Result<bool, Trouble> {
    let arena: &'static Arena = Box::leak(Box::new(Arena::new()?));
    let random = &mut Random::new(seed);
    round(arena, WARM_UP_CALLS, threads, random)?;
    let before = census();
    let raised = handler::taken();
    let (rescues, left) = round(arena, calls, threads, random)?;
    let after = census();
    let raised = handler::taken() - raised;
    let Rescues {
        abandoned,
        interrupted,
        replaced,
    } = rescues;
    println!("fuzz: seed {seed}: {calls} calls by {threads} threads, {raised} exceptions");
    println!(
        "fuzz: {abandoned} calls abandoned, {interrupted} interrupted, {replaced} threads made again"
    );
    println!("fuzz: {left} objects unmade in the end; objects and frames:");
    println!("fuzz: before {:?} {}", before.objects, before.frames);
    println!("fuzz: after  {:?} {}", after.objects, after.frames);
    Ok(before == after)
}

/// The program.
pub fn main() -> u64 {
    let mut numbers = startup::args().skip(1).map(str::parse::<u64>);
    let mut number = |default| numbers.next().map_or(Ok(default), |number| number);
    let (Ok(calls), Ok(seed), Ok(threads @ 1..=64)) = (number(CALLS), number(1), number(THREADS))
    else {
        println!("fuzz: usage: fuzz [CALLS [SEED [THREADS]]], with 1 to 64 threads");
        return crate::USAGE;
    };
    // Whoever looks after the workers is more important than anything they can make.
    let looker = thread::spawn(move || {
        handler::install();
        let result = match test(calls, seed, threads) {
            Ok(true) => {
                println!("fuzz: ok");
                return;
            }
            Ok(false) => "objects or frames have leaked",
            Err(Trouble::Hang) => "the kernel hangs",
            Err(Trouble::Status(status)) => status.name(),
        };
        println!("fuzz: {result}");
        FAILED.store(true, core::sync::atomic::Ordering::Relaxed);
    });
    let Ok(looker) = looker else {
        println!("fuzz: no memory for a thread");
        return crate::FAILED;
    };
    looker.set_priority(PRIORITY_MAX);
    looker.join();
    if FAILED.load(core::sync::atomic::Ordering::Relaxed) {
        crate::FAILED
    } else {
        0
    }
}

static FAILED: core::sync::atomic::AtomicBool = core::sync::atomic::AtomicBool::new(false);
