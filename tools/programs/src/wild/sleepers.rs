//! Calls that sleep: each is made by a thread of its own, which is stopped in its sleep and
//! destroyed.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::{Status, Wakeup};
use fluke_abi::entry::Entry;
use fluke_abi::ipc::{Buffer, CallWord, Params};
use fluke_abi::layout::GATE;
use libfluke::object::{Cond, Mutex, Port, Pset, Ref};
use libfluke::{println, sys, thread};

/// How long a thread gets to fall asleep, before it is looked at again.
const NAP_NS: u64 = 10_000_000;
/// How often to look.
const LOOKS: u64 = 100;

/// Turns of a thread that runs on donated time only.
static SPINS: AtomicU64 = AtomicU64::new(0);
static READY: AtomicU64 = AtomicU64::new(0);

/// Runs `call` in a thread until it sleeps in `entry` or what that turns into.
fn sleeps(entry: Entry, call: impl FnOnce() + Send + 'static) -> Result<bool, Status> {
    sleeps_and(entry, call, || true)
}

/// The same, until something has come of it, too.
fn sleeps_and(
    entry: Entry,
    call: impl FnOnce() + Send + 'static,
    what: impl Fn() -> bool,
) -> Result<bool, Status> {
    READY.store(0, Relaxed);
    let sleeper = thread::spawn(move || {
        READY.store(1, Relaxed);
        call();
        READY.store(2, Relaxed);
    })?;
    let mut looks = 0;
    let (registers, asleep) = loop {
        thread::sleep(NAP_NS);
        let registers = sleeper.thread().state(None).registers;
        let now = Entry::from_number(CallWord(registers.rax).number());
        let asleep = registers.rip == GATE
            && now.is_some_and(|now| now == entry || entry.row().restart_points.contains(&now))
            && READY.load(Relaxed) == 1
            && what();
        looks += 1;
        if asleep || looks == LOOKS {
            break (registers, asleep);
        }
        sleeper.thread().go_on();
    };
    if !asleep {
        println!(
            "wild: {} did not sleep: rip {:#x}, rax {:#x}",
            entry.row().name,
            registers.rip,
            registers.rax
        );
    }
    sleeper.destroy();
    Ok(asleep)
}

fn params() -> Params {
    let words: &'static mut [u64; 8] = Box::leak(Box::new([0; 8]));
    let address = words.as_ptr() as u64;
    Params {
        send: Buffer { address, words: 4 },
        recv: Buffer {
            address: address + 32,
            words: 4,
        },
        ..Params::default()
    }
}

/// Makes all the calls that sleep.
pub fn run() -> Result<(), Status> {
    let (held, free, cond) = (Mutex::alloc()?, Mutex::alloc()?, Cond::alloc()?);
    let pset = Pset::alloc()?;
    let port = Ref::to(Port::in_set(pset, 0)?)?;
    held.lock();

    let mut fine = true;
    let mut count = 0;
    let mut expect = |asleep: Result<bool, Status>| -> Result<(), Status> {
        fine &= asleep?;
        count += 1;
        Ok(())
    };
    expect(sleeps(Entry::thread_sleep, || thread::sleep_forever()))?;
    expect(sleeps(Entry::machine_listen, || {
        // SAFETY: the call has no pointers.
        unsafe { sys::machine_listen(0) };
    }))?;
    expect(sleeps(Entry::mutex_lock, move || held.lock()))?;
    expect(sleeps(Entry::cond_wait, move || {
        free.lock();
        cond.wait(free);
    }))?;
    for entry in [
        Entry::ipc_send,
        Entry::ipc_call,
        Entry::ipc_client_connect_send,
        Entry::ipc_client_connect_send_over_receive,
    ] {
        expect(sleeps(entry, move || {
            let mut params = params();
            // SAFETY: the buffers are leaked.
            unsafe {
                sys::trap_message(entry as u64, port.handle() as u64, &raw mut params);
            }
        }))?;
    }
    let empty = Pset::alloc()?;
    expect(sleeps(Entry::ipc_setup_wait_receive, move || {
        let mut params = params();
        // SAFETY: the buffers are leaked.
        unsafe {
            sys::ipc_setup_wait_receive(empty.handle(), &raw mut params);
        }
    }))?;
    let scheduler = Port::in_set(Pset::alloc()?, 0)?;
    let spinner = thread::spawn(|| {
        loop {
            SPINS.fetch_add(1, Relaxed);
        }
    })?;
    let target = spinner.thread();
    target.set_scheduler(Ref::to(scheduler)?, 0);
    let before = SPINS.load(Relaxed);
    let sleep_port = Port::in_set(Pset::alloc()?, 0)?;
    expect(sleeps_and(
        Entry::thread_schedule,
        move || {
            target.schedule(sleep_port, Wakeup::OnBlock);
        },
        || SPINS.load(Relaxed) > before,
    ))?;
    // The donor is gone, and with it the time.
    let donated = SPINS.load(Relaxed);
    thread::sleep(NAP_NS);
    let withdrawn = SPINS.load(Relaxed) == donated;
    if !withdrawn {
        println!(
            "wild: time of a donor was not taken away: {donated} turns until it was destroyed, then {}",
            SPINS.load(Relaxed)
        );
    }
    spinner.destroy();
    println!("wild: {count} calls that sleep were stopped and destroyed");
    if fine && withdrawn {
        Ok(())
    } else {
        Err(Status::NoMemory)
    }
}
