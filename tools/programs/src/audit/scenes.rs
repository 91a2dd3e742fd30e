//! The scenes: one for each entry point that may sleep, by name, and one for each of the others ([`short`]). In
//! some, messages fault, are long, or lie in tables of buffers and references; and some are for what else a state,
//! or a call, may lose.

use alloc::boxed::Box;
use alloc::vec::Vec;

use fluke_abi::code::{Status, Wakeup};
use fluke_abi::entry::Entry;
use fluke_abi::ipc::CallWord;
use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::state::{MutexState, ObjectSpec, SavedState, ThreadState};
use libfluke::heap;
use libfluke::object::{Cond, Mutex, Port, Pset, Ref, Target as _, Task, Thread};
use libfluke::space::{Export, READ_WRITE};
use libfluke::startup::startup;

use super::short;
use crate::caller::{Call, plain};

/// What a player does when it has made its calls.
#[derive(Clone, Copy, PartialEq)]
pub enum After {
    /// It is done, and its results count.
    Done,
    /// It makes them again, from that one on.
    Again(usize),
}

/// Calls of a player.
pub struct Script {
    /// The calls.
    pub calls: Vec<Call>,
    /// The call that is looked at.
    pub marked: Option<usize>,
    /// What comes then.
    pub after: After,
}

/// What is played.
pub struct Scene {
    /// Who is taken apart.
    pub target: Script,
    /// Who does what the target needs.
    pub partner: Script,
    /// Whether the partner begins.
    pub partner_first: bool,
    /// Mutexes that the target may own.
    pub mutexes: Vec<&'static Mutex>,
    /// Memory that the calls fill: address and bytes.
    pub filled: Vec<(u64, u64)>,
}

/// Names of all scenes.
pub fn names() -> impl Iterator<Item = &'static str> {
    SLEEPING.iter().copied().chain(short::names())
}

/// Of those of calls that may sleep.
const SLEEPING: &[&str] = &[
    "thread_destroy",
    "thread_get_state",
    "thread_interrupt",
    "thread_move",
    "thread_set_state",
    "thread_schedule",
    "thread_sleep",
    "thread_sleep-state",
    "task_destroy",
    "region_search",
    "mapping_destroy",
    "mutex_lock",
    "mutex_lock-interrupt",
    "cond_wait",
    "ipc_call",
    "ipc_client_connect_send",
    "ipc_client_connect_send_over_receive",
    "ipc_client_send",
    "ipc_client_send_over_receive",
    "ipc_client_over_receive",
    "ipc_client_receive",
    "ipc_client_ack_send",
    "ipc_client_ack_send_over_receive",
    "ipc_server_send",
    "ipc_server_send_over_receive",
    "ipc_server_over_receive",
    "ipc_server_receive",
    "ipc_server_ack_send",
    "ipc_server_ack_send_over_receive",
    "ipc_server_ack_send_wait_receive",
    "ipc_server_send_wait_receive",
    "ipc_setup_wait_receive",
    "ipc_wait_receive",
    "ipc_reply",
    "ipc_reply_wait_receive",
    "ipc_send",
    "ipc_client_connect_send_over_receive-fault",
    "ipc_server_ack_send_over_receive-fault",
    "ipc_call-fault",
    "ipc_send-fault",
    "ipc_client_connect_send_over_receive-long",
    "ipc_server_ack_send_over_receive-long",
    "ipc_client_connect_send_over_receive-tables",
    "ipc_server_over_receive-full",
    "ipc_call-served",
    "ipc_call-served-fault",
    "ipc_send-served",
    "ipc_client_connect_send-served",
    "ipc_client_connect_send_over_receive-served",
    "ipc_client_connect_send_over_receive-served-fault",
    "ipc_client_connect_send_over_receive-served-long",
    "mapping_destroy-used",
];

/// Words of a message.
#[derive(Clone, Copy)]
enum Size {
    /// In one page.
    Short,
    /// Across the end of a page, the second of which a keeper has to provide.
    Fault,
    /// Longer than what is copied between two preemption points.
    Long,
}

impl Size {
    const fn words(self) -> u64 {
        match self {
            Self::Short | Self::Fault => 24,
            Self::Long => 1100,
        }
    }
}

