//! Plays a scene for scripts: one thread, the subject, makes a call that can sleep, and others do what makes
//! it end. `scene ENTRY` is the scene of that entry point, `scene held` a long message with a page missing.
//! Both begin with a call of `machine_census`, by which a script can tell the program's space. What makes the
//! call end comes when the word before the census is not 0 any more, or after a while.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::{Status, Wakeup};
use fluke_abi::entry::{Convention, Entry, Row, TABLE};
use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::state::{Census, ObjectSpec, ThreadState};
use libfluke::object::{Cond, Mutex, Port, Pset, Ref, Task, Thread};
use libfluke::space::own_heap;
use libfluke::{println, startup, sys, thread};

use crate::caller::{Call, Caller, End, eventually, plain};
use crate::faults::messages::{self, Plain};
use crate::faults::pages::{Fault, Pages};
use crate::resume;

/// How long the subject of `thread_sleep` sleeps, nanoseconds.
const NAP_NS: u64 = 1_000_000_000;
/// Pages that `region_search` looks through.
const SEARCHED: u64 = 64;
/// Bytes of the message of `scene held`: the example of OSDI '99, section 4.3. It begins in the middle of a
/// page, and the page after the next is missing: when 6,144 bytes have gone.
const HELD: u64 = 8192;
const PAGE: usize = 20;

/// What a script sees, and sets.
#[repr(C)]
struct Cue {
    go: AtomicU64,
    census: UnsafeCell<Census>,
}

// SAFETY: only the first thread uses the census.
unsafe impl Sync for Cue {}

static CUE: Cue = Cue {
    go: AtomicU64::new(1),
    census: UnsafeCell::new(Census {
        objects: [0; 9],
        frames: 0,
    }),
};

/// Waits for the script.
fn cue() {
    eventually(|| CUE.go.load(Relaxed) != 0);
}

/// Memory for what a call writes, for good.
fn place<T: Send>(value: T) -> u64 {
    core::ptr::from_mut(Box::leak(Box::new(value))) as u64
}

/// Whether a thread's calls have ended as they must.
fn ended(what: &str, caller: &Caller, expected: End) -> bool {
    let end = caller.end();
    if end != expected {
        println!("scene: {what}: expected {expected:?}, saw {end:?}");
    }
    end == expected
}

/// A call of a thread's, alone.
fn alone(entry: Entry, parameters: &[u64]) -> Result<bool, Status> {
    let caller = Caller::with(resume::install, [plain(entry, parameters)].into())?;
    Ok(ended(
        entry.row().name,
        &caller,
        End::Status(Status::Success),
    ))
}

/// A thread that runs all the time.
fn spinner() -> Result<u64, Status> {
    let turns: &'static AtomicU64 = Box::leak(Box::new(AtomicU64::new(0)));
    let spinner = thread::spawn(move || {
        loop {
            turns.fetch_add(1, Relaxed);
        }
    })?;
    while turns.load(Relaxed) == 0 {
        thread::pause();
    }
    Ok(spinner.thread().handle() as u64)
}

fn mutex_lock() -> Result<bool, Status> {
    let mutex = Mutex::alloc()?;
    mutex.lock();
    let call = plain(Entry::mutex_lock, &[mutex.handle() as u64]);
    let caller = Caller::with(resume::install, [call].into())?;
    cue();
    mutex.unlock();
    Ok(ended("mutex_lock", &caller, End::Status(Status::Success)))
}

fn cond_wait() -> Result<bool, Status> {
    let (cond, mutex) = (Cond::alloc()?, Mutex::alloc()?);
    let [cond_at, mutex_at] = [cond.handle() as u64, mutex.handle() as u64];
    let calls = [
        plain(Entry::mutex_lock, &[mutex_at]),
        plain(Entry::cond_wait, &[cond_at, mutex_at]),
    ];
    let caller = Caller::with(resume::install, calls.into())?;
    cue();
    let asleep = caller.asleep_without(mutex);
    // It has to wait for the mutex too.
    mutex.lock();
    cond.signal();
    mutex.unlock();
    Ok(asleep && ended("cond_wait", &caller, End::Status(Status::Success)))
}

/// A thread that is scheduled by the subject alone, and falls asleep.
fn thread_schedule() -> Result<bool, Status> {
    let pset = Pset::alloc()?;
    let port = Port::in_set(pset, 0)?;
    let gate = Mutex::alloc()?;
    gate.lock();
    let target = thread::spawn(move || {
        gate.lock();
        thread::sleep_forever();
    })?;
    target.thread().set_scheduler(Ref::to(port)?, 0);
    gate.unlock();
    // Messages would wake the subject: its own port has none.
    let quiet = Port::in_set(Pset::alloc()?, 0)?;
    let call = plain(
        Entry::thread_schedule,
        &[
            target.thread().handle() as u64,
            quiet.handle() as u64,
            Wakeup::OnBlock as u64,
        ],
    );
    let caller = Caller::with(resume::install, [call].into())?;
    Ok(ended(
        "thread_schedule",
        &caller,
        End::Status(Status::TimeUnused),
    ))
}

