//! Short calls, many times each, for `flukevm run --count` and `--profile`: what the kernel costs where it does
//! least: of the cases given, or of all.
//!
//! | case | |
//! | --- | --- |
//! | `null` | an entry point that does nothing |
//! | `mutex` | taking and letting go of a mutex that nobody else wants |
//! | `nullrpc` | an idempotent request of the least size, two words, to another space, and an empty answer |
//! | `rpc` | the same, and an answer of two words |
//! | `pieces` | the same as `nullrpc`, in two buffers: not on the fast path, but with the switch of others |
//! | `fault` | touching memory that is there, but in no page table |

use fluke_abi::code::Status;
use fluke_abi::ipc::{Buffer, Params};
use fluke_abi::layout::PAGE_SIZE;
use libfluke::object::{Mutex, Port, Pset, Ref};
use libfluke::parent::EXIT;
use libfluke::rpc::{self, Server};
use libfluke::space::{Child, Export, READ_WRITE, Spec};
use libfluke::{heap, println, startup, sys};

/// Times each is done.
const TIMES: usize = 32;
/// Where memory is seen a second time. Nothing else is there.
const VIEW: u64 = 0x6000_0000;

fn null() -> Result<(), Status> {
    for _ in 0..TIMES {
        // SAFETY: it only returns an address.
        unsafe { sys::thread_self() };
    }
    Ok(())
}

fn mutex() -> Result<(), Status> {
    let mutex = Mutex::alloc()?;
    for _ in 0..TIMES {
        mutex.with(|| ());
    }
    Ok(())
}

fn null_rpc() -> Result<(), Status> {
    serve(b"costs\0client\0", 0)
}

fn rpc() -> Result<(), Status> {
    serve(b"costs\0client\0words\0", 2)
}

fn pieces() -> Result<(), Status> {
    serve(b"costs\0client\0pieces\0", 0)
}

/// The server is this program, the client another copy of it.
fn serve(client: &[u8], words: usize) -> Result<(), Status> {
    let pset = Pset::alloc()?;
    let port = Ref::to(Port::in_set(pset, 0)?)?;
    let spec = Spec::own_program(client, port)?;
    let child = Child::new(&spec).map_err(|_| Status::NoMemory)?;
    let mut buffer = [0; 2];
    let mut server = Server::new(pset, &mut buffer, &[]);
    child.start();
    loop {
        server.reply_and_wait(&[0; 2][..words]);
        if matches!(*server.words(), [EXIT, _]) {
            return Ok(());
        }
    }
}

fn client(words: usize) -> Result<(), Status> {
    for _ in 0..TIMES {
        let mut answer = [0; 2];
        let (request, answer) = (&[0; 2][..words], &mut answer[..words]);
        rpc::call(&startup::startup().parent, request, answer)?;
    }
    Ok(())
}

fn client_of_pieces() -> Result<(), Status> {
    let request = [0u64; 2];
    let buffer = |words: &[u64]| Buffer {
        address: words.as_ptr() as u64,
        words: words.len() as u64,
    };
    let more = buffer(&[]);
    for _ in 0..TIMES {
        let mut params = Params {
            send: buffer(&request),
            send_table: &raw const more,
            send_buffers: 1,
            ..Params::default()
        };
        let port = startup::startup().parent.handle();
        // SAFETY: buffers and table are there for the call.
        sys::check(unsafe { sys::ipc_call(port, &raw mut params) })?;
    }
    Ok(())
}

/// Memory of the program's own, in a region of its own, seen at other addresses: three steps from the page to
/// physical memory.
fn fault() -> Result<(), Status> {
    const BYTES: u64 = 16 * PAGE_SIZE;
    let memory = heap::pages(BYTES).ok_or(Status::NoMemory)?;
    let page = memory as *mut u64;
    // SAFETY: the memory is ours. It is there from now on.
    unsafe { page.write_volatile(0) };
    let region = Export::alloc(memory, BYTES, READ_WRITE, None)?;
    let view = region.map(memory, BYTES, READ_WRITE, &startup::startup().space, VIEW)?;
    for _ in 0..TIMES {
        // SAFETY: permissions stay what they are; but what derives from the mapping is dropped. The view is of
        // the page that is there.
        unsafe {
            sys::mapping_protect(view.handle(), READ_WRITE.bits());
            (VIEW as *const u64).read_volatile();
        }
    }
    Ok(())
}

type Case = (&'static str, fn() -> Result<(), Status>);

/// What there is.
const CASES: [Case; 6] = [
    ("null", null),
    ("mutex", mutex),
    ("nullrpc", null_rpc),
    ("rpc", rpc),
    ("pieces", pieces),
    ("fault", fault),
];

/// The program.
pub fn main() -> u64 {
    let mut args = startup::args().skip(1);
    if args.next() == Some("client") {
        let done = match args.next() {
            Some("pieces") => client_of_pieces(),
            Some("words") => client(2),
            _ => client(0),
        };
        return done.map_or(crate::FAILED, |()| 0);
    }
    let chosen = || startup::args().skip(1);
    if chosen().any(|name| CASES.iter().all(|(case, _)| *case != name)) {
        println!("costs: usage: costs [null | mutex | nullrpc | rpc | pieces | fault]...");
        return crate::USAGE;
    }
    let all = chosen().next().is_none();
    for (name, case) in CASES {
        if !all && chosen().all(|chosen| chosen != name) {
            continue;
        }
        if let Err(status) = case() {
            println!("costs: {name}: {status:?}");
            return crate::FAILED;
        }
    }
    println!("costs: done");
    0
}
