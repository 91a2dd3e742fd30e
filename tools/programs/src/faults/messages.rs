//! Faults on everything that a message transfer uses, in every entry point and in whichever thread does
//! the work: the message must arrive whole, and once.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::Status;
use fluke_abi::entry::{Convention, Entry, Row, TABLE};
use fluke_abi::ipc::{Buffer, CallWord};
use fluke_abi::layout::{GATE, PAGE_SIZE};
use fluke_abi::state::{Prot, ThreadFlags};
use libfluke::object::{Cond, Mutex, Port, Pset, Ref, Target};
use libfluke::{startup, sys};

use super::Checks;
use super::pages::{Fault, Pages};
use crate::caller::{Call, Caller, End, eventually, plain};
use crate::resume;

/// Words of a message: half of the first buffer in each of its pages, then the second buffer.
const FIRST: u64 = 16;
const SECOND: u64 = 8;
const WORDS: usize = (FIRST + SECOND) as usize;
/// References in a message.
const REFS: usize = 2;
/// A server that answers again and again: a fault of the client loses the reply.
const ANSWERS: [Entry; 1 + EACH + 2] = {
    let mut calls = [Entry::ipc_reply_wait_receive; 1 + EACH + 2];
    calls[0] = Entry::ipc_setup_wait_receive;
    calls
};

/// The page of the object that the first parameter names.
const DEST: usize = 0;
/// Where in that page.
const DEST_AT: u64 = 128;
/// The first page of what is sent, and of what is received: of the first buffer, the table of buffers, the
/// second buffer, the table of references, and the references.
const SEND: usize = 1;
const RECEIVE: usize = 7;
const EACH: usize = 6;
/// Where in their pages these are: the first buffer at the end of its first page.
const STARTS: [u64; EACH] = [PAGE_SIZE - FIRST * 4, 0, 64, 128, 256, 512];

/// What a thread has to send, or has received.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Message {
    words: [u64; WORDS],
    hashes: [u64; REFS],
}

/// A message's memory that is always there.
pub struct Plain {
    words: [AtomicU64; WORDS],
    refs: [Ref; REFS],
    table: [u64; REFS],
}

impl Plain {
    /// Zeros, and null references.
    pub fn new() -> Result<&'static mut Self, Status> {
        let plain = Box::leak(Box::new(Self {
            words: [const { AtomicU64::new(0) }; WORDS],
            refs: Default::default(),
            table: [0; REFS],
        }));
        for (reference, entry) in plain.refs.iter().zip(&mut plain.table) {
            reference.create()?;
            *entry = reference.handle() as u64;
        }
        Ok(plain)
    }
}

fn has(row: &Row, words: &[&str]) -> bool {
    row.name.split('_').any(|word| words.contains(&word))
}

fn sends(row: &Row) -> bool {
    has(row, &["call", "send", "reply"])
}

fn receives(row: &Row) -> bool {
    has(row, &["call", "receive"])
}

