//! Threads: user-visible state, what a thread waits for, and how it is stopped.

use fluke_abi::boot::{USER_CS, USER_SS};
use fluke_abi::code::{Exception, Status};
use fluke_abi::entry::Entry;
use fluke_abi::ipc::{CallWord, ExceptionMessage};
use fluke_abi::layout::GATE_DONE;
use fluke_abi::object::Type;
use fluke_abi::probe::Probe;
use fluke_abi::state::{Handlers, PRIORITY_DEFAULT, SavedState, ThreadFlags};

use crate::arch::cpu::Frame;
use crate::arena::{Arena, Id};
use crate::ipc::{Port, Pset};
use crate::kernel::Kernel;
use crate::lock::scheduler;
use crate::mm::Space;
use crate::model;
use crate::mutant::mutant;
use crate::object::{Header, Link, Object};
use crate::probe::probe;
use crate::queue::{Linked, Links, Queue};
use crate::sched::Entity;
use crate::sync::{Cond, Mutex};

/// Role in a reliable connection. A thread can have one connection in each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one that connected.
    Client = 0,
    /// The one that accepted.
    Server = 1,
}

impl Side {
    /// The partner's role.
    pub const fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// One end of a reliable connection.
#[derive(Clone, Copy, Debug)]
pub struct Connection {
    /// The thread at the other end. A dead one was destroyed after its state was exported; the
    /// connection waits for the thread that is made from that state.
    pub partner: Id<Thread>,
    /// Whether this end is the sender.
    pub sender: bool,
}

/// What a thread sleeps on. Its registers say the same to the user: they name the call to restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// A mutex to come free.
    Mutex(Id<Mutex>),
    /// A condition variable to be signalled.
    Cond(Id<Cond>),
    /// A server thread to take the thread's message from a port.
    Port(Id<Port>),
    /// A message on a port set.
    Pset(Id<Pset>),
    /// The reply to an idempotent message that a server thread has taken.
    Reply(Id<Thread>),
    /// The partner to receive.
    Send(Side),
    /// The partner to send.
    Receive(Side),
    /// The partner to acknowledge the reversal.
    Over(Side),
    /// The partner to turn the connection over.
    Ack(Side),
    /// A running thread to leave its CPU, so that its state can be taken.
    Stop(Id<Thread>),
    /// A donation to come to its end: that of this thread's time to `target`, or a message on `port`.
    Schedule {
        /// Who gets the time.
        target: Id<Thread>,
        /// Where the donor waits for messages.
        port: Id<Port>,
    },
    /// Its scheduler to take its request for time from a port. It could run.
    Ask(Id<Port>),
    /// Its scheduler, which knows of it, to donate time. It could run.
    Time(Id<Port>),
    /// Nothing: an exception that nobody handles.
    Forever,
}

/// Whether a thread runs; where, the scheduler knows ([`crate::sched::State`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Not until `set_state` says so.
    Stopped,
    /// When and where the scheduler says, which also has those that sleep by the clock.
    Scheduled,
    /// Asleep.
    Waiting(Wait),
}