/// Instead of a call's word: the player reads the word at the first register's address in user mode until it is not
/// zero.
pub const PEEK: u64 = u64::MAX;

/// What a supervisor provides at once, at least.
const CLUSTER: u64 = 64 << 10;

/// A buffer: address and words.
type Part = (u64, u64);

/// Addresses that nothing else has.
pub const VIEW: u64 = 0x32_0000_0000;

const NOTHING: Part = (0, 0);
/// Words of a small message.
const FEW: u64 = 4;

/// Buffers of both players.
struct Buffers {
    size: Size,
    filled: Vec<(u64, u64)>,
}

impl Buffers {
    fn pages(&self) -> Result<u64, Status> {
        heap::pages(4 * PAGE_SIZE).ok_or(Status::NoMemory)
    }

    /// A message to send; `n` tells messages apart.
    fn message(&mut self, n: u64) -> Result<Part, Status> {
        let (at, words) = (self.pages()?, self.size.words());
        // It is all there: its faults are soft, if its page table is new.
        for word in 0..words {
            // SAFETY: the memory was just allocated.
            unsafe { *((at + word * 8) as *mut u64) = n << 32 | word };
        }
        Ok((at, words))
    }

    /// Room for two messages.
    fn room(&mut self) -> Result<Part, Status> {
        let words = self.size.words() + FEW;
        let at = match self.size {
            Size::Fault => {
                let pages = heap::pages(3 * CLUSTER).ok_or(Status::NoMemory)?;
                (pages + CLUSTER).next_multiple_of(CLUSTER) - words / 2 / 8 * 64
            }
            _ => self.pages()?,
        };
        // The first page is there.
        // SAFETY: the memory was just allocated.
        unsafe { *(at as *mut u64) = 0 };
        self.filled.push((at, words * 8));
        Ok((at, words))
    }
}

/// A script that ends.
pub fn script(calls: impl Into<Vec<Call>>, marked: usize) -> Script {
    Script {
        calls: calls.into(),
        marked: Some(marked),
        after: After::Done,
    }
}

/// Of the partner.
pub fn partner<const N: usize>(calls: [Call; N]) -> Script {
    Script {
        calls: calls.into(),
        marked: None,
        after: After::Done,
    }
}

impl Script {
    /// That goes on for ever.
    fn again(self, from: usize) -> Self {
        Self {
            after: After::Again(from),
            ..self
        }
    }
}

/// In which the target begins.
pub fn scene(target: Script, partner: Script) -> Scene {
    Scene {
        target,
        partner,
        partner_first: false,
        mutexes: Vec::new(),
        filled: Vec::new(),
    }
}

/// A port set, and a link to a port in it.
fn service() -> Result<(u64, u64), Status> {
    let pset = Pset::alloc()?;
    let port = Ref::to(Port::in_set(pset, 0)?)?;
    Ok((pset.handle() as u64, port.handle() as u64))
}

/// A message transfer.
fn transfer(entry: Entry, dest: u64, send: Part, receive: Part) -> Call {
    plain(entry, &[dest, send.0, send.1, receive.0, receive.1])
}

