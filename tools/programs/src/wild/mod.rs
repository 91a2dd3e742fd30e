//! Calls every entry point that is built with wild parameters: null, misaligned, unmapped,
//! read-only and kernel addresses, memory that holds no object, objects of another type. Each call
//! must come back, as an exception or with a status; those that may sleep are made by a thread
//! that is then stopped where it sleeps and destroyed. Each must fail only as its row of the
//! table says.

mod misuse;
mod sleepers;

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::{Exception, Insanity, Status};
use fluke_abi::entry::{Convention, Entry, Row, TABLE};
use fluke_abi::error::pointee;
use fluke_abi::ipc::CallWord;
use fluke_abi::layout::{GATE, PAGE_SIZE, VM_MAX};
use fluke_abi::object;
use libfluke::object::{Cond, Mapping, Mutex, Port, Pset, Ref, Region, Task, Thread};
use libfluke::rpc::Server;
use libfluke::space::READ_WRITE;
use libfluke::{heap, println, startup, sys, thread};

use crate::handler;

/// Addresses that are never right.
const BAD: [u64; 9] = [
    0,
    0x10,
    0x1000,
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
/// Insanities raised, one bit each.
static RAISED: AtomicU64 = AtomicU64::new(0);
/// Calls that ended as their rows do not say.
static UNEXPECTED: AtomicU64 = AtomicU64::new(0);

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
        let objects = [
            ("Thread", Thread::alloc()?.handle() as u64),
            ("Task", Task::alloc()?.handle() as u64),
            ("Region", region.handle() as u64),
            ("Mapping", Mapping::alloc()?.handle() as u64),
            ("Port", Port::alloc()?.handle() as u64),
            ("Pset", Pset::alloc()?.handle() as u64),
            ("Mutex", Mutex::alloc()?.handle() as u64),
            ("Cond", Cond::alloc()?.handle() as u64),
            ("Ref", Ref::alloc()?.handle() as u64),
        ];
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
    fn value(&self, name: &str, ty: &str) -> u64 {
        if name == "cur_thread" {
            return self.this;
        }
        if name.starts_with("new_") && name != "new_ref" {
            return empty();
        }
        match (self.object(ty), ty) {
            (Some(object), _) => object,
            (None, "u64") => 1,
            (None, _) => self.scratch,
        }
    }

    /// Wrong values for a parameter.
    fn wild(&self, row: &Row, name: &str, ty: &str) -> Vec<u64> {
        // What would sleep: `sleepers` does that.
        if row.name == "thread_sleep" {
            return alloc::vec![0, 1, 0x1000];
        }
        if ty == "u64" {
            return NUMBERS.into();
        }
        let mut values = Vec::from(BAD);
        values.extend([self.text, self.scratch + 8]);
        let Some(right) = self.object(ty) else {
            return values;
        };
        if !(name.starts_with("new_") && name != "new_ref") {
            values.push(empty());
        }
        values.push(right + 8);
        values.extend(
            self.objects
                .iter()
                .map(|&(_, address)| address)
                .filter(|&a| a != right),
        );
        values
    }
}

/// Memory that could hold an object.
fn empty() -> u64 {
    // Never freed: the call may make an object there.
    alloc::boxed::Box::leak(alloc::boxed::Box::new(object::Mutex::new())).handle() as u64
}

fn note(entry: u16, parameter: u64, value: u64) {
    CALLS.fetch_add(1, Relaxed);
    for (slot, value) in NOW.iter().zip([u64::from(entry), parameter, value]) {
        slot.store(value, Relaxed);
    }
}

/// Checks the result of a call against the table.
fn check(row: &Row, result: u64) {
    if row.number == Entry::thread_return_from_exception as u16 {
        // It goes to where the last exception was raised, with the result of then.
        return;
    }
    let expected = match handler::raised(result) {
        Some((code, insanity)) if code == Exception::Insanity as u64 => {
            RAISED.fetch_or(1 << insanity, Relaxed);
            Insanity::from_number(insanity).is_some_and(|insanity| row.may_raise(insanity))
        }
        // A page fault without a keeper, mostly.
        Some(_) => true,
        None if row.returns_value() => true,
        None => Status::from_number(result & 0xffff).is_some_and(|status| row.may_return(status)),
    };
    if !expected {
        println!(
            "wild: {} ended with {result:#x}, which its row does not have",
            row.name
        );
        UNEXPECTED.fetch_add(1, Relaxed);
    }
}

fn registers_row(good: &Good, row: &Row) {
    let mut right = [0; 8];
    for (slot, (name, ty)) in right.iter_mut().zip(row.parameters) {
        *slot = good.value(name, ty);
    }
    if row.parameters.is_empty() {
        note(row.number, 0, 0);
        // SAFETY: none of these calls has an effect on the caller alone.
        check(row, unsafe { sys::trap(u64::from(row.number), right) });
    }
    for (i, (name, ty)) in row.parameters.iter().enumerate() {
        for value in good.wild(row, name, ty) {
            let mut parameters = right;
            for (slot, (name, ty)) in parameters.iter_mut().zip(row.parameters) {
                if name.starts_with("new_") {
                    *slot = good.value(name, ty);
                }
            }
            parameters[i] = value;
            note(row.number, i as u64, value);
            // SAFETY: whatever the kernel writes goes to scratch memory, or it is at fault.
            check(row, unsafe { sys::trap(u64::from(row.number), parameters) });
            // Null is the caller too, whose handlers and flag this row may have changed.
            if row.parameters[0].0 == "cur_thread" && (i > 0 || value == 0) {
                handler::install();
            }
        }
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
fn message_row(good: &Good, row: &Row) {
    let named = row.parameters.len() == 2;
    let first = row.parameters[0];
    let buffer = [good.scratch, 4];
    if named {
        for value in good.wild(row, first.0, first.1) {
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
    if pointee(first.1) == Some("Pset") {
        return;
    }
    let mut values = Vec::from(BAD);
    values.extend([good.text, good.scratch + 4, good.objects[0].1]);
    for value in values {
        let base = Message {
            dest: if named {
                good.served.handle() as u64
            } else {
                0
            },
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
}

fn test() -> Result<(), Status> {
    let good = Good::new()?;
    handler::install();
    for row in TABLE.iter().filter(|row| row.built) {
        match row.convention {
            Convention::Registers => registers_row(&good, row),
            Convention::Message => message_row(&good, row),
        }
    }
    UNEXPECTED.fetch_add(misuse::run()? as u64, Relaxed);
    // Numbers that no entry point has.
    for number in [0, 114, 119, 126, 0xffff] {
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

/// Says which insanities the table has that no call has raised; how many.
fn unseen() -> usize {
    let raised = RAISED.load(Relaxed);
    let unseen = Insanity::ALL.iter().filter(|&&insanity| {
        let possible = TABLE.iter().any(|row| row.built && row.may_raise(insanity));
        possible && raised & 1 << insanity as u64 == 0
    });
    unseen
        .inspect(|insanity| println!("wild: nothing has raised {}", insanity.name()))
        .count()
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
    let unseen = unseen();
    let slept = sleepers::run();
    match (FINISHED.load(Relaxed), UNEXPECTED.load(Relaxed), slept) {
        (1, 0, Ok(())) if unseen == 0 => 0,
        _ => crate::FAILED,
    }
}