/// A thread.
#[repr(C)]
pub struct Thread {
    /// User registers; first, because traps push onto the end of it.
    pub frame: Frame,
    /// Its own name.
    pub id: Id<Self>,
    /// What the scheduler knows of it.
    pub entity: Id<Entity>,
    header: Header,
    links: Links<Thread>,
    /// Whether it runs.
    pub run: Run,
    /// Threads that wait for it to stop.
    pub stoppers: Queue<Thread>,
    /// The thread that last donated time to it.
    pub donor: Option<Id<Thread>>,
    /// Address space.
    pub space: Option<Id<Space>>,
    /// The port that it asks for time; without one, the kernel schedules it by priority.
    pub scheduler: Option<Id<Port>>,
    /// Address of the thread object in its own space.
    pub thread_va: u64,
    /// Identifier given to it by its scheduler.
    pub sched_val: u64,
    /// Port set it serves, by address.
    pub server_pset: u64,
    /// Reliable connections, by [`Side`].
    pub connections: [Option<Connection>; 2],
    /// Client of the idempotent call that it serves.
    pub idempotent_client: Option<Id<Thread>>,
    /// Taken out of this port set's queue to fetch a message, and has not yet looked.
    pub notified: Option<Id<Pset>>,
    /// Exception on its way to a keeper.
    pub exception: Option<ExceptionMessage>,
    /// Handler addresses.
    pub handlers: Handlers,
    /// Registers saved at the last exception.
    pub saved: SavedState,
    /// Asynchronous exceptions held back.
    pub pending: ThreadFlags,
    /// The registers name a call that the kernel has begun to make.
    pub in_call: bool,
    /// Stopped as far as users know. Who stops it for `thread_get_state` says so with that call's end, so that
    /// a call which is made again finds what it found first.
    pub halted: bool,
    /// Somebody waits for the thread to stop.
    pub stop_requested: bool,
    /// 0 to 31; the highest runs.
    pub priority: u8,
    /// Its scheduler has taken its request for time since it last slept.
    pub asked: bool,
    /// The end of the connection was exported, by [`Side`]: destroying the thread leaves it to
    /// the thread that is made from the state.
    pub exported: [bool; 2],
    /// It has had a connection in that role, by [`Side`], since it was made or its end was set: without
    /// one now, it has left.
    pub joined: [bool; 2],
    /// Handlers are enabled.
    pub exceptions_enabled: bool,
}

const _: () = assert!(core::mem::offset_of!(Thread, frame) == 0);

impl Object for Thread {
    const TYPE: Type = Type::Thread;

    fn header(&mut self) -> &mut Header {
        &mut self.header
    }

    fn arena(kernel: &mut Kernel) -> &mut Arena<Self> {
        &mut kernel.threads
    }
}

impl Linked for Thread {
    fn links(&mut self) -> &mut Links<Self> {
        &mut self.links
    }
}

impl Thread {
    /// A stopped thread.
    pub fn new(hash: u64) -> Self {
        Self {
            frame: Frame {
                cs: USER_CS.into(),
                ss: USER_SS.into(),
                rflags: user_flags(0),
                ..Frame::default()
            },
            id: Id::NONE,
            entity: Id::NONE,
            header: Header::new(hash),
            links: Links::new(),
            run: Run::Stopped,
            in_call: false,
            halted: true,
            stop_requested: false,
            stoppers: Queue::new(),
            priority: PRIORITY_DEFAULT as u8,
            donor: None,
            asked: false,
            space: None,
            scheduler: None,
            thread_va: 0,
            sched_val: 0,
            server_pset: 0,
            connections: [None; 2],
            exported: [false; 2],
            joined: [false; 2],
            idempotent_client: None,
            notified: None,
            exception: None,
            handlers: Handlers::default(),
            saved: SavedState::default(),
            exceptions_enabled: false,
            pending: ThreadFlags::empty(),
        }
    }

    /// Fixed at creation.
    pub const fn hash(&self) -> u64 {
        self.header.hash
    }

    /// The call word: which call, and how many table entries are left.
    #[inline]
    pub const fn word(&self) -> CallWord {
        CallWord(self.frame.rax)
    }

    /// The entry point that the thread is about to call, or is in.
    #[inline]
    pub fn entry(&self) -> Option<Entry> {
        Entry::from_number(self.word().number())
    }

    /// Fluke's `set_pc`: what is left of the call is the call of another entry point.
    #[inline]
    pub fn become_entry(&mut self, entry: Entry) {
        probe::<{ Probe::Commit as usize }>(|| (self, 0));
        self.frame.rax = self.word().with_number(entry as u16).0;
    }

    /// The call is done, with a value for the user.
    #[inline]
    pub fn complete(&mut self, value: u64) {
        probe::<{ Probe::Commit as usize }>(|| (self, 0));
        self.frame.rax = value;
        self.frame.rip = GATE_DONE;
        self.in_call = false;
    }

