//! Reliable connections: how they are made and broken.

use fluke_abi::code::Status;
use fluke_abi::state::ThreadFlags;

use crate::arena::Id;
use crate::kernel::Kernel;
use crate::thread::{Connection, End, Side, Thread, Wait};

impl Kernel {
    /// Joins two threads; old connections in the same roles break. The client is the sender.
    pub fn connect(&mut self, client: Id<Thread>, server: Id<Thread>) {
        self.disconnect(client, Side::Client);
        self.disconnect(server, Side::Server);
        for (id, side, partner) in [
            (client, Side::Client, server),
            (server, Side::Server, client),
        ] {
            let thread = &mut self.threads[id];
            let sender = side == Side::Client;
            thread.set_connection(side, Connection { partner, sender });
            thread.ends[side as usize] = End::Joined;
        }
    }

    /// Ends a connection from one end: that of `id` in the role `side`. A partner that waits learns
    /// of it at once, any other with its next operation.
    #[inline]
    pub fn disconnect(&mut self, id: Id<Thread>, side: Side) {
        if let Some(partner) = self.threads[id].take_connection(side) {
            self.disconnect_from(id, side, partner);
        }
    }

    #[inline(never)]
    fn disconnect_from(&mut self, id: Id<Thread>, side: Side, partner: Id<Thread>) {
        let other = side.other();
        let Some(thread) = self.threads.get_mut(partner) else {
            return;
        };
        if thread
            .connection(other)
            .is_none_or(|back| back.partner != id)
        {
            return;
        }
        thread.take_connection(other);
        let status = match thread.wait() {
            Some(Wait::Send(s)) if s == other => Status::SendDisconnected,
            Some(Wait::Receive(s)) if s == other => Status::RecvDisconnected,
            Some(Wait::Over(s)) if s == other => Status::OverDisconnected,
            Some(Wait::Ack(s)) if s == other => Status::AckDisconnected,
            _ => return,
        };
        thread.complete_transfer(status);
        self.wake(partner);
    }

    /// Raises the alert in the partner of `id` in the role `side`, if there is one.
    pub fn alert(&mut self, id: Id<Thread>, side: Side) {
        let Some(connection) = self.threads[id].connection(side) else {
            return;
        };
        if self.threads.get(connection.partner).is_some() {
            let flag = match side {
                Side::Client => ThreadFlags::SERVER_ALERT_PENDING,
                Side::Server => ThreadFlags::CLIENT_ALERT_PENDING,
            };
            self.post(connection.partner, flag);
        }
    }

    /// Turns a connection over: `id`, in the role `side`, becomes the sender, its partner the
    /// receiver.
    pub fn turn_over(&mut self, id: Id<Thread>, side: Side, partner: Id<Thread>) {
        self.threads[id].set_flags(side.sender(), true);
        self.threads[partner].set_flags(side.other().sender(), false);
    }
}