/// What a caller does before a call of an entry point, and what its partner does for it.
pub fn scene(entry: Entry) -> (&'static [Entry], &'static [Entry]) {
    use Entry::*;
    match entry {
        ipc_call => (&[], &ANSWERS),
        ipc_send | ipc_client_connect_send => (&[], &[ipc_setup_wait_receive]),
        ipc_client_connect_send_over_receive => {
            (&[], &[ipc_setup_wait_receive, ipc_server_ack_send])
        }
        ipc_client_send => (&[], &[ipc_server_receive]),
        ipc_server_send => (&[], &[ipc_client_receive]),
        ipc_client_send_over_receive => (&[], &[ipc_server_receive, ipc_server_ack_send]),
        ipc_server_send_over_receive => (&[], &[ipc_client_receive, ipc_client_ack_send]),
        ipc_client_over_receive => (&[], &[ipc_server_ack_send]),
        ipc_server_over_receive => (&[], &[ipc_client_ack_send]),
        ipc_client_receive => (&[], &[ipc_server_send]),
        ipc_server_receive => (&[], &[ipc_client_send]),
        ipc_client_ack_send => (&[], &[ipc_server_over_receive]),
        ipc_server_ack_send => (&[], &[ipc_client_over_receive]),
        ipc_client_ack_send_over_receive => (&[], &[ipc_server_over_receive, ipc_server_ack_send]),
        ipc_server_ack_send_over_receive => (&[], &[ipc_client_over_receive, ipc_client_ack_send]),
        ipc_server_send_wait_receive => (&[], &[ipc_client_receive, ipc_client_connect_send]),
        ipc_server_ack_send_wait_receive => {
            (&[], &[ipc_client_over_receive, ipc_client_connect_send])
        }
        ipc_setup_wait_receive => (&[], &[ipc_client_connect_send]),
        ipc_wait_receive => (
            &[ipc_setup_wait_receive],
            &[ipc_send, ipc_client_connect_send],
        ),
        ipc_reply => (&[ipc_setup_wait_receive], &[ipc_call]),
        ipc_reply_wait_receive => (
            &[ipc_setup_wait_receive],
            &[ipc_call, ipc_client_connect_send],
        ),
        _ => panic!("no message transfer"),
    }
}

/// In a connection that a caller of this entry point must have: whether it is the client, and whether it
/// is the sender.
fn connection(row: &Row) -> Option<(bool, bool)> {
    let mut words = row.name.split('_').skip(1);
    let client = match words.next() {
        Some("client") => true,
        Some("server") => false,
        _ => return None,
    };
    match words.next() {
        Some("connect") => None,
        first => Some((client, matches!(first, Some("send" | "over")))),
    }
}