/// Two players and a connection, or an idempotent call.
fn messages(entry: Entry, size: Size) -> Result<Option<Scene>, Status> {
    use Entry::*;
    let (pset, port) = service()?;
    let mut buffers = Buffers {
        size,
        filled: Vec::new(),
    };
    let (sent, other) = (buffers.message(1)?, buffers.message(2)?);
    let (first, second) = (buffers.room()?, buffers.room()?);
    let (theirs, theirs_too) = (buffers.room()?, buffers.room()?);
    let few = (sent.0, FEW);
    let little = (first.0, FEW);
    let done = |entry| transfer(entry, 0, NOTHING, NOTHING);
    let to = |entry, send, receive| transfer(entry, port, send, receive);
    let on = |entry, send, receive| transfer(entry, 0, send, receive);
    let serve = |room| transfer(ipc_setup_wait_receive, pset, NOTHING, room);
    let rpc = |send, receive| to(ipc_client_connect_send_over_receive, send, receive);
    let (leave, drop) = (done(ipc_client_disconnect), done(ipc_server_disconnect));
    // A server that answers once, and one that then listens again.
    let answer = || partner([serve(theirs), on(ipc_server_ack_send, other, NOTHING), drop]);
    let talk = || {
        partner([
            serve(theirs),
            on(ipc_server_ack_send_over_receive, other, theirs_too),
        ])
    };
    // Clients.
    let ask = || partner([rpc(other, theirs), leave]);
    let ask_twice = || partner([rpc(other, theirs), rpc(few, theirs_too), leave]);
    let ask_and_tell = || {
        partner([
            rpc(other, theirs),
            on(ipc_client_ack_send, few, NOTHING),
            leave,
        ])
    };
    let connect = to(ipc_client_connect_send, few, NOTHING);
    let over = on(ipc_client_over_receive, NOTHING, first);
    let ack = on(ipc_server_ack_send, few, NOTHING);
    let scene = match entry {
        ipc_client_connect_send => {
            let connect = to(entry, sent, NOTHING);
            scene(script([connect, over, leave], 0), answer())
        }
        ipc_client_connect_send_over_receive => {
            scene(script([rpc(sent, first), leave], 0), answer())
        }
        ipc_client_send => {
            let send = on(entry, sent, NOTHING);
            scene(script([connect, send, over, leave], 1), answer())
        }
        ipc_client_send_over_receive => {
            let send = on(entry, sent, first);
            scene(script([connect, send, leave], 1), answer())
        }
        ipc_client_over_receive => scene(script([connect, over, leave], 1), answer()),
        ipc_client_receive => {
            let receive = on(entry, NOTHING, second);
            scene(script([rpc(sent, little), receive, leave], 1), answer())
        }
        ipc_client_ack_send => {
            let send = on(entry, sent, NOTHING);
            scene(script([rpc(few, first), send, leave], 1), talk())
        }
        ipc_client_ack_send_over_receive => {
            let send = on(entry, sent, second);
            let server = partner([
                serve(theirs),
                on(ipc_server_ack_send_over_receive, other, theirs_too),
                on(ipc_server_ack_send, few, NOTHING),
                drop,
            ]);
            scene(script([rpc(few, first), send, leave], 1), server)
        }
        ipc_setup_wait_receive => {
            let send = on(ipc_server_ack_send, sent, NOTHING);
            scene(script([serve(first), send, drop], 0), ask())
        }
        ipc_wait_receive => {
            let wait = on(entry, NOTHING, second);
            let client = partner([to(ipc_send, few, NOTHING), rpc(other, theirs), leave]);
            scene(script([serve(first), wait, ack, drop], 1), client)
        }
        ipc_server_ack_send => {
            let send = on(entry, sent, NOTHING);
            scene(script([serve(first), send, drop], 1), ask())
        }
        ipc_server_send => {
            let send = on(entry, sent, NOTHING);
            scene(script([serve(first), ack, send, drop], 2), ask())
        }
        ipc_server_over_receive => {
            let over = on(entry, NOTHING, second);
            scene(script([serve(first), ack, over], 2), ask_and_tell())
        }
        ipc_server_ack_send_over_receive => {
            let send = on(entry, sent, second);
            scene(script([serve(first), send], 1), ask_and_tell())
        }
        ipc_server_send_over_receive => {
            let send = on(entry, sent, second);
            scene(script([serve(first), ack, send], 2), ask_and_tell())
        }
        ipc_server_receive => {
            let receive = on(entry, NOTHING, second);
            scene(script([serve(little), receive, ack, drop], 1), ask())
        }
        ipc_server_ack_send_wait_receive => {
            let wait = on(entry, sent, second);
            scene(script([serve(first), wait, ack, drop], 1), ask_twice())
        }
        ipc_server_send_wait_receive => {
            let wait = on(entry, sent, second);
            scene(script([serve(first), ack, wait, ack, drop], 2), ask_twice())
        }
        ipc_call => {
            let server = partner([serve(theirs), on(ipc_reply_wait_receive, other, theirs)]);
            scene(script([to(entry, sent, first)], 0), server.again(1))
        }
        ipc_reply => {
            let reply = on(entry, sent, NOTHING);
            let client = partner([to(ipc_call, other, theirs)]);
            scene(script([serve(first), reply], 1).again(0), client)
        }
        ipc_reply_wait_receive => {
            // One room for both requests: the first may be delivered again, when the server that took it is gone.
            let reply = on(entry, sent, first);
            let client = partner([to(ipc_call, other, theirs), to(ipc_call, few, theirs_too)]);
            scene(script([serve(first), reply], 1).again(1), client)
        }
        ipc_send => scene(
            script([to(entry, sent, NOTHING)], 0),
            partner([serve(theirs)]),
        ),
        ipc_client_disconnect => scene(script([rpc(sent, first), leave], 1), answer()),
        ipc_server_disconnect => {
            let send = on(ipc_server_ack_send, sent, NOTHING);
            scene(script([serve(first), send, drop], 2), ask())
        }
        ipc_client_alert => {
            let more = on(ipc_server_receive, NOTHING, theirs_too);
            let server = partner([serve(theirs), more, drop]);
            scene(script([connect, done(entry), leave], 1), server)
        }
        ipc_server_alert => scene(script([serve(first), done(entry), drop], 1), ask()),
        _ => return Ok(None),
    };
    Ok(Some(Scene {
        filled: buffers.filled,
        ..scene
    }))
}

