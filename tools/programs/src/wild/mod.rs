//! Calls every entry point that is built with wild parameters: null, misaligned, unmapped,
//! read-only and kernel addresses, memory that holds no object, objects of another type. Each call
//! must come back, as an exception or with a status; those that may sleep are made by a thread
//! that is then stopped where it sleeps and destroyed. Each must end only as its row of the
//! table says, and in every way that it says.

mod messages;
mod misuse;
mod pairs;
mod sleepers;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::Status;
use fluke_abi::entry::{Convention, Entry, Row, TABLE};
use fluke_abi::error::pointee;
use fluke_abi::ipc::CallWord;
use fluke_abi::layout::{GATE, PAGE_SIZE, VM_MAX};
use fluke_abi::object::{self, Type};
use libfluke::object::{Mutex, Port, Pset, Ref, Region};
use libfluke::rpc::Server;
use libfluke::space::READ_WRITE;
use libfluke::{heap, println, startup, sys, thread};

use crate::handler;
use pairs::check;

/// Addresses that are never right.
const BAD: [u64; 8] = [
    0,
    0x10,
    GATE,
    0x2000_0000_0000,
    VM_MAX,
    1 << 47,
    0xffff_ffff_8000_0000,
    u64::MAX - 31,
];
/// Numbers that are not likely to be right.
const NUMBERS: [u64; 5] = [0, 7, 0x1000, 1 << 63, u64::MAX];
/// How often to look whether the calls go on.
const LOOK_NS: u64 = 200_000_000;
/// A call that takes longer than this hangs.
const PATIENCE_NS: u64 = 10_000_000_000;

/// Calls made, and which one is being made: entry number, parameter, value.
static CALLS: AtomicU64 = AtomicU64::new(0);
static NOW: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];
static FINISHED: AtomicU64 = AtomicU64::new(0);