/// Ends when the host rings.
fn machine_listen() -> Result<bool, Status> {
    let call = plain(Entry::machine_listen, &[0]);
    let caller = Caller::with(resume::install, [call].into())?;
    Ok(ended("machine_listen", &caller, End::of(1)))
}

fn region_search() -> Result<bool, Status> {
    let heap = own_heap()?;
    let found = place([ObjectSpec::default(); 64]);
    let calls = [
        heap.region().handle() as u64,
        place(0u64),
        SEARCHED * PAGE_SIZE,
        found,
        place(64u64),
    ];
    alone(Entry::region_search, &calls)
}

/// A message transfer, with a partner that comes when the subject sleeps.
fn transfer(row: &Row) -> Result<bool, Status> {
    let entry = Entry::from_number(row.number).expect("a row of the table");
    let pset = Pset::alloc()?;
    let to_port = Ref::to(Port::in_set(pset, 0)?)?;
    let (before, others) = messages::scene(entry);
    let gates = [Mutex::alloc()?, Mutex::alloc()?];
    let (sent, received) = (Plain::new()?, Plain::new()?);
    let calls = |gate: &Mutex, entries: &[Entry]| {
        let gate = gate.handle() as u64;
        let mut calls = Vec::from([
            plain(Entry::mutex_lock, &[gate]),
            plain(Entry::mutex_unlock, &[gate]),
        ]);
        calls.extend(entries.iter().map(|entry| -> Call {
            let to = match entry {
                Entry::ipc_setup_wait_receive => pset.handle() as u64,
                _ => to_port.handle() as u64,
            };
            messages::plain_call(*entry, to, sent, received)
        }));
        calls
    };
    gates.iter().for_each(|gate| gate.lock());
    let subject = [before, &[entry]].concat();
    let subject = Caller::with(resume::install, calls(gates[0], &subject))?;
    let partner = Caller::with(resume::install, calls(gates[1], others))?;
    let mut right = subject.asleep_in(Entry::mutex_lock) && partner.asleep_in(Entry::mutex_lock);
    messages::connect(row, &subject, &partner, pset)?;
    gates[0].unlock();
    cue();
    gates[1].unlock();
    right &= ended(row.name, &subject, messages::end_of(row, row));
    // The one that answers again and again waits for more.
    if entry != Entry::ipc_call {
        let last = others[others.len() - 1].row();
        right &= ended(last.name, &partner, messages::end_of(row, last));
    }
    Ok(right)
}

/// A message of 8,192 bytes, of which a page is missing.
fn held() -> Result<bool, Status> {
    let pages = Pages::new()?;
    let pset = Pset::alloc()?;
    let to_port = Ref::to(Port::in_set(pset, 0)?)?;
    let from = pages.address(PAGE, Fault::Hard) + PAGE_SIZE / 2;
    let to = place([0u64; HELD as usize / 8]);
    let setup = plain(
        Entry::ipc_setup_wait_receive,
        &[pset.handle() as u64, 0, 0, to, HELD / 8],
    );
    let server = Caller::with(resume::install, [setup].into())?;
    let asleep = server.asleep_in(Entry::ipc_wait_receive);
    pages.spoil(PAGE + 2, Fault::Hard);
    let send = plain(
        Entry::ipc_client_connect_send,
        &[to_port.handle() as u64, from, HELD / 8],
    );
    let client = Caller::with(resume::install, [send].into())?;
    Ok(asleep
        && ended("sender", &client, End::Status(Status::Success))
        && ended("receiver", &server, End::Status(Status::RecvMoreData)))
}

fn play(row: &Row) -> Result<bool, Status> {
    if row.convention == Convention::Message {
        return transfer(row);
    }
    let entry = Entry::from_number(row.number).expect("a row of the table");
    match entry {
        Entry::mutex_lock => mutex_lock(),
        Entry::cond_wait => cond_wait(),
        Entry::machine_listen => machine_listen(),
        Entry::region_search => region_search(),
        Entry::thread_schedule => thread_schedule(),
        Entry::thread_sleep => alone(entry, &[startup::now() + NAP_NS]),
        Entry::task_destroy => alone(entry, &[Task::alloc()?.handle() as u64]),
        Entry::thread_get_state => alone(entry, &[spinner()?, place(ThreadState::default())]),
        Entry::thread_move => {
            let new = place(Thread::new());
            alone(entry, &[spinner()?, new])
        }
        Entry::thread_destroy | Entry::thread_interrupt | Entry::thread_set_state => {
            alone(entry, &[spinner()?])
        }
        _ => {
            println!("scene: {} never sleeps", row.name);
            Ok(false)
        }
    }
}

/// The program.
pub fn main() -> u64 {
    let name = startup::args().nth(1).unwrap_or_default();
    let row = TABLE.iter().find(|row| row.name == name);
    CUE.go.store(0, Relaxed);
    // SAFETY: for the kernel to write.
    unsafe { sys::machine_census(CUE.census.get()) };
    let right = match row {
        Some(row) => play(row),
        None if name == "held" => held(),
        None => {
            println!("scene: usage: scene ENTRY | held");
            return crate::USAGE;
        }
    };
    match right {
        Ok(true) => 0,
        Ok(false) => crate::FAILED,
        Err(status) => {
            println!("scene: cannot begin: {status:?}");
            crate::FAILED
        }
    }
}
