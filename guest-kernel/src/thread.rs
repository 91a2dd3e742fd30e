//! Threads: user-visible state, what a thread waits for, and how it is stopped.

use core::mem::offset_of;

use fluke_abi::boot::{USER_CS, USER_SS};
use fluke_abi::code::{Exception, Status};
use fluke_abi::entry::Entry;
use fluke_abi::ipc::{CallWord, EXCEPTION_MAGIC, ExceptionMessage};
use fluke_abi::layout::GATE_DONE;
use fluke_abi::object::Type;
use fluke_abi::probe::Probe;
use fluke_abi::state::{Handlers, PRIORITY_DEFAULT, SavedState, ThreadFlags};

use crate::arch::cpu::Frame;
use crate::arena::{Arena, Id, Position};
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

    /// The flag of a thread that is the sender in the role.
    #[inline]
    pub const fn sender(self) -> ThreadFlags {
        match self {
            Self::Client => ThreadFlags::CLIENT_SENDER,
            Self::Server => ThreadFlags::SERVER_SENDER,
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
        port: Position<Port>,
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

/// What has become of a thread's end of a connection in one role, since it was made or the end was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It has had none.
    New,
    /// It has had one; without one now, it has left.
    Joined,
    /// The same, and it was exported: destroying the thread leaves the connection to the thread that is made
    /// from the state.
    Exported,
}

/// An exception on its way to a keeper: what of the message is not in the thread anyway.
#[derive(Clone, Copy, Debug)]
#[allow(
    missing_docs,
    reason = "the fields are those of that name in the message"
)]
pub struct Raised {
    pub subcode: u64,
    pub region_offset: u64,
    pub region_hash: u64,
    pub code: Exception,
    pub access: u8,
}

impl Raised {
    /// An exception that is no page fault.
    pub const fn new(code: Exception, subcode: u64) -> Self {
        Self {
            subcode,
            region_offset: 0,
            region_hash: 0,
            code,
            access: 0,
        }
    }
}

/// A thread.
#[repr(C)]
pub struct Thread {
    /// User registers; first, because traps push onto the end of it.
    pub frame: Frame,
    /// What the scheduler knows of it.
    pub entity: Id<Entity>,
    header: Header<Self>,
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
    /// Partners in reliable connections, by [`Side`].
    partners: [Option<Id<Thread>>; 2],
    /// Client of the idempotent call that it serves.
    pub idempotent_client: Option<Id<Thread>>,
    /// Taken out of this port set's queue to fetch a message, and has not yet looked.
    pub notified: Option<Id<Pset>>,
    /// Exception on its way to a keeper.
    pub exception: Option<Raised>,
    /// Handler addresses.
    pub handlers: Handlers,
    /// Registers saved at the last exception.
    pub saved: SavedState,
    /// The registers name a call that the kernel has begun to make.
    pub in_call: bool,
    /// [`ThreadFlags`], all of which fit.
    flags: u8,
    /// Somebody waits for the thread to stop.
    pub stop_requested: bool,
    /// 0 to 31; the highest runs.
    pub priority: u8,
    /// Its scheduler has taken its request for time since it last slept.
    pub asked: bool,
    /// Its ends of connections, by [`Side`].
    pub ends: [End; 2],
}

const _: () = assert!(offset_of!(Thread, frame) == 0 && Arena::<Thread>::STRIDE.is_multiple_of(16));
const _: () = assert!(ThreadFlags::all().bits() <= u8::MAX as u64);

impl Object for Thread {
    const TYPE: Type = Type::Thread;

