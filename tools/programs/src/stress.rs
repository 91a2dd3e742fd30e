//! Eight threads that share a counter under a mutex, hand a token round with a condition variable
//! and add numbers by IPC, a bounded number of times, then compute in floating point for longer than
//! a time slice; the sums must come out right.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::Status;
use libfluke::object::{Cond, Mutex, Port, Pset, Ref};
use libfluke::rpc::{self, Server};
use libfluke::{println, startup, thread};

const CLIENTS: u64 = 6;
const SERVERS: u64 = 2;
const ROUNDS: u64 = 20;
/// Terms of a floating-point sum: some 40 ms, several time slices where threads share a CPU.
const TERMS: u32 = 10_000_000;

static MUTEX: Mutex = Mutex::new();
static COND: Cond = Cond::new();
static COUNTER: AtomicU64 = AtomicU64::new(0);
static TURN: AtomicU64 = AtomicU64::new(0);
static SUM: AtomicU64 = AtomicU64::new(0);
static ERRORS: AtomicU64 = AtomicU64::new(0);

fn server(pset: &'static Pset) {
    let mut buffer = [0; 8];
    let mut server = Server::new(pset, &mut buffer, &[]);
    let mut reply = [0; 2];
    loop {
        server.reply_and_wait(&reply);
        reply = match *server.words() {
            [a, b, ..] => [a + b, a * b],
            _ => [0, 0],
        };
    }
}

fn client(number: u64, port: &Ref) {
    for round in 0..ROUNDS {
        // A plain read and write, which only the mutex makes an increment.
        MUTEX.with(|| {
            let count = COUNTER.load(Relaxed);
            core::hint::spin_loop();
            COUNTER.store(count + 1, Relaxed);
        });

        let mut reply = [0; 2];
        let asked = if round % 2 == 0 {
            rpc::rpc(port, &[number, round], &[], &mut reply)
        } else {
            rpc::call(port, &[number, round], &mut reply)
        };
        if asked != Ok(2) || reply != [number + round, number * round] {
            println!("stress: client {number} round {round}: {asked:?} {reply:?}");
            ERRORS.fetch_add(1, Relaxed);
        }
        SUM.fetch_add(reply[0], Relaxed);

        MUTEX.lock();
        while TURN.load(Relaxed) % CLIENTS != number {
            COND.wait(&MUTEX);
        }
        TURN.store(TURN.load(Relaxed) + 1, Relaxed);
        COND.broadcast();
        MUTEX.unlock();
    }
    compute(number);
}

/// Sum of a series that differs for every client, all in vector registers.
fn series(number: u64) -> f64 {
    let step = 1.0 + number as f64;
    (0..TERMS)
        .fold((0.0, 1.0), |(sum, x), _| (sum + 1.0 / x, x + step))
        .0
}

/// A thread that loses its registers to another gets another's sum: the same one twice is right.
fn compute(number: u64) {
    let first = series(core::hint::black_box(number));
    if first.to_bits() != series(core::hint::black_box(number)).to_bits() {
        println!("stress: client {number}: floating-point registers changed");
        ERRORS.fetch_add(1, Relaxed);
    }
}

fn run() -> Result<(), Status> {
    MUTEX.create()?;
    COND.create()?;
    let pset = Pset::alloc()?;
    let port = Ref::to(Port::in_set(pset, 0)?)?;
    let mut servers = Vec::new();
    for _ in 0..SERVERS {
        servers.push(thread::spawn(move || server(pset))?);
    }
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        clients.push(thread::spawn(move || client(number, port))?);
    }
    clients.into_iter().for_each(thread::Handle::join);
    servers.into_iter().for_each(thread::Handle::destroy);
    Ok(())
}

/// The program.
pub fn main() -> u64 {
    if let Err(status) = run() {
        println!("stress: {}", status.name());
        return crate::FAILED;
    }
    let each = CLIENTS * ROUNDS;
    // Each client adds its number and the round, each round.
    let sum = ROUNDS * CLIENTS * (CLIENTS - 1) / 2 + CLIENTS * ROUNDS * (ROUNDS - 1) / 2;
    let seen = [&COUNTER, &TURN, &SUM, &ERRORS].map(|value| value.load(Relaxed));
    println!(
        "stress: {} threads on {} CPUs: counter {}, token passed {} times, sum {}, {} errors",
        CLIENTS + SERVERS,
        startup::cpus(),
        seen[0],
        seen[1],
        seen[2],
        seen[3]
    );
    if seen == [each, each, sum, 0] {
        0
    } else {
        crate::FAILED
    }
}