struct Bench {
    pages: &'static Pages,
    pset: &'static Pset,
    to_port: &'static Ref,
    /// Objects to send references to, and links to these.
    targets: [&'static Ref; 2 * REFS],
    nothing: &'static Ref,
    /// The partner's, and the caller's for what comes before.
    sent: &'static Plain,
    received: &'static Plain,
    before: &'static Plain,
    /// Where both threads wait until all is prepared.
    gates: [&'static Mutex; 2],
}

impl Bench {
    fn new(pages: &'static Pages) -> Result<Self, Status> {
        let pset = Pset::alloc()?;
        let port = Port::in_set(pset, 0)?;
        let target = || Ref::to(Cond::alloc()?);
        let bench = Self {
            pages,
            pset,
            to_port: Ref::to(port)?,
            targets: [target()?, target()?, target()?, target()?],
            nothing: Ref::alloc()?,
            sent: Plain::new()?,
            received: Plain::new()?,
            before: Plain::new()?,
            gates: [Mutex::alloc()?, Mutex::alloc()?],
        };
        for slot in [SEND, RECEIVE]
            .into_iter()
            .flat_map(|first| bench.slots(first))
        {
            // SAFETY: the page is ours.
            sys::check(unsafe { sys::ref_create(slot as *mut _) })?;
        }
        for gate in bench.gates {
            gate.lock();
        }
        for (n, word) in bench.sent.words.iter().enumerate() {
            word.store(0x2000 + n as u64, Relaxed);
        }
        for (slot, target) in bench.sent.refs.iter().zip(&bench.targets[REFS..]) {
            slot.copy_from(target);
        }
        Ok(bench)
    }

    /// The addresses, always there, of what a message on pages from `first` on consists of.
    fn places(&self, first: usize) -> [u64; EACH] {
        let mut at = 0;
        STARTS.map(|start| {
            at += 1;
            self.pages.alias(first + at - 1) + start
        })
    }

    /// The same where they may have such a fault. The first buffer reaches into the second page.
    fn addresses(&self, first: usize, fault: Fault) -> [u64; EACH] {
        let mut at = 0;
        STARTS.map(|start| {
            at += 1;
            self.pages.address(first + at - 1, fault) + start
        })
    }

    /// The references of a message on pages, where they are always there.
    fn slots(&self, first: usize) -> [u64; REFS] {
        let at = self.places(first)[5];
        [at, at + 64]
    }

    /// Words of a message on pages.
    fn words(&self, first: usize) -> [u64; WORDS] {
        let places = self.places(first);
        let word = |n: usize| match n as u64 {
            n @ 0..FIRST => places[0] + 8 * n,
            n => places[3] + 8 * (n - FIRST),
        };
        core::array::from_fn(word)
    }

    /// Prepares all memory. Everything that is sent differs from everything else.
    fn fill(&self, first: usize, fault: Fault) {
        let addresses = self.addresses(first, fault);
        let places = self.places(first);
        for (n, at) in self.words(first).into_iter().enumerate() {
            // SAFETY: the pages are ours; no thread is using them.
            unsafe { (at as *mut u64).write_volatile(0x1000 + n as u64) };
        }
        let second = Buffer {
            address: addresses[3],
            words: SECOND,
        };
        // SAFETY: as above.
        unsafe {
            (places[2] as *mut Buffer).write_volatile(second);
            for n in 0..REFS as u64 {
                let entry = addresses[5] + 64 * n;
                ((places[4] + 8 * n) as *mut u64).write_volatile(entry);
            }
            for (n, slot) in self.slots(first).into_iter().enumerate() {
                let target = if first == SEND {
                    self.targets[n]
                } else {
                    self.nothing
                };
                sys::ref_copy(target.handle(), slot as *mut _);
            }
        }
    }

    /// What is in the pages from `first` on.
    fn message(&self, first: usize) -> Message {
        // SAFETY: the pages are ours, and the objects.
        unsafe {
            Message {
                words: self
                    .words(first)
                    .map(|at| (at as *const u64).read_volatile()),
                hashes: self.slots(first).map(|slot| sys::ref_hash(slot as *mut _)),
            }
        }
    }
}

fn message_of(plain: &Plain) -> Message {
    Message {
        words: plain.words.each_ref().map(|word| word.load(Relaxed)),
        // SAFETY: objects.
        hashes: plain
            .refs
            .each_ref()
            .map(|reference| unsafe { sys::ref_hash(reference.handle()) }),
    }
}

impl Bench {
    /// The call that everything is about.
    fn call(&self, row: &Row, fault: Fault) -> Call {
        let [send, receive] = [SEND, RECEIVE].map(|first| self.addresses(first, fault));
        let mut word = CallWord(row.number.into());
        let mut registers = [0; 9];
        registers[0] = self.pages.address(DEST, fault) + DEST_AT;
        if sends(row) {
            word = word.with_send_buffers(1).with_send_refs(REFS as u8);
            (registers[1], registers[2]) = (send[0], FIRST);
            (registers[5], registers[6]) = (send[2], send[4]);
        }
        if receives(row) {
            word = word.with_recv_buffers(1).with_recv_refs(REFS as u8);
            (registers[3], registers[4]) = (receive[0], FIRST);
            (registers[7], registers[8]) = (receive[2], receive[4]);
        }
        (word, registers)
    }

    /// The pages that the call uses, and for what.
    fn used(&self, row: &Row) -> impl Iterator<Item = (usize, Prot)> {
        let dest = (row.parameters.len() == 2).then_some((DEST, Prot::READ));
        let send = sends(row)
            .then_some(SEND..SEND + EACH)
            .into_iter()
            .flatten();
        let receive = receives(row)
            .then_some(RECEIVE..RECEIVE + EACH)
            .into_iter()
            .flatten();
        let send = send.map(|page| (page, Prot::READ));
        let receive = receive.map(|page| match page - RECEIVE {
            0 | 1 | 3 => (page, Prot::WRITE),
            _ => (page, Prot::READ),
        });
        dest.into_iter().chain(send).chain(receive)
    }

    /// Makes a call of an entry point, with a fault on all that it uses, in one order of the two threads or
    /// the other.
    fn run(
        &self,
        row: &Row,
        fault: Fault,
        subject_first: bool,
        checks: &mut Checks,
    ) -> Result<(), Status> {
        let entry = Entry::from_number(row.number).expect("a row of the table");
        let (before, other) = scene(entry);
        self.fill(SEND, fault);
        self.fill(RECEIVE, fault);
        for word in &self.received.words {
            word.store(0, Relaxed);
        }
        for slot in &self.received.refs {
            slot.copy_from(self.nothing);
        }
        let named = self.pages.alias(DEST) + DEST_AT;
        // SAFETY: the page is ours.
        unsafe {
            if entry == Entry::ipc_setup_wait_receive {
                sys::pset_move(self.pset.handle(), named as *mut _);
            } else {
                sys::ref_create(named as *mut _);
                sys::ref_copy(self.to_port.handle(), named as *mut _);
            }
        }
        let pset = self.pset.handle() as u64;
        let gate = |n: usize| {
            let gate = self.gates[n].handle() as u64;
            [
                plain(Entry::mutex_lock, &[gate]),
                plain(Entry::mutex_unlock, &[gate]),
            ]
        };
        let plain_calls = |entries: &[Entry], received: &Plain| -> Vec<Call> {
            let call = |entry: &Entry| {
                let to = match entry {
                    Entry::ipc_setup_wait_receive => pset,
                    _ => self.to_port.handle() as u64,
                };
                plain_call(*entry, to, self.sent, received)
            };
            entries.iter().map(call).collect()
        };
        let mut calls = Vec::from(gate(0));
        calls.extend(plain_calls(before, self.before));
        calls.push(self.call(row, fault));
        let subject = Caller::with(resume::install, calls)?;
        let mut calls = Vec::from(gate(1));
        calls.extend(plain_calls(other, self.received));
        let partner = Caller::with(resume::install, calls)?;
        let at_gates = subject.asleep_in(Entry::mutex_lock) && partner.asleep_in(Entry::mutex_lock);
        connect(row, &subject, &partner, self.pset)?;
        let order = if subject_first { [0, 1] } else { [1, 0] };
        let caller = [&subject, &partner][order[0]];
        self.gates[order[0]].unlock();
        // It gets as far as it can without the other. To look at it would repeat its faults.
        let slept = eventually(|| caller.begun() > 2 && caller.registers().rip == GATE);
        let spoilt = || {
            let named = usize::from(subject_first && row.parameters.len() == 2);
            self.used(row).skip(named)
        };
        for (page, _) in spoilt() {
            self.pages.spoil(page, fault);
        }
        self.gates[order[1]].unlock();
        let mut end = [subject.end(), partner.end_now()];
        let what = |what| Complaint {
            row,
            fault,
            subject_first,
            what,
        };
        if other.len() < ANSWERS.len() {
            end[1] = partner.end();
        }
        checks.that(at_gates && slept, format_args!("{}", what("order")));
        checks.that(
            end[0] == end_of(row, row),
            format_args!("{}: {:?}", what("end"), end[0]),
        );
        if other.len() < ANSWERS.len() {
            let last = other[other.len() - 1].row();
            checks.that(
                end[1] == end_of(row, last),
                format_args!("{}: {:?}", what("partner's end"), end[1]),
            );
        }
        let mut mended = true;
        for (page, access) in spoilt() {
            mended &= self.pages.was_mended(page, fault, access, 0..PAGE_SIZE);
        }
        checks.that(mended, format_args!("{}", what("faults")));
        if sends(row) {
            let right = self.message(SEND) == message_of(self.received);
            checks.that(right, format_args!("{}", what("what was sent")));
        }
        if receives(row) {
            let right = self.message(RECEIVE) == message_of(self.sent);
            checks.that(right, format_args!("{}", what("what was received")));
        }
        subject.destroy();
        partner.destroy();
        // Nobody holds the gates any more.
        for gate in self.gates {
            gate.lock();
        }
        // SAFETY: the page is ours.
        unsafe {
            if entry == Entry::ipc_setup_wait_receive {
                sys::pset_move(named as *mut _, self.pset.handle());
            } else {
                sys::ref_destroy(named as *mut _);
            }
        }
        Ok(())
    }
}

/// Makes the two threads, which sleep, a connection, if the first is to make a call that needs one.
pub fn connect(row: &Row, subject: &Caller, partner: &Caller, pset: &Pset) -> Result<(), Status> {
    let Some((client, sender)) = connection(row) else {
        return Ok(());
    };
    let link = Ref::new();
    for (caller, other, client, sender) in [
        (subject, partner, client, sender),
        (partner, subject, !client, !sender),
    ] {
        let mut state = caller.thread().state(None);
        state.flags &= !ThreadFlags::STOPPED.bits();
        state.server_pset = pset.handle() as u64;
        if sender {
            state.flags |= match client {
                true => ThreadFlags::CLIENT_SENDER,
                false => ThreadFlags::SERVER_SENDER,
            }
            .bits();
        }
        link.create()?;
        other.thread().point(&link);
        let (as_server, as_client) = match client {
            true => (None, Some(&link)),
            false => (Some(&link), None),
        };
        // SAFETY: the state is the thread's own.
        unsafe {
            caller
                .thread()
                .set_state(Some(&state), None, as_server, as_client);
        };
        link.destroy();
    }
    Ok(())
}

/// How the last call of a subject or its partner ends in the [`scene`] of an entry point. Reliable messages
/// leave their receivers full.
pub fn end_of(subject: &Row, row: &Row) -> End {
    let reliable = has(subject, &["connect", "client", "server", "wait"]);
    match reliable && receives(row) && !has(row, &["call"]) {
        true => End::Status(Status::RecvMoreData),
        false => End::Status(Status::Success),
    }
}

/// A check that failed, for people.
struct Complaint<'a> {
    row: &'a Row,
    fault: Fault,
    subject_first: bool,
    what: &'static str,
}

impl core::fmt::Display for Complaint<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self {
            row,
            fault,
            subject_first,
            what,
        } = self;
        let order = if *subject_first { "first" } else { "second" };
        write!(f, "{}, called {order}, {fault:?} faults: {what}", row.name)
    }
}