/// Memory for an object or a state, zero.
fn blank<T: Default>() -> u64 {
    Box::leak(Box::new(T::default())) as *mut T as u64
}

/// A message in three buffers, two of them in a table, with a table of two references.
struct Parts {
    first: Part,
    table: u64,
    refs: &'static [&'static Ref; 2],
    ref_table: u64,
}

impl Parts {
    /// Of memory that has room for a [`Size::Short`] message; the buffers in the table are the other way round.
    fn new((at, _): Part, first: u64) -> Result<Self, Status> {
        let rest = Size::Short.words() - first;
        let table = [
            [at + (first + rest / 2) * 8, rest - rest / 2],
            [at + first * 8, rest / 2],
        ];
        let refs: &[_; 2] = Box::leak(Box::new([Ref::alloc()?, Ref::alloc()?]));
        let ref_table = refs.map(|reference| reference.handle() as u64);
        Ok(Self {
            first: (at, first),
            table: Box::leak(Box::new(table)).as_ptr() as u64,
            refs,
            ref_table: Box::leak(Box::new(ref_table)).as_ptr() as u64,
        })
    }

    /// A call with messages like this.
    fn call(entry: Entry, dest: u64, send: Option<&Self>, receive: Option<&Self>) -> Call {
        let part = |parts: Option<&Self>| parts.map_or(NOTHING, |parts| parts.first);
        let (mut word, mut registers) = transfer(entry, dest, part(send), part(receive));
        if let Some(Self {
            table, ref_table, ..
        }) = send
        {
            word = word.with_send_buffers(2).with_send_refs(2);
            (registers[5], registers[6]) = (*table, *ref_table);
        }
        if let Some(Self {
            table, ref_table, ..
        }) = receive
        {
            word = word.with_recv_buffers(2).with_recv_refs(2);
            (registers[7], registers[8]) = (*table, *ref_table);
        }
        (word, registers)
    }

    /// Calls that say whether references have become those of a message.
    fn compare(&self, sent: &Self) -> [Call; 2] {
        [0, 1].map(|n| {
            let pair = [&self.refs[n], &sent.refs[n]].map(|each| each.handle() as u64);
            plain(Entry::ref_compare, &pair)
        })
    }
}