/// Good parameters, of which one at a time is replaced.
struct Good {
    this: u64,
    /// One object of each type, by the name of the type.
    objects: [(&'static str, u64); 9],
    /// Memory to read and write.
    scratch: u64,
    /// Code: readable, not writable.
    text: u64,
    /// A port with a server.
    served: &'static Ref,
}

impl Good {
    fn new() -> Result<Self, Status> {
        let scratch = heap::pages(PAGE_SIZE).ok_or(Status::NoMemory)?;
        let region = Region::alloc()?;
        region.set(
            scratch,
            PAGE_SIZE,
            READ_WRITE,
            &startup::startup().space,
            None,
        );
        let pset = Pset::alloc()?;
        let served = Ref::to(Port::in_set(pset, 0)?)?;
        thread::spawn(move || {
            let mut buffer = [0; 8];
            let mut server = Server::new(pset, &mut buffer, &[]);
            loop {
                server.reply_and_wait(&[0; 2]);
            }
        })?;
        let objects = Type::ALL.map(|kind| match kind {
            Type::Region => (kind.name(), region.handle() as u64),
            _ => (
                kind.name(),
                fresh(&alloc::format!("*mut {}", kind.name())).unwrap_or(0),
            ),
        });
        let text = main as *const () as u64 & !31;
        Ok(Self {
            this: thread::current(),
            objects,
            scratch,
            text,
            served,
        })
    }

    /// The object of the type that a parameter of type `ty` points to, if it points to one.
    fn object(&self, ty: &str) -> Option<u64> {
        let wanted = pointee(ty)?;
        self.objects
            .iter()
            .find(|(name, _)| *name == wanted)
            .map(|&(_, address)| address)
    }

    /// A right value for a parameter.
    fn value(&self, row: &Row, name: &str, ty: &str) -> u64 {
        match self.object(ty) {
            _ if name == "cur_thread" => self.this,
            _ if row.fills(name) => empty(),
            Some(object) => object,
            None if ty == "u64" => 1,
            None => self.scratch,
        }
    }

    /// Wrong values for a parameter.
    fn wild(&self, row: &Row, name: &str, ty: &str) -> Result<Vec<u64>, Status> {
        // What would sleep: `sleepers` does that.
        match row.name {
            "thread_sleep" => return Ok(alloc::vec![0, 1, 0x1000]),
            "machine_listen" => return Ok(alloc::vec![1, u64::MAX]),
            _ => {}
        }
        if ty == "u64" {
            return Ok(NUMBERS.into());
        }
        let mut values = Vec::from(BAD);
        values.push(self.text);
        let Some(right) = self.object(ty) else {
            values.push(self.scratch + 8);
            return Ok(values);
        };
        if !row.fills(name) {
            values.push(empty());
        }
        match pointee(ty) {
            // Not everything can be done to oneself.
            Some("Thread") if name != "cur_thread" => values.push(self.this),
            // Nothing links to a mutex but a reference.
            Some("Ref") => values.push(Ref::to(Mutex::alloc()?)?.handle() as u64),
            _ => {}
        }
        values.push(right + 8);
        // Two of other types.
        let others = self.objects.iter().map(|&(_, address)| address);
        let others = others.clone().chain(others).skip_while(|&a| a != right);
        values.extend(others.skip(1).take(2));
        Ok(values)
    }
}

/// A new object of the type that a parameter of type `ty` points to, if it points to one.
fn fresh(ty: &str) -> Option<u64> {
    let kind = pointee(ty)?;
    let makes = |row: &&Row| row.object == kind && row.name.ends_with("_create");
    let row = TABLE.iter().find(makes)?;
    let at = empty();
    // SAFETY: the memory is free.
    unsafe { sys::trap(row.number.into(), [at, 0, 0, 0, 0, 0, 0, 0]) };
    Some(at)
}

/// Memory that could hold an object, with few others in its page: the kernel looks an object up among those.
#[repr(align(256))]
struct Spot(object::Mutex);

/// Memory that holds no object.
fn empty() -> u64 {
    // Never freed: the call may make an object there.
    Box::leak(Box::new(Spot(object::Mutex::new()))).0.handle() as u64
}

fn note(entry: u16, parameter: u64, value: u64) {
    CALLS.fetch_add(1, Relaxed);
    for (slot, value) in NOW.iter().zip([u64::from(entry), parameter, value]) {
        slot.store(value, Relaxed);
    }
}

fn registers_row(good: &Good, row: &Row) -> Result<(), Status> {
    let mut right = [0; 8];
    for (slot, (name, ty)) in right.iter_mut().zip(row.parameters) {
        *slot = good.value(row, name, ty);
    }
    // All right, with objects that may be lost, and states that are zero.
    let mut parameters = right;
    for (slot, (name, ty)) in parameters.iter_mut().zip(row.parameters) {
        if *name != "cur_thread" && !row.fills(name) {
            *slot = fresh(ty).unwrap_or(*slot);
        }
    }
    // SAFETY: the page is only used by these calls.
    unsafe { (good.scratch as *mut u8).write_bytes(0, PAGE_SIZE as usize) };
    make(row, row.parameters.len() as u64, 0, parameters);
    for (i, (name, ty)) in row.parameters.iter().enumerate() {
        for value in good.wild(row, name, ty)? {
            let mut parameters = right;
            for (slot, (name, ty)) in parameters.iter_mut().zip(row.parameters) {
                if row.fills(name) {
                    *slot = good.value(row, name, ty);
                }
            }
            parameters[i] = value;
            make(row, i as u64, value, parameters);
        }
    }
    Ok(())
}

/// Makes a call of which that parameter has that value.
fn make(row: &Row, parameter: u64, value: u64, parameters: [u64; 8]) {
    note(row.number, parameter, value);
    // SAFETY: whatever the kernel writes goes to scratch memory, or it is at fault.
    check(row, unsafe { sys::trap(u64::from(row.number), parameters) });
    // Null is the caller too, whose handlers and flag this row may have changed.
    let own = row
        .parameters
        .first()
        .is_some_and(|&(name, _)| name == "cur_thread");
    if own && (parameters[0] == 0 || parameter > 0) {
        handler::install();
    }
}

/// The registers of a message transfer, all wild.
#[derive(Clone, Copy, Default)]
struct Message {
    dest: u64,
    send: [u64; 2],
    recv: [u64; 2],
    /// Tables of send buffers, references to send, receive buffers, references to fill; each is
    /// said to have one entry if it is not 0.
    tables: [u64; 4],
}

impl Message {
    /// Makes the call.
    unsafe fn call(self, number: u16) -> u64 {
        let [send, refs, recv, slots] = self.tables.map(|table| u8::from(table != 0));
        let word = CallWord(u64::from(number))
            .with_send_buffers(send)
            .with_send_refs(refs)
            .with_recv_buffers(recv)
            .with_recv_refs(slots);
        let [send_words, recv_words] = [self.send[1], self.recv[1]];
        let [send_table, send_refs, recv_table, recv_refs] = self.tables;
        let rest = [
            self.dest,
            self.send[0],
            send_words,
            self.recv[0],
            recv_words,
            send_table,
            send_refs,
            recv_table,
            recv_refs,
        ];
        // SAFETY: the caller's promise.
        unsafe { handler::call(word.0, rest) }
    }
}

/// Calls with one parameter wild and the others in order.
fn message_row(good: &Good, row: &Row) -> Result<(), Status> {
    let named = row.parameters.len() == 2;
    let first = row.parameters[0];
    let buffer = [good.scratch, 4];
    if named {
        let null = fresh(first.1).filter(|_| first.0 == "dest");
        for value in good.wild(row, first.0, first.1)?.into_iter().chain(null) {
            let message = Message {
                dest: value,
                send: buffer,
                recv: buffer,
                ..Message::default()
            };
            note(row.number, 0, value);
            // SAFETY: the buffers are scratch memory.
            check(row, unsafe { message.call(row.number) });
        }
    }
    // A server would really wait; `sleepers` does that.
    if row.name.contains("wait") && !row.name.starts_with("ipc_server") {
        return Ok(());
    }
    if !named {
        // Without a partner nothing else is looked at; `messages` does that.
        note(row.number, 0, 0);
        // SAFETY: the call moves nothing.
        check(row, unsafe { Message::default().call(row.number) });
        return Ok(());
    }
    let mut values = Vec::from(BAD);
    values.extend([good.text, good.scratch + 4, good.objects[0].1]);
    for value in values {
        let base = Message {
            dest: good.served.handle() as u64,
            send: buffer,
            recv: buffer,
            ..Message::default()
        };
        let mut messages = [base; 6];
        messages[0].send[0] = value;
        messages[1].recv[0] = value;
        for (i, message) in messages[2..].iter_mut().enumerate() {
            message.tables[i] = value;
        }
        for (i, message) in messages.into_iter().enumerate() {
            note(row.number, i as u64 + 1, value);
            // SAFETY: the kernel writes to scratch memory, or is at fault.
            unsafe {
                check(row, message.call(row.number));
                sys::ipc_client_disconnect();
            }
        }
    }
    Ok(())
}

fn test() -> Result<(), Status> {
    let good = Good::new()?;
    handler::install();
    for row in TABLE.iter().filter(|row| row.built) {
        match row.convention {
            Convention::Registers => registers_row(&good, row)?,
            Convention::Message => message_row(&good, row)?,
        }
    }
    if messages::run(good.scratch)? + misuse::run()? != 0 {
        FINISHED.store(2, Relaxed);
    }
    // Numbers that no entry point has.
    for number in [0, 114, 119, 128, 0xffff] {
        note(number, 0, 0);
        // SAFETY: there is no such call.
        let result = unsafe { sys::trap(u64::from(number), [0; 8]) };
        if handler::raised(result).is_none() {
            println!("wild: entry {number} does not exist, and returned {result:#x}");
            FINISHED.store(2, Relaxed);
        }
    }
    Ok(())
}

/// The program.
pub fn main() -> u64 {
    let tester = thread::spawn_with_stack(256 << 10, || {
        let status = test().map_or_else(|status| status as u64, |()| 0);
        if status != 0 {
            println!("wild: cannot begin: status {status}");
        }
        let _ = FINISHED.compare_exchange(0, 1 + status, Relaxed, Relaxed);
    });
    if tester.is_err() {
        println!("wild: no memory for a thread");
        return crate::FAILED;
    }
    let (mut seen, mut since) = (0, startup::now());
    while FINISHED.load(Relaxed) == 0 {
        thread::sleep(LOOK_NS);
        let calls = CALLS.load(Relaxed);
        if calls != seen {
            (seen, since) = (calls, startup::now());
        } else if startup::now() - since > PATIENCE_NS {
            let [number, parameter, value] = NOW.each_ref().map(|slot| slot.load(Relaxed));
            let name = Entry::from_number(number as u16).map_or("?", |entry| entry.row().name);
            println!("wild: {name} hangs with parameter {parameter} = {value:#x}");
            return crate::FAILED;
        }
    }
    let raised = handler::taken();
    let calls = CALLS.load(Relaxed);
    println!(
        "wild: {calls} calls of {} entry points came back, {raised} as exceptions",
        TABLE.iter().filter(|row| row.built).count()
    );
    let slept = sleepers::run();
    match (FINISHED.load(Relaxed), pairs::wrong(), slept) {
        (1, 0, Ok(())) => 0,
        _ => crate::FAILED,
    }
}
