//! A second space, which runs another copy of this program.

use fluke_abi::ipc::ExceptionMessage;
use fluke_abi::state::PRIORITY_DEFAULT;
use libfluke::exception::{self, Describe};
use libfluke::object::{Port, Pset, Ref};
use libfluke::parent::{EXIT, REGISTER};
use libfluke::rpc::{self, Server};
use libfluke::space::{Child, ChildFile, ChildHeap, Error, Export, Spec};
use libfluke::{exit, println, startup, thread};

/// Starts a copy of this program with these arguments, each ended by a NUL, and that heap; waits until it has
/// told where it can be reached.
pub fn start(args: &[u8], heap: ChildHeap<'_>) -> Result<&'static Ref, Error> {
    start_with(args, heap, &[], &[])
}

/// The same; it also sees memory of this program's (an export, the first address and bytes, and where) and files.
pub fn start_with(
    args: &[u8],
    heap: ChildHeap<'_>,
    views: &[(&Export, u64, u64, u64)],
    files: &[ChildFile<'_>],
) -> Result<&'static Ref, Error> {
    let pset = Pset::alloc()?;
    let parent = Ref::to(Port::in_set(pset, 0)?)?;
    let spec = Spec {
        heap,
        files,
        ..Spec::own_program(args, parent)?
    };
    let mut child = Child::new(&spec)?;
    for (export, from, size, at) in views {
        child.map(export, *from, *size, libfluke::space::READ_WRITE, *at)?;
    }
    child.start();
    let slot = Ref::alloc()?;
    let slots = [slot];
    let mut buffer = [0; ExceptionMessage::WORDS + 1];
    let mut server = Server::new(pset, &mut buffer, &slots);
    loop {
        let request = server.wait();
        match server.words() {
            [REGISTER, ..] if request.refs == 1 => break,
            words => ended(words),
        }
    }
    server.reply(&[]);
    // Whatever else it says is its end.
    let listener = thread::spawn(move || {
        let mut buffer = [0; ExceptionMessage::WORDS + 1];
        let mut server = Server::new(pset, &mut buffer, &[]);
        loop {
            server.wait();
            ended(server.words());
        }
    })?;
    // So that it waits before anything is measured.
    listener.set_priority(PRIORITY_DEFAULT + 1);
    Ok(slot)
}

/// A copy of the program that ends takes this one with it.
fn ended(words: &[u64]) {
    match (words, exception::parse(words)) {
        (_, Some(raised)) => println!("the other space: {}", Describe(&raised)),
        ([EXIT, status, ..], _) => println!("the other space ended with status {status}"),
        _ => return,
    }
    exit(crate::FAILED);
}

/// In the other space: makes a port, and tells the parent.
pub fn register() -> Result<&'static Pset, fluke_abi::code::Status> {
    let pset = Pset::alloc()?;
    let port = Ref::to(Port::in_set(pset, 0)?)?;
    let parent = &startup::startup().parent;
    rpc::rpc(parent, &[REGISTER, 0], &[port], &mut [0; 2])?;
    Ok(pset)
}
