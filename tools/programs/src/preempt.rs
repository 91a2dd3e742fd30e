//! Long messages between two threads while a more important third one keeps waking to look how far
//! the copy has come. On one CPU it sees the middle of a message only if the kernel has preemption
//! points in the copy.

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

/// Returns the number of messages and of errors.
fn test() -> Result<(u64, u64), Status> {
    let (from, to) = (message()?, message()?);
    // SAFETY: the words are aligned and live for ever, and who else has them, the server, only reads
    // them after it has received them.
    let ends = [0, WORDS - 1].map(|n| unsafe { AtomicU64::from_ptr(&raw mut to[n]) });
    let pset = Pset::alloc()?;
    let port = Ref::to(Port::in_set(pset, 0)?)?;
    thread::spawn(move || server(pset, to))?;
    let looker = thread::spawn(move || look(ends))?;
    looker.set_priority(PRIORITY_MAX.min(PRIORITY_DEFAULT + 1));
    let end = startup::now() + TIME_NS;
    let (mut round, mut errors) = (0, 0);
    while round < ROUNDS || startup::now() < end {
        round += 1;
        from.fill(round);
        let mut reply = [0];
        let answered = rpc::rpc(port, from, &[], &mut reply);
        if answered != Ok(1) || reply != [round] {
            println!("preempt: round {round}: {answered:?}, {}", reply[0]);
            errors += 1;
        }
    }
    DONE.store(true, Relaxed);
    looker.join();
    Ok((round, errors))
}

/// The program.
pub fn main() -> u64 {
    match test() {
        Ok((messages, errors)) => {
            let (looks, middles) = (LOOKS.load(Relaxed), MIDDLES.load(Relaxed));
            println!("preempt: {looks} looks");
            println!("preempt: {middles} in the middle of {messages} messages, {errors} errors");
            if errors == 0 { 0 } else { crate::FAILED }
        }
        Err(status) => {
            println!("preempt: cannot begin: {status:?}");
            crate::FAILED
        }
    }
}