/// Makes every call with such faults on all that it uses. Which thread comes first, and so which of them
/// does the work, takes turns; and is the other way round on another number of CPUs.
pub fn test(pages: &'static Pages, fault: Fault, checks: &mut Checks) -> Result<(), Status> {
    let bench = Bench::new(pages)?;
    let transfers = TABLE
        .iter()
        .filter(|row| row.convention == Convention::Message);
    for (n, row) in transfers.enumerate() {
        let turn = n + startup::cpus() / 2 + usize::from(fault == Fault::Hard);
        bench.run(row, fault, turn.is_multiple_of(2), checks)?;
    }
    Ok(())
}

/// A call with plain memory; `to` is what it names.
pub fn plain_call(entry: Entry, to: u64, sent: &Plain, received: &Plain) -> Call {
    let row = entry.row();
    let [mut send, mut receive] = [sent, received].map(|plain| {
        (
            plain.words.as_ptr() as u64,
            WORDS as u64,
            plain.table.as_ptr() as u64,
            REFS as u8,
        )
    });
    if !sends(row) {
        send = (0, 0, 0, 0);
    }
    if !receives(row) {
        receive = (0, 0, 0, 0);
    }
    let word = CallWord(entry as u64)
        .with_send_refs(send.3)
        .with_recv_refs(receive.3);
    let registers = [
        to, send.0, send.1, receive.0, receive.1, 0, send.2, 0, receive.2,
    ];
    (word, registers)
}
