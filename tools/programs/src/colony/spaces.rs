//! Other spaces: one that waits for an answer from here, and one below a supervisor, that uses more and more
//! memory.

use alloc::vec;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::Status;
use fluke_abi::entry::Entry;
use libfluke::object::{Mutex, Port, Pset, Ref};
use libfluke::parent::EXIT;
use libfluke::rpc::{self, Server};
use libfluke::space::{Child, Error, Spec, own_image};
use libfluke::startup::{self, startup};
use libfluke::supervisor::{End, Job, Supervisor};
use libfluke::thread;

use super::{Colony, PENDING, hold};

/// Words of a peer's message, and its sum.
const WORDS: u64 = 100;
const SUM: u64 = WORDS * (WORDS - 1) / 2;
/// Steps of a worker, and bytes of memory it uses in each; how long it rests after one.
const STEPS: u64 = 60;
const STEP_BYTES: usize = 12 << 10;
const REST_NS: u64 = 50_000_000;
/// Status of a worker that found everything as it left it.
const WELL: u64 = 42;

/// What the other spaces come to.
pub struct Spaces {
    worker: &'static AtomicU64,
    server: thread::Handle,
}

fn no_memory(error: Error) -> Status {
    match error {
        Error::NoMemory | Error::BadImage(_) => Status::NoMemory,
    }
}

/// Makes them.
pub fn settle(colony: &mut Colony) -> Result<Spaces, Status> {
    let pset = Pset::alloc()?;
    let port = Ref::to(Port::in_set(pset, 0)?)?;
    let spec = Spec::own_program(b"colony\0peer\0", port)?;
    Child::new(&spec).map_err(no_memory)?.start();
    colony.settle(
        "a server of another space",
        Entry::mutex_lock,
        SUM,
        move || {
            let mut buffer = vec![0; WORDS as usize + 1];
            let mut server = Server::new(pset, &mut buffer, &[]);
            server.wait();
            let sum = server.words().iter().sum();
            hold();
            server.reply_and_wait(&[sum, 0]);
            match *server.words() {
                [EXIT, sum, ..] => sum,
                _ => PENDING,
            }
        },
    )?;
    let worker: &'static AtomicU64 =
        alloc::boxed::Box::leak(alloc::boxed::Box::new(AtomicU64::new(PENDING)));
    let server = thread::spawn(move || {
        if let Ok(status) = supervise() {
            worker.store(status, Relaxed);
        }
    })?;
    Ok(Spaces { worker, server })
}

/// Runs the worker below a supervisor.
fn supervise() -> Result<u64, Error> {
    let mut worker = Supervisor::start(&Job {
        image: startup::image(),
        image_export: own_image()?,
        args: b"colony\0worker\0",
        files: &[],
        heap: 4 << 20,
        limit: 4 << 20,
        store: None,
    })?;
    let end = worker.serve();
    worker.destroy();
    Ok(match end {
        End::Exited(status) => status,
        End::Raised(_) | End::OutOfMemory => 0,
    })
}

impl Spaces {
    /// The worker must have found everything as it left it.
    pub fn check(self, colony: &mut Colony) {
        self.server.join();
        colony.check(
            "a space below a supervisor",
            WELL,
            self.worker.load(Relaxed),
        );
    }
}

/// In another space: sends a message, and ends with the answer.
pub fn peer() -> u64 {
    let message: vec::Vec<_> = (0..WORDS).collect();
    let mut reply = [0; 2];
    match rpc::rpc(&startup().parent, &message, &[], &mut reply) {
        Ok(2) => reply[0],
        _ => 0,
    }
}

/// In another space: fills memory, a step after the other, with a second thread that counts.
pub fn worker() -> u64 {
    static MUTEX: Mutex = Mutex::new();
    static COUNT: AtomicU64 = AtomicU64::new(0);
    if MUTEX.create().is_err() {
        return 0;
    }
    let counter = thread::spawn(|| {
        for _ in 0..STEPS {
            MUTEX.with(|| COUNT.fetch_add(1, Relaxed));
            thread::sleep(REST_NS);
        }
    });
    let Ok(counter) = counter else { return 0 };
    let mut memory = vec![];
    for step in 0..STEPS {
        MUTEX.with(|| memory.push(vec![step as u8; STEP_BYTES]));
        thread::sleep(REST_NS);
    }
    counter.join();
    let whole = (0..)
        .zip(&memory)
        .all(|(step, bytes): (u64, _)| bytes.iter().all(|&b| b == step as u8));
    if whole && COUNT.load(Relaxed) == STEPS {
        WELL
    } else {
        0
    }
}