    /// The message transfer is done. The counts of what is left stay in the word.
    #[inline]
    pub fn complete_transfer(&mut self, status: Status) {
        self.complete(self.word().with_number(status as u16).0);
    }

    /// What it waits for.
    pub const fn wait(&self) -> Option<Wait> {
        match self.run {
            Run::Waiting(wait) => Some(wait),
            _ => None,
        }
    }

    /// Its end of the connection in the role `side`.
    #[inline]
    pub const fn connection(&self, side: Side) -> Option<Connection> {
        self.connections[side as usize]
    }

    /// Enters a handler, with the registers that the handler may use saved.
    fn enter_handler(&mut self, handler: u64, code: u64, subcode: u64) {
        let frame = &mut self.frame;
        self.saved = SavedState {
            rax: frame.rax,
            rcx: frame.rcx,
            rdx: frame.rdx,
            rip: frame.rip,
            rflags: user_flags(frame.rflags),
        };
        frame.rax = self.thread_va;
        frame.rdx = code;
        frame.rcx = subcode;
        frame.rip = handler;
        self.exceptions_enabled = false;
        self.in_call = false;
    }
}

/// User-settable flags: arithmetic, DF, TF, AC, ID; IF and the reserved bit are always set.
const RFLAGS_USER: u64 = 0x24_0dd5;
const RFLAGS_FIXED: u64 = 0x202;

/// Flags as a user may have them. Not RF, which the CPU saves for a call's fault but not for an interrupt
/// (SDM vol. 3, 17.3.1.1): what users see of a thread must not tell how it came into the kernel.
pub const fn user_flags(flags: u64) -> u64 {
    flags & RFLAGS_USER | RFLAGS_FIXED
}

/// Highest instruction or stack pointer the kernel returns to: beyond, `iretq` would fault.
pub const fn user_address(address: u64) -> bool {
    address < 1 << 47
}

impl Kernel {
    /// Raises a synchronous exception: to the thread's handler, else to the keeper of its space,
    /// else the thread sleeps for ever (fluke-api 3.1). The thread is running or asleep in a call.
    pub fn raise(&mut self, id: Id<Thread>, message: ExceptionMessage) {
        let thread = &mut self.threads[id];
        if thread.exceptions_enabled && thread.handlers.trap != 0 {
            let handler = thread.handlers.trap;
            self.interrupt_wait(id);
            self.threads[id].enter_handler(handler, message.code, message.subcode);
            self.make_ready(id);
            return;
        }
        let keeper = thread
            .space
            .and_then(|space| self.spaces.get(space)?.keeper);
        self.send_exception(id, keeper, message);
    }

    /// Makes a thread wait for a keeper to deal with an exception.
    pub fn send_exception(
        &mut self,
        id: Id<Thread>,
        keeper: Option<Id<Port>>,
        message: ExceptionMessage,
    ) {
        self.interrupt_wait(id);
        let thread = &mut self.threads[id];
        let keeper = keeper.filter(|&port| self.ports.get(port).is_some());
        thread.exception = keeper.is_some().then_some(ExceptionMessage {
            magic: fluke_abi::ipc::EXCEPTION_MAGIC,
            thread_hash: thread.header.hash,
            rip: thread.frame.rip,
            ..message
        });
        match keeper {
            Some(port) => {
                self.sleep(id, Wait::Port(port));
                self.wake_server(port);
            }
            None => {
                self.check_own(id, &message);
                self.sleep(id, Wait::Forever);
            }
        }
    }

    /// Posts an asynchronous exception. `pending` is the flag that holds it back.
    pub fn post(&mut self, id: Id<Thread>, pending: ThreadFlags) {
        let thread = &mut self.threads[id];
        thread.pending |= pending;
        // A thread on a CPU delivers to itself on its way out of the kernel.
        let running = thread.run == Run::Scheduled && scheduler().call_attention(thread.entity);
        if !running {
            self.deliver_pending(id);
        }
    }

