//! IPC: ports and port sets, connections, and the engine that moves messages (fluke-api 8).
//!
//! A client always queues on the port and wakes a server thread; the server thread fetches. So a
//! message that waits and one that does not take the same path, and a client stopped in the queue
//! is simply a thread about to make its call.

pub mod connection;
pub mod engine;
pub mod fastpath;
#[cfg(test)]
mod tests;
pub mod transfer;

use fluke_abi::code::Status;
use fluke_abi::object::Type;

use crate::arena::{Arena, Id};
use crate::kernel::Kernel;
use crate::object::{Header, Object};
use crate::queue::{Linked, Links, Queue};
use crate::thread::{Thread, Wait};

/// A port.
pub struct Port {
    header: Header<Self>,
    /// Among the ports of its port set.
    links: Links<Self>,
    /// Value handed to the server with each message.
    pub alias: u64,
    /// The set it is in.
    pub pset: Option<Id<Pset>>,
    /// Threads with a message for it: in connect, call, send, or with an exception.
    pub clients: Queue<Thread>,
    /// Threads that donate their time while they wait for a message on it.
    pub donors: Queue<Thread>,
    /// Threads whose request for time was taken from it, and which have none.
    pub wanting: Queue<Thread>,
    /// While a request on it is to be announced: the port to announce next, or itself at the end.
    pub announced: Option<Id<Self>>,
}

impl Port {
    /// A port in no set.
    pub const fn new(hash: u64) -> Self {
        Self {
            header: Header::new(hash),
            links: Links::new(),
            alias: 0,
            pset: None,
            clients: Queue::new(),
            donors: Queue::new(),
            wanting: Queue::new(),
            announced: None,
        }
    }
}

impl Object for Port {
    const TYPE: Type = Type::Port;

    fn header(&mut self) -> &mut Header<Self> {
        &mut self.header
    }

    fn arena(kernel: &mut Kernel) -> &mut Arena<Self> {
        &mut kernel.ports
    }
}

impl Linked for Port {
    fn links(&mut self) -> &mut Links<Self> {
        &mut self.links
    }
}

/// A port set.
pub struct Pset {
    header: Header<Self>,
    /// Its ports.
    pub ports: Queue<Port>,
    /// Threads that wait for a message.
    pub servers: Queue<Thread>,
}

impl Pset {
    /// An empty set.
    pub const fn new(hash: u64) -> Self {
        Self {
            header: Header::new(hash),
            ports: Queue::new(),
            servers: Queue::new(),
        }
    }
}

impl Object for Pset {
    const TYPE: Type = Type::Pset;

    fn header(&mut self) -> &mut Header<Self> {
        &mut self.header
    }

    fn arena(kernel: &mut Kernel) -> &mut Arena<Self> {
        &mut kernel.psets
    }
}

impl Kernel {
    /// The thread that has waited longest for a message of a port's set.
    pub fn waiting_server(&self, port: Id<Port>) -> Option<Id<Thread>> {
        self.psets[self.ports[port].pset?]
            .servers
            .first(&self.threads)
    }

    /// A message comes to a port: wakes a thread that serves it, or one that donates its time until
    /// there is a message, if one waits.
    pub fn wake_server(&mut self, port: Id<Port>) {
        match self.waiting_server(port) {
            Some(server) => {
                self.wake(server);
                // Should it be stopped before it looks, the message goes to another.
                self.threads[server].notified = self.ports[port].pset;
            }
            None => self.wake_donor(port),
        }
    }

    /// A message comes to a port that nobody serves now: wakes a thread that donates its time until then.
    pub fn wake_donor(&mut self, port: Id<Port>) {
        if let Some(donor) = self.ports[port].donors.first(&self.threads) {
            self.return_time(donor, Status::Success);
        }
    }

    /// Wakes a thread that waits on a port set, if a message waits for it.
    pub fn notify_pset(&mut self, pset: Id<Pset>) {
        if self.psets.get(pset).is_some()
            && let Some((port, _)) = self.first_client(pset)
        {
            self.wake_server(port);
        }
    }

    /// The thread whose message has waited longest at the first port that has any.
    pub fn first_client(&self, pset: Id<Pset>) -> Option<(Id<Port>, Id<Thread>)> {
        let mut next = self.psets[pset].ports.front(&self.ports);
        while let Some((id, port)) = next {
            if let Some(client) = port.clients.first(&self.threads) {
                return Some((id, client));
            }
            next = port.links.next(&self.ports);
        }
        None
    }

    /// Puts a port into a set, or into none.
    pub fn set_pset(&mut self, port: Id<Port>, pset: Option<Id<Pset>>) {
        if let Some(old) = self.ports[port].pset.take()
            && self.psets.get(old).is_some()
        {
            self.psets[old].ports.remove(&mut self.ports, port);
        }
        if let Some(new) = pset {
            self.ports[port].pset = pset;
            self.psets[new].ports.push(&mut self.ports, port);
            self.notify_pset(new);
        }
    }

    /// Unmakes a port. Its clients and donors make their calls again, and find no port; threads
    /// scheduled through it are the kernel's.
    pub fn destroy_port(&mut self, id: Id<Port>) {
        self.set_pset(id, None);
        while let Some(client) = self.ports[id].clients.first(&self.threads) {
            self.threads[client].exception = None;
            if self.threads[client].wait() == Some(Wait::Ask(id)) {
                self.threads[client].scheduler = None;
            }
            self.wake(client);
        }
        while let Some(thread) = self.ports[id].wanting.first(&self.threads) {
            self.threads[thread].scheduler = None;
            self.wake(thread);
        }
        while let Some(donor) = self.ports[id].donors.first(&self.threads) {
            self.wake(donor);
        }
        self.detach(id);
        self.ports.remove(id);
    }

    /// Unmakes a port set. Threads that wait on it make their calls again, and find no set.
    pub fn destroy_pset(&mut self, id: Id<Pset>) {
        while let Some(port) = self.psets[id].ports.first(&self.ports) {
            self.set_pset(port, None);
        }
        while let Some(server) = self.psets[id].servers.first(&self.threads) {
            self.wake(server);
        }
        self.detach(id);
        self.psets.remove(id);
    }

    /// The server of an idempotent call is gone or has turned to another: the client, if it still
    /// waits, makes its call again.
    #[inline]
    pub fn abandon_client(&mut self, server: Id<Thread>) {
        if let Some(client) = self.threads[server].idempotent_client.take() {
            self.abandon(client, server);
        }
    }

    #[inline(never)]
    fn abandon(&mut self, client: Id<Thread>, server: Id<Thread>) {
        let thread = self.threads.get(client);
        if thread.is_some_and(|c| c.wait() == Some(Wait::Reply(server))) {
            self.threads[client].exception = None;
            self.wake(client);
        }
    }
}
