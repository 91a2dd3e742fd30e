//! A colony: threads in several spaces that sleep in every kind of call that can sleep, a memory manager
//! among them. When all do, it asks to be written to a file; then everything goes on, and must come out as
//! if nothing had happened.

mod connections;
mod memory;
mod spaces;
mod time;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::Status;
use fluke_abi::entry::Entry;
use fluke_abi::ipc::CallWord;
use fluke_abi::layout::GATE;
use fluke_abi::state::ThreadFlags;
use libfluke::object::{Cond, Mutex, Port, Pset, Ref};
use libfluke::{parent, println, rpc, startup, thread};

/// How long to give threads at a time to fall asleep.
const NAP_NS: u64 = 10_000_000;
/// How often to look whether they have.
const LOOKS: u64 = 400;
/// Result of who is not done.
const PENDING: u64 = u64::MAX;

/// Held until everything is to go on.
static HOLD: Mutex = Mutex::new();
static RELEASE: Cond = Cond::new();
static RELEASED: AtomicU64 = AtomicU64::new(0);

/// Sleeps until everything is to go on.
fn hold() {
    HOLD.lock();
    HOLD.unlock();
}

/// A thread that is to be found in a certain call, and to come to a certain result.
struct Inhabitant {
    name: &'static str,
    handle: thread::Handle,
    /// The call that it is about to make when it is stopped; none if it is in no call.
    call: Option<Entry>,
    result: &'static AtomicU64,
    expected: u64,
}

/// All of them.
#[derive(Default)]
struct Colony {
    inhabitants: Vec<Inhabitant>,
    failed: u64,
}

impl Colony {
    /// Adds a thread.
    fn settle(
        &mut self,
        name: &'static str,
        call: impl Into<Option<Entry>>,
        expected: u64,
        body: impl FnOnce() -> u64 + Send + 'static,
    ) -> Result<(), Status> {
        let result: &'static AtomicU64 = Box::leak(Box::new(AtomicU64::new(PENDING)));
        let handle = thread::spawn(move || result.store(body(), Relaxed))?;
        self.inhabitants.push(Inhabitant {
            name,
            handle,
            call: call.into(),
            result,
            expected,
        });
        Ok(())
    }

    fn check(&mut self, name: &str, expected: u64, saw: u64) {
        let right = expected == saw;
        self.failed += u64::from(!right);
        let verdict = if right { "ok" } else { "FAILED" };
        println!("colony: {verdict:<7} {name}: expected {expected}, saw {saw}");
    }
}

impl Inhabitant {
    /// Waits until it sleeps where it should: stops it each time, and lets it go on.
    fn sleeps(&self) -> bool {
        (0..LOOKS).any(|_| {
            thread::sleep(NAP_NS);
            let thread = self.handle.thread();
            let mut state = thread.state(None);
            let registers = &state.registers;
            let call = Entry::from_number(CallWord(registers.rax).number());
            let call = call.filter(|_| registers.rip == GATE);
            state.flags &= !ThreadFlags::STOPPED.bits();
            // SAFETY: the state is the thread's own.
            unsafe { thread.set_state(Some(&state), None, None, None) };
            call == self.call
        })
    }
}

/// A port set, and a link to a port in it.
fn service() -> Result<(&'static Pset, &'static Ref), Status> {
    let pset = Pset::alloc()?;
    Ok((pset, Ref::to(Port::in_set(pset, 0)?)?))
}

/// Answers every message on a port set with the sum of its words, for ever: calls and faults start over when
/// either end is made again, and somebody must be there for them.
fn stand_by(pset: &'static Pset) -> Result<(), Status> {
    thread::spawn(move || {
        let mut buffer = [0; 16];
        let mut server = rpc::Server::new(pset, &mut buffer, &[]);
        let mut reply = 0;
        loop {
            server.reply_and_wait(&[reply, 0]);
            reply = server
                .words()
                .iter()
                .fold(0, |sum, word| word.wrapping_add(sum));
        }
    })
    .map(|_| ())
}

fn locks(colony: &mut Colony) -> Result<(), Status> {
    colony.settle("mutex_lock", Entry::mutex_lock, 1, || {
        hold();
        1
    })?;
    // In cond_wait, asleep, it is about to lock the mutex again.
    colony.settle("cond_wait", Entry::mutex_lock, 1, || {
        static MUTEX: Mutex = Mutex::new();
        if MUTEX.create().is_err() {
            return 0;
        }
        MUTEX.with(|| {
            while RELEASED.load(Relaxed) == 0 {
                RELEASE.wait(&MUTEX);
            }
        });
        RELEASED.load(Relaxed)
    })
}

/// The program.
pub fn main() -> u64 {
    match startup::args().nth(1) {
        None => {}
        Some("peer") => return spaces::peer(),
        Some("worker") => return spaces::worker(),
        Some(_) => return crate::USAGE,
    }
    let mut colony = Colony::default();
    match live(&mut colony) {
        Ok(()) if colony.failed == 0 => {
            println!("colony: all is well");
            0
        }
        Ok(()) => crate::FAILED,
        Err(status) => {
            println!("colony: cannot settle: {status:?}");
            crate::FAILED
        }
    }
}

fn live(colony: &mut Colony) -> Result<(), Status> {
    HOLD.create()?;
    RELEASE.create()?;
    HOLD.lock();
    locks(colony)?;
    time::settle(colony)?;
    connections::settle(colony)?;
    let (idle_pset, idle) = service()?;
    colony.settle(
        "ipc_setup_wait_receive",
        Entry::ipc_wait_receive,
        7,
        move || {
            let mut buffer = [0; 8];
            let mut server = rpc::Server::new(idle_pset, &mut buffer, &[]);
            server.wait();
            server.words()[0]
        },
    )?;
    memory::settle(colony)?;
    let spaces = spaces::settle(colony)?;
    let stopped = time::settle_stopped()?;

    for inhabitant in &colony.inhabitants {
        if !inhabitant.sleeps() {
            println!("colony: {} does not sleep where it should", inhabitant.name);
            colony.failed += 1;
        }
    }
    println!("colony: {} threads are asleep", colony.inhabitants.len());
    parent::checkpoint(1);

    RELEASED.store(1, Relaxed);
    RELEASE.broadcast();
    HOLD.unlock();
    rpc::send(idle, &[7])?;
    for inhabitant in core::mem::take(&mut colony.inhabitants) {
        let done = (0..LOOKS).any(|_| {
            let done = inhabitant.handle.is_done();
            if !done {
                thread::sleep(NAP_NS);
            }
            done
        });
        let result = inhabitant.result.load(Relaxed);
        colony.check(
            inhabitant.name,
            inhabitant.expected,
            if done { result } else { PENDING },
        );
    }
    stopped.check(colony);
    spaces.check(colony);
    Ok(())
}