/// The answer fills the client's buffer, so that it waits for the connection before the server turns it over.
fn full() -> Result<Scene, Status> {
    use Entry::*;
    let (pset, port) = service()?;
    let mut buffers = Buffers {
        size: Size::Short,
        filled: Vec::new(),
    };
    let (sent, few) = (buffers.message(1)?, (buffers.message(2)?.0, FEW));
    let (first, second, theirs) = (buffers.room()?, buffers.room()?, buffers.room()?);
    let target = [
        transfer(ipc_setup_wait_receive, pset, NOTHING, first),
        transfer(ipc_server_ack_send, 0, few, NOTHING),
        transfer(ipc_server_over_receive, 0, NOTHING, second),
    ];
    let ask = ipc_client_connect_send_over_receive;
    let client = [
        transfer(ask, port, sent, (theirs.0, FEW)),
        transfer(ipc_client_ack_send, 0, few, NOTHING),
        transfer(ipc_client_disconnect, 0, NOTHING, NOTHING),
    ];
    Ok(Scene {
        partner_first: true,
        filled: buffers.filled,
        ..scene(script(target, 2), partner(client))
    })
}

/// A request and its answer, in tables.
fn tables() -> Result<Scene, Status> {
    let (pset, port) = service()?;
    let mut buffers = Buffers {
        size: Size::Short,
        filled: Vec::new(),
    };
    let [question, answer] = [
        Parts::new(buffers.message(1)?, 9)?,
        Parts::new(buffers.message(2)?, 7)?,
    ];
    for sent in question.refs.iter().chain(answer.refs) {
        Mutex::alloc()?.point(sent);
    }
    let [asked, answered] = [
        Parts::new(buffers.room()?, 5)?,
        Parts::new(buffers.room()?, 11)?,
    ];
    let ask = Parts::call(
        Entry::ipc_client_connect_send_over_receive,
        port,
        Some(&question),
        Some(&answered),
    );
    let serve = Parts::call(Entry::ipc_setup_wait_receive, pset, None, Some(&asked));
    let reply = Parts::call(Entry::ipc_server_ack_send, 0, Some(&answer), None);
    let [first, second] = answered.compare(&answer);
    let target = script([ask, first, second], 0);
    let [first, second] = asked.compare(&question);
    Ok(Scene {
        filled: buffers.filled,
        ..scene(target, partner([serve, reply, first, second]))
    })
}

