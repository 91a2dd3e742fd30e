//! Short calls, many times each, for `flukevm run --count` and `--profile`: what the kernel costs where it does
//! least: of the cases given, or of all.
//!
//! | case | |
//! | --- | --- |
//! | `null` | an entry point that does nothing |
//! | `mutex` | taking and letting go of a mutex that nobody else wants |
//! | `nullrpc` | an idempotent request of the least size, two words, to another space, and an empty answer |
//! | `rpc` | the same, and an answer of two words |
//! | `fault` | touching memory that is there, but in no page table |

use fluke_abi::code::Status;
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
const CASES: [Case; 5] = [
    ("null", null),
    ("mutex", mutex),
    ("nullrpc", null_rpc),
    ("rpc", rpc),
    ("fault", fault),
];

/// The program.
pub fn main() -> u64 {
    let mut args = startup::args().skip(1);
    if args.next() == Some("client") {
        let words = if args.next() == Some("words") { 2 } else { 0 };
        return client(words).map_or(crate::FAILED, |()| 0);
    }
    let chosen = || startup::args().skip(1);
    if chosen().any(|name| CASES.iter().all(|(case, _)| *case != name)) {
        println!("costs: usage: costs [null | mutex | nullrpc | rpc | fault]...");
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
