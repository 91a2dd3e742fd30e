//! Makes life hard for the console's driver: messages that are not as they should be, clients that
//! never finish, and threads that are destroyed and made again while they print. Who reads the output
//! must find each line `line N of T` once, whole, and in order for each T.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::Status;
use fluke_abi::ipc::{Buffer, Params, WORD_SIZE};
use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::state::ThreadFlags;
use libfluke::object::{Port, Pset, Ref, Thread, ThreadLinks};
use libfluke::rpc::{self, Server};
use libfluke::space::{Error, Export, READ_WRITE};
use libfluke::startup::startup;
use libfluke::{console, println, sys, thread};

/// Addresses without memory, and where they are mapped.
const NOWHERE: [u64; 2] = [0x30_0000_0000, 0x31_0000_0000];
/// Threads that print, and how many lines each.
const PRINTERS: usize = 3;
const LINES: u64 = 8;
const NAP_NS: u64 = 8_000_000;

fn port() -> &'static Ref {
    &startup().console
}

/// Says `what`, if `right` is false.
fn check(right: bool, what: &str) -> bool {
    if !right {
        println!("console: wrong: {what}");
    }
    right
}

/// Messages that the driver's own protocol does not know.
fn strange_messages() -> bool {
    let text = u64::from_le_bytes(*b"cut off\n");
    let sent = [
        // A count beyond the message, and one that is less than what there is.
        rpc::send(port(), &[u64::MAX, text]),
        rpc::send(port(), &[3, u64::from_le_bytes(*b"abcdefgh")]),
        rpc::send(port(), &[1, u64::from_le_bytes(*b"\n       ")]),
        rpc::send(port(), &[]),
    ];
    let mut reply = [7; 4];
    let answer = rpc::call(port(), &[8, text], &mut reply);
    // Longer than what the driver can take.
    let long = rpc::call(port(), &[0; 2000], &mut []);
    let connection = rpc::rpc(port(), &[8, text], &[], &mut reply);
    check(sent == [Ok(()); 4], "one-way messages")
        & check((answer, long) == (Ok(0), Ok(0)), "answers")
        & check(reply == [7; 4], "what an answer holds")
        & check(
            connection == Err(Status::ConnectInvalidDest),
            "a connection is made",
        )
}

/// A client whose message is in memory that its keeper never provides.
fn faulting_client() -> Result<bool, Error> {
    let keeper = Ref::to(Port::alloc()?)?;
    let export = Export::alloc(NOWHERE[0], PAGE_SIZE, READ_WRITE, Some(keeper))?;
    let space = &startup().space;
    export.map(NOWHERE[0], PAGE_SIZE, READ_WRITE, space, NOWHERE[1])?;
    let client = thread::spawn(|| {
        let mut params = Params {
            send: Buffer {
                address: NOWHERE[1],
                words: PAGE_SIZE / WORD_SIZE,
            },
            ..Params::default()
        };
        // SAFETY: the kernel finds no memory there.
        unsafe { sys::ipc_send(port().handle(), &raw mut params) };
        println!("console: wrong: a message without memory was sent");
    })?;
    thread::sleep(NAP_NS);
    console::flush();
    client.destroy();
    Ok(true)
}

/// Printing is no end to a connection in which the thread is client.
fn inside_a_connection() -> Result<bool, Error> {
    let pset = Pset::alloc()?;
    let dest = Ref::to(Port::in_set(pset, 0)?)?;
    let server = thread::spawn(move || {
        let mut buffer = [0; 8];
        let mut server = Server::new(pset, &mut buffer, &[]);
        server.wait();
        server.reply_and_wait(&[11, 12]);
    })?;
    let message = [1_u64, 2];
    let mut reply = [0_u64; 4];
    let mut params = Params {
        send: Buffer {
            address: message.as_ptr() as u64,
            words: 2,
        },
        recv: Buffer {
            address: reply.as_mut_ptr() as u64,
            words: 4,
        },
        ..Params::default()
    };
    // SAFETY: the buffers outlive the calls.
    let status = unsafe {
        sys::ipc_client_connect_send(dest.handle(), &raw mut params);
        println!("console: inside a connection");
        sys::status(sys::ipc_client_over_receive(&raw mut params))
    };
    server.destroy();
    let ended = matches!(status, Status::Success | Status::RecvDisconnected);
    Ok(check(
        ended && reply[..2] == [11, 12],
        "a connection is lost",
    ))
}

/// Threads that print, each of which is again and again destroyed and made again from its state.
fn phoenixes() -> Result<bool, Error> {
    static ALLOWED: AtomicU64 = AtomicU64::new(0);
    static PRINTED: [AtomicU64; PRINTERS] = [const { AtomicU64::new(0) }; PRINTERS];
    let links = ThreadLinks::alloc()?;
    let mut printers = alloc::vec::Vec::new();
    for (number, printed) in PRINTED.iter().enumerate() {
        printers.push(thread::spawn(move || {
            for line in 0..LINES {
                while line >= ALLOWED.load(Relaxed) {
                    thread::sleep(NAP_NS);
                }
                println!("line {line} of {number}");
                printed.fetch_add(1, Relaxed);
            }
        })?);
    }
    // The last line is for those that are left alone.
    for round in 1..LINES {
        ALLOWED.store(round, Relaxed);
        // Until somewhere before, in or behind the line.
        thread::sleep(NAP_NS + round * NAP_NS / 4);
        for printer in &mut printers {
            let mut state = printer.thread().state(Some(links));
            printer.thread().destroy();
            let heir = Thread::alloc()?;
            state.thread_va = heir.handle() as u64;
            state.flags &= !ThreadFlags::STOPPED.bits();
            // SAFETY: the state is that of a thread of this program, which no longer exists.
            unsafe { heir.set_state(Some(&state), Some(&links.task), None, None) };
            printer.replace(heir);
        }
    }
    ALLOWED.store(LINES, Relaxed);
    printers.into_iter().for_each(thread::Handle::join);
    let all = PRINTED.iter().all(|count| count.load(Relaxed) == LINES);
    Ok(check(all, "lines are lost"))
}

/// The program.
pub fn main() -> u64 {
    let tests: [fn() -> Result<bool, Error>; 4] = [
        || Ok(strange_messages()),
        faulting_client,
        inside_a_connection,
        phoenixes,
    ];
    let mut right = true;
    for test in tests {
        match test() {
            Ok(fine) => right &= fine,
            Err(error) => {
                println!("console: {error}");
                return crate::FAILED;
            }
        }
    }
    if right {
        println!("console: ok");
        0
    } else {
        crate::FAILED
    }
}
