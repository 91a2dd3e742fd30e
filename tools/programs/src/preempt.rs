//! Long messages between two threads while a more important third one keeps waking to look how far
//! the copy has come. On one CPU it sees the middle of a message on a connection only if the kernel has
//! preemption points in the copy, and that of an idempotent request, which has none, only if the kernel
//! can be preempted everywhere.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use fluke_abi::code::Status;
use fluke_abi::ipc::WORD_SIZE;
use fluke_abi::state::{PRIORITY_DEFAULT, PRIORITY_MAX};
use libfluke::object::{Port, Pset, Ref};
use libfluke::rpc::{self, Server};
use libfluke::{heap, println, startup, thread};

/// Words of a message: 512 KiB, 64 times the distance of preemption points.
const WORDS: usize = 64 << 10;
/// Least number of messages.
const ROUNDS: u64 = 20;
/// Nanoseconds that messages go on for: many looks, however fast the host.
const TIME_NS: u64 = 1_000_000_000;
/// Nanoseconds between two looks.
const LOOK_NS: u64 = 5_000_000;

static DONE: AtomicBool = AtomicBool::new(false);
static LOOKS: AtomicU64 = AtomicU64::new(0);
static MIDDLES: AtomicU64 = AtomicU64::new(0);

/// Sends a message, and receives the answer into the last slice.
type Send = fn(&Ref, &[u64], &mut [u64]) -> Result<usize, Status>;

/// The kinds of messages that are sent, in that order.
const KINDS: [(&str, Send); 2] = [
    ("messages", |port, message, reply| {
        rpc::rpc(port, message, &[], reply)
    }),
    ("idempotent requests", rpc::call),
];

/// Memory for a message, all of it present.
fn message() -> Result<&'static mut [u64], Status> {
    let bytes = WORDS as u64 * WORD_SIZE;
    let start = heap::pages(bytes).ok_or(Status::NoMemory)?;
    // SAFETY: the pages are ours, zeroed, and never freed.
    let message = unsafe { core::slice::from_raw_parts_mut(start as *mut u64, WORDS) };
    message.fill(0);
    Ok(message)
}

/// Every word of a message is its round's number; the answer says whether they were.
fn server(pset: &Pset, buffer: &mut [u64]) {
    let mut server = Server::new(pset, buffer, &[]);
    let mut reply = [0];
    loop {
        server.reply_and_wait(&reply);
        let words = server.words();
        reply = match *words {
            [first, ..] if words.len() == WORDS && words.iter().all(|w| *w == first) => [first],
            _ => [0],
        };
    }
}

/// Looks at both ends of the receiver's buffer.
fn look(ends: [&AtomicU64; 2]) {
    while !DONE.load(Relaxed) {
        thread::sleep(LOOK_NS);
        LOOKS.fetch_add(1, Relaxed);
        let [first, last] = ends.map(|end| end.load(Relaxed));
        if first != last {
            MIDDLES.fetch_add(1, Relaxed);
        }
    }
}

/// Sends messages for a while; returns their number and that of errors.
fn exchange(port: &Ref, from: &mut [u64], send: Send) -> (u64, u64) {
    let end = startup::now() + TIME_NS;
    let (mut round, mut errors) = (0, 0);
    while round < ROUNDS || startup::now() < end {
        round += 1;
        from.fill(round);
        let mut reply = [0];
        let answered = send(port, from, &mut reply);
        if answered != Ok(1) || reply != [round] {
            println!("preempt: round {round}: {answered:?}, {}", reply[0]);
            errors += 1;
        }
    }
    (round, errors)
}

/// Returns the number of errors.
fn test() -> Result<u64, Status> {
    let (from, to) = (message()?, message()?);
    // SAFETY: the words are aligned and live for ever, and who else has them, the server, only reads
    // them after it has received them.
    let ends = [0, WORDS - 1].map(|n| unsafe { AtomicU64::from_ptr(&raw mut to[n]) });
    let pset = Pset::alloc()?;
    let port = Ref::to(Port::in_set(pset, 0)?)?;
    thread::spawn(move || server(pset, to))?;
    let looker = thread::spawn(move || look(ends))?;
    looker.set_priority(PRIORITY_MAX.min(PRIORITY_DEFAULT + 1));
    let mut all_errors = 0;
    for (kind, send) in KINDS {
        let (messages, errors) = exchange(port, from, send);
        let [looks, middles] = [&LOOKS, &MIDDLES].map(|counter| counter.swap(0, Relaxed));
        println!("preempt: {looks} looks");
        println!("preempt: {middles} in the middle of {messages} {kind}, {errors} errors");
        all_errors += errors;
    }
    DONE.store(true, Relaxed);
    looker.join();
    Ok(all_errors)
}

/// The program.
pub fn main() -> u64 {
    match test() {
        Ok(0) => 0,
        Ok(_) => crate::FAILED,
        Err(status) => {
            println!("preempt: cannot begin: {status:?}");
            crate::FAILED
        }
    }
}