/// A mutex that a thread owns.
pub fn owned_mutex(owner: &'static Thread) -> Result<&'static Mutex, Status> {
    let mutex = Mutex::alloc()?;
    let locked = MutexState {
        locked: 1,
        ..MutexState::default()
    };
    let owner = Ref::to(owner)?;
    // SAFETY: objects, and a state to be read.
    unsafe { libfluke::sys::mutex_set_state(mutex.handle(), &raw const locked, owner.handle()) };
    Ok(mutex)
}

fn mutex_lock(other: &'static Thread) -> Result<Scene, Status> {
    let mutex = owned_mutex(other)?;
    let at = mutex.handle() as u64;
    let [lock, unlock] = [Entry::mutex_lock, Entry::mutex_unlock].map(|entry| plain(entry, &[at]));
    Ok(Scene {
        mutexes: Vec::from([mutex]),
        ..scene(script([lock, unlock], 0), partner([unlock]))
    })
}

/// An interrupt is held back while the target gets a mutex, and taken afterwards.
fn interrupt(target: &'static Thread, other: &'static Thread) -> Result<Scene, Status> {
    use Entry::*;
    let mutex = owned_mutex(other)?;
    let (at, saved) = (mutex.handle() as u64, blank::<SavedState>());
    let calls = [
        plain(thread_disable_exceptions, &[0]),
        plain(mutex_lock, &[at]),
        plain(thread_enable_exceptions, &[0]),
        plain(thread_get_saved_state, &[0, saved]),
    ];
    let interrupt = plain(thread_interrupt, &[target.handle() as u64]);
    Ok(Scene {
        mutexes: Vec::from([mutex]),
        filled: Vec::from([(saved, size_of::<SavedState>() as u64)]),
        ..scene(
            script(calls, 1),
            partner([interrupt, plain(mutex_unlock, &[at])]),
        )
    })
}

/// The target sleeps, with an interrupt held back, until the partner looks at its state.
fn state(target: &'static Thread, other: &'static Thread) -> Result<Scene, Status> {
    use Entry::*;
    let mutex = owned_mutex(other)?;
    let (at, state) = (mutex.handle() as u64, blank::<ThreadState>());
    let target = target.handle() as u64;
    let calls = [
        plain(thread_disable_exceptions, &[0]),
        plain(mutex_lock, &[at]),
        plain(thread_sleep, &[u64::MAX]),
    ];
    let look = [
        plain(thread_interrupt, &[target]),
        plain(mutex_unlock, &[at]),
        plain(thread_get_state, &[target, state]),
    ];
    Ok(Scene {
        mutexes: Vec::from([mutex]),
        filled: Vec::from([(state, size_of::<ThreadState>() as u64)]),
        ..scene(script(calls, 2).again(2), partner(look))
    })
}

/// Memory is used through a mapping until there is none: by calls; or, if `used`, by the partner's user code, on
/// whichever CPU that is, while the mapping goes away. What is then written to the memory it cannot see.
fn unmap(used: bool) -> Result<Scene, Status> {
    use Entry::*;
    let memory = heap::pages(PAGE_SIZE).ok_or(Status::NoMemory)?;
    // SAFETY: the memory was just allocated.
    unsafe { *(memory as *mut u64) = 0 };
    let export = Export::alloc(memory, PAGE_SIZE, READ_WRITE, None)?;
    let mapping = export.map(memory, PAGE_SIZE, READ_WRITE, &startup().space, VIEW)?;
    let unmap = plain(mapping_destroy, &[mapping.handle() as u64]);
    if used {
        let write = plain(thread_get_handlers, &[0, memory]);
        let read = (CallWord(PEEK), [VIEW, 0, 0, 0, 0, 0, 0, 0, 0]);
        return Ok(scene(script([unmap, write], 0), partner([read])));
    }
    let write = plain(thread_get_saved_state, &[0, VIEW]);
    Ok(scene(script([write, unmap, write], 1), partner([])))
}

/// Somebody waits whom the call wakes: until then the mutex is not to be had, on however many CPUs they run.
fn wake(entry: Entry, other: &'static Thread) -> Result<Scene, Status> {
    let (mutex, cond) = (owned_mutex(other)?, Cond::alloc()?);
    let (at, on) = (mutex.handle() as u64, cond.handle() as u64);
    let lock = plain(Entry::mutex_lock, &[at]);
    let wait = plain(Entry::cond_wait, &[on, at]);
    let unlock = plain(Entry::mutex_unlock, &[at]);
    let target = script([lock, plain(entry, &[on]), unlock], 1);
    Ok(Scene {
        partner_first: true,
        mutexes: Vec::from([mutex]),
        ..scene(target, partner([wait, unlock]))
    })
}

fn cond_wait(target: &'static Thread) -> Result<Scene, Status> {
    // Whoever has the mutex at first comes first.
    let (mutex, cond) = (owned_mutex(target)?, Cond::alloc()?);
    let (at, on) = (mutex.handle() as u64, cond.handle() as u64);
    let lock = plain(Entry::mutex_lock, &[at]);
    let unlock = plain(Entry::mutex_unlock, &[at]);
    let wait = plain(Entry::cond_wait, &[on, at]);
    let signal = plain(Entry::cond_signal, &[on]);
    Ok(Scene {
        mutexes: Vec::from([mutex]),
        ..scene(script([wait, unlock], 0), partner([lock, signal, unlock]))
    })
}

/// In two steps: it is more than the kernel looks at before others get their turn.
fn search() -> Result<Scene, Status> {
    const BYTES: u64 = 20 * PAGE_SIZE;
    const ROOM: u64 = 8;
    let memory = heap::pages(BYTES).ok_or(Status::NoMemory)?;
    let export = Export::alloc(memory, BYTES, READ_WRITE, None)?;
    for at in [64, PAGE_SIZE, PAGE_SIZE + 256, 18 * PAGE_SIZE] {
        // SAFETY: memory for an object.
        unsafe { libfluke::sys::mutex_create((memory + at) as *mut _) };
    }
    let (offset, found) = (
        blank::<u64>(),
        heap::pages(PAGE_SIZE).ok_or(Status::NoMemory)?,
    );
    let found_size = Box::leak(Box::new(ROOM)) as *mut u64 as u64;
    let region = export.region().handle() as u64;
    let next = plain(
        Entry::region_search,
        &[region, offset, BYTES, found, found_size],
    );
    let filled = Vec::from([
        (offset, 8),
        (found, ROOM * size_of::<ObjectSpec>() as u64),
        (found_size, 8),
    ]);
    Ok(Scene {
        filled,
        ..scene(script([next, next], 0), partner([]))
    })
}

/// Scenes of threads: what is done to the partner, or to a third.
fn threads(
    entry: Entry,
    target: &'static Thread,
    other: &'static Thread,
) -> Result<Option<Scene>, Status> {
    use Entry::*;
    let third = Thread::alloc()?.handle() as u64;
    let port = Port::alloc()?.handle() as u64;
    let (at, target) = (other.handle() as u64, target.handle() as u64);
    let state = blank::<ThreadState>();
    let sleep = plain(thread_sleep, &[u64::MAX]);
    let call = |parameters: &[u64]| script([plain(entry, parameters)], 0);
    let idle = || partner([sleep]).again(0);
    let made = match entry {
        thread_destroy => scene(call(&[third]), idle()),
        thread_get_state => Scene {
            partner_first: true,
            filled: Vec::from([(state, size_of::<ThreadState>() as u64)]),
            ..scene(call(&[at, state]), idle())
        },
        thread_move => {
            let new = blank::<Thread>();
            let reference = Ref::alloc()?.handle() as u64;
            let target = script(
                [
                    plain(entry, &[third, new]),
                    plain(thread_reference, &[new, reference]),
                ],
                0,
            );
            scene(target, idle())
        }
        thread_set_state => {
            let get = plain(thread_get_state, &[third, state]);
            scene(script([get, plain(entry, &[third, state]), get], 1), idle())
        }
        thread_interrupt => Scene {
            partner_first: true,
            ..scene(call(&[at]), partner([sleep]))
        },
        thread_schedule => {
            let scheduler = Ref::to(Port::alloc()?)?;
            other.set_scheduler(scheduler, 0);
            scene(call(&[at, port, Wakeup::OnBlock as u64]), idle())
        }
        // It never comes to its end: somebody interrupts it.
        thread_sleep => scene(
            call(&[u64::MAX]),
            partner([plain(thread_interrupt, &[target])]),
        ),
        task_destroy => scene(call(&[Task::alloc()?.handle() as u64]), idle()),
        _ => return Ok(None),
    };
    Ok(Some(made))
}

/// Makes what a scene of that name needs, played by those threads. `None`: there is none.
pub fn find(
    name: &str,
    target: &'static Thread,
    other: &'static Thread,
) -> Result<Option<Scene>, Status> {
    let (entry, variant) = name.split_once('-').unwrap_or((name, ""));
    // Then a server waits already.
    let served = variant.starts_with("served");
    let size = match variant.strip_prefix("served-").unwrap_or(variant) {
        "fault" => Size::Fault,
        "long" => Size::Long,
        _ => Size::Short,
    };
    if !names().any(|known| known == name) {
        return Ok(None);
    }
    let rows = &mut fluke_abi::entry::TABLE.iter();
    let Some(entry) = rows
        .find(|row| row.name == entry)
        .and_then(|row| Entry::from_number(row.number))
    else {
        return Ok(None);
    };
    match (entry, variant) {
        (Entry::mutex_lock, "interrupt") => interrupt(target, other).map(Some),
        (Entry::thread_sleep, "state") => state(target, other).map(Some),
        (Entry::mutex_lock, _) => mutex_lock(other).map(Some),
        (Entry::cond_wait, _) => cond_wait(target).map(Some),
        (Entry::cond_signal | Entry::cond_broadcast, _) => wake(entry, other).map(Some),
        (Entry::region_search, _) => search().map(Some),
        (Entry::mapping_destroy, variant) => unmap(variant == "used").map(Some),
        (_, "tables") => tables().map(Some),
        (_, "full") => full().map(Some),
        _ => match messages(entry, size)? {
            Some(scene) => Ok(Some(Scene {
                partner_first: served,
                ..scene
            })),
            None => match threads(entry, target, other)? {
                Some(scene) => Ok(Some(scene)),
                None => short::find(entry, target),
            },
        },
    }
}