    fn header(&mut self) -> &mut Header<Self> {
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
            entity: Id::NONE,
            header: Header::new(hash),
            links: Links::new(),
            run: Run::Stopped,
            in_call: false,
            flags: ThreadFlags::STOPPED.bits() as u8,
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
            partners: [None; 2],
            ends: [End::New; 2],
            idempotent_client: None,
            notified: None,
            exception: None,
            handlers: Handlers::default(),
            saved: SavedState::default(),
        }
    }

    /// Its own name.
    #[inline]
    pub const fn id(&self) -> Id<Self> {
        self.header.id()
    }

    /// Its flags. Stopped is what users know to be: who stops it for `thread_get_state` says so with that call's
    /// end, so that a call which is made again finds what it found first.
    #[inline]
    pub const fn flags(&self) -> ThreadFlags {
        ThreadFlags::from_bits_retain(self.flags as u64)
    }

    /// Sets or clears flags.
    #[inline]
    pub const fn set_flags(&mut self, flags: ThreadFlags, on: bool) {
        let bits = flags.bits() as u8;
        self.flags = if on {
            self.flags | bits
        } else {
            self.flags & !bits
        };
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
        match self.partners[side as usize] {
            Some(partner) => Some(Connection {
                partner,
                sender: self.flags().contains(side.sender()),
            }),
            None => None,
        }
    }

    /// Sets that end.
    pub const fn set_connection(&mut self, side: Side, connection: Connection) {
        self.partners[side as usize] = Some(connection.partner);
        self.set_flags(side.sender(), connection.sender);
    }

    /// Takes that end out: the partner that it had.
    #[inline]
    pub fn take_connection(&mut self, side: Side) -> Option<Id<Self>> {
        let partner = self.partners[side as usize].take()?;
        self.set_flags(side.sender(), false);
        Some(partner)
    }

    /// The message to the keeper about an exception of its own.
    pub const fn message(&self, raised: &Raised) -> ExceptionMessage {
        ExceptionMessage {
            magic: EXCEPTION_MAGIC,
            code: raised.code as u64,
            subcode: raised.subcode,
            access: raised.access as u64,
            region_offset: raised.region_offset,
            region_hash: raised.region_hash,
            thread_hash: self.header.hash,
            rip: self.frame.rip,
        }
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
        self.set_flags(ThreadFlags::EXCEPTION_ENABLE, false);
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
    pub fn raise(&mut self, id: Id<Thread>, raised: Raised) {
        let thread = &mut self.threads[id];
        let handled = thread.flags().contains(ThreadFlags::EXCEPTION_ENABLE);
        if handled && thread.handlers.trap != 0 {
            let handler = thread.handlers.trap;
            self.interrupt_wait(id);
            self.threads[id].enter_handler(handler, raised.code as u64, raised.subcode);
            self.make_ready(id);
            return;
        }
        let keeper = thread
            .space
            .and_then(|space| self.spaces.get(space)?.keeper);
        self.send_exception(id, keeper, raised);
    }

    /// Makes a thread wait for a keeper to deal with an exception.
    pub fn send_exception(&mut self, id: Id<Thread>, keeper: Option<Id<Port>>, raised: Raised) {
        self.interrupt_wait(id);
        let thread = &mut self.threads[id];
        let keeper = keeper.filter(|&port| self.ports.get(port).is_some());
        thread.exception = keeper.is_some().then_some(raised);
        match keeper {
            Some(port) => {
                self.sleep(id, Wait::Port(port));
                self.wake_server(port);
            }
            None => {
                self.check_own(id, &raised);
                self.sleep(id, Wait::Forever);
            }
        }
    }

    /// Posts an asynchronous exception. `pending` is the flag that holds it back.
    pub fn post(&mut self, id: Id<Thread>, pending: ThreadFlags) {
        let thread = &mut self.threads[id];
        thread.set_flags(pending, true);
        if thread.run != Run::Scheduled {
            return self.deliver_pending(id);
        }
        // It may be on a CPU at any moment: it delivers to itself on its way out of the kernel.
        if thread.flags().contains(ThreadFlags::EXCEPTION_ENABLE) {
            scheduler().rouse(thread.entity);
        }
    }

    /// Lets a thread take an asynchronous exception held back, if it can: the caller, or one that is not
    /// scheduled.
    pub fn deliver_pending(&mut self, id: Id<Thread>) {
        let thread = &mut self.threads[id];
        let pending = thread.flags();
        if !pending.contains(ThreadFlags::EXCEPTION_ENABLE) || thread.run == Run::Stopped {
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
        let taken = choices
            .into_iter()
            .filter(|(flag, ..)| pending.contains(*flag))
            .find(|&(flag, _, handler)| {
                // One without a handler is forgotten.
                thread.set_flags(flag, false);
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
        let Some(partner) = partner.filter(|&p| self.threads.get(p).is_some() && p != id) else {
            self.disconnect(id, side);
            self.threads[id].ends[side as usize] = End::New;
            return;
        };
        let theirs = self.threads[partner].connection(side.other());
        let free = match theirs {
            Some(c) => c.partner == id || self.threads.get(c.partner).is_none(),
            None => self.threads[partner].ends[side.other() as usize] == End::New,
        };
        if self.threads[id]
            .connection(side)
            .is_some_and(|c| c.partner != partner)
        {
            self.disconnect(id, side);
        }
        let thread = &mut self.threads[id];
        if free {
            thread.set_connection(side, Connection { partner, sender });
            thread.ends[side as usize] = End::Joined;
        } else {
            thread.take_connection(side);
            thread.ends[side as usize] = End::New;
        }
        if let Some(connection) = theirs.filter(|_| free && !mutant!(partner_not_imported)) {
            let partner = &mut self.threads[partner];
            partner.set_connection(
                side.other(),
                Connection {
                    partner: id,
                    ..connection
                },
            );
        }
    }

    /// Unmakes a stopped thread.
    pub fn destroy_thread(&mut self, id: Id<Thread>) {
        for side in [Side::Client, Side::Server] {
            let exported = self.threads[id].ends[side as usize] == End::Exported;
            if !exported || mutant!(connection_broken) {
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