    /// Lets a thread take an asynchronous exception held back, if it can: the caller, or one that is on
    /// no CPU.
    pub fn deliver_pending(&mut self, id: Id<Thread>) {
        let thread = &mut self.threads[id];
        if !thread.exceptions_enabled || thread.run == Run::Stopped {
            return;
        }
        let choices = [
            (
                ThreadFlags::INTERRUPT_PENDING,
                Exception::Interrupt,
                thread.handlers.interrupt,
            ),
            (
                ThreadFlags::CLIENT_ALERT_PENDING,
                Exception::ClientAlert,
                thread.handlers.client_alert,
            ),
            (
                ThreadFlags::SERVER_ALERT_PENDING,
                Exception::ServerAlert,
                thread.handlers.server_alert,
            ),
        ];
        let pending = thread.pending;
        let taken = choices
            .into_iter()
            .filter(|(flag, ..)| pending.contains(*flag))
            .find(|&(flag, _, handler)| {
                // One without a handler is forgotten.
                thread.pending.remove(flag);
                handler != 0
            });
        let Some((_, code, handler)) = taken else {
            return;
        };
        self.interrupt_wait(id);
        self.threads[id].enter_handler(handler, code as u64, 0);
        self.make_ready(id);
    }

    /// Links for export: partner of the connection in the role `side`.
    pub fn partner_link(&self, id: Id<Thread>, side: Side) -> Link {
        self.threads[id]
            .connection(side)
            .map_or(Link::Null, |c| Link::Thread(c.partner))
    }

    /// Sets the partner in the role `side`, as far as that is consistent with what the partner
    /// has: it takes a partner that has had no connection yet, one that waits for a thread to be made
    /// again, and one that already points here; not one that has left.
    pub fn set_partner(
        &mut self,
        id: Id<Thread>,
        side: Side,
        partner: Option<Id<Thread>>,
        sender: bool,
    ) {
        self.threads[id].exported[side as usize] = false;
        let Some(partner) = partner.filter(|&p| self.threads.get(p).is_some() && p != id) else {
            self.disconnect(id, side);
            let thread = &mut self.threads[id];
            thread.connections[side as usize] = None;
            thread.joined[side as usize] = false;
            return;
        };
        let theirs = self.threads[partner].connections[side.other() as usize];
        let free = match theirs {
            Some(c) => c.partner == id || self.threads.get(c.partner).is_none(),
            None => !self.threads[partner].joined[side.other() as usize],
        };
        if self.threads[id]
            .connection(side)
            .is_some_and(|c| c.partner != partner)
        {
            self.disconnect(id, side);
        }
        let thread = &mut self.threads[id];
        thread.connections[side as usize] = free.then_some(Connection { partner, sender });
        thread.joined[side as usize] = free;
        if let Some(connection) = theirs.filter(|_| free && !mutant!(partner_not_imported)) {
            self.threads[partner].connections[side.other() as usize] = Some(Connection {
                partner: id,
                ..connection
            });
        }
    }

    /// Unmakes a stopped thread.
    pub fn destroy_thread(&mut self, id: Id<Thread>) {
        for side in [Side::Client, Side::Server] {
            if !self.threads[id].exported[side as usize] || mutant!(connection_broken) {
                self.disconnect(id, side);
            }
        }
        if !mutant!(client_forgotten) {
            self.abandon_client(id);
        }
        if let Some(donor) = self.donor_of(id) {
            self.return_time(donor, Status::TimeUnused);
        }
        self.stopped(id);
        self.detach(id);
        if let Some(thread) = self.threads.remove(id)
            && let Some(stack) = scheduler().remove(thread.entity)
        {
            model::release(&mut self.stacks, stack);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As after a call, whose trap is a fault, and after an interrupt of user code.
    #[test]
    fn a_handler_does_not_see_how_its_thread_came_into_the_kernel() {
        const RF: u64 = 1 << 16;
        let saved = [0, RF].map(|flag| {
            let mut thread = Thread::new(1);
            thread.frame.rflags |= flag;
            thread.enter_handler(0x1000, 0, 0);
            thread.saved
        });
        assert_eq!(saved[0], saved[1]);
    }
}
