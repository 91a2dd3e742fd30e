//! The engine of message transfer: every `ipc` entry point is a chain of stages.
//!
//! A thread in the engine has its progress in its registers: completing a stage makes its call that
//! of the entry point which does the rest ([`stage_of`], OSDI '99 4.3: the program counter is moved
//! to the entry point of the call that performs the remaining work). So there is no state to lose:
//! the loop looks at the entry number and does that stage, whoever got the thread to that point.
//!
//! A stage that needs the partner finds it asleep in a matching wait, and then does the work for
//! both, with both threads' registers; or it goes to sleep itself, and the partner will.

use fluke_abi::code::{Exception, Insanity, Status};
use fluke_abi::entry::Entry;
use fluke_abi::ipc::{Flavour, WORD_SIZE};

use super::transfer::{Cursor, Outcome, Trouble, piece, received, sent_all};
use super::{Port, Pset};
use crate::arena::Id;
use crate::call::{Call, Done, Stop};
use crate::entry::NUMBERS;
use crate::kernel::Kernel;
use crate::mutant::mutant;
use crate::object::Link;
use crate::reference::Ref;
use crate::thread::{Raised, Side, Thread, Wait};

/// One stage of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Find a server thread and connect to it.
    Connect,
    /// Send all there is.
    Send(Side),
    /// Turn the connection over.
    Over(Side),
    /// Take the connection over.
    Ack(Side),
    /// Receive until full or told to stop.
    Receive(Side),
    /// Idempotent request.
    Call,
    /// One-way message.
    Oneway,
    /// Answer an idempotent request.
    Reply,
    /// Become a server.
    Setup,
    /// Wait for a message of any flavour.
    Wait,
}

/// What an entry point does first, and the entry point that does the rest.
pub const fn stage_of(entry: Entry) -> Option<(Stage, Option<Entry>)> {
    use Entry::*;
    use Side::{Client, Server};
    Some(match entry {
        ipc_client_connect_send => (Stage::Connect, Some(ipc_client_send)),
        ipc_client_connect_send_over_receive => {
            (Stage::Connect, Some(ipc_client_send_over_receive))
        }
        ipc_client_send => (Stage::Send(Client), None),
        ipc_server_send => (Stage::Send(Server), None),
        ipc_client_send_over_receive => (Stage::Send(Client), Some(ipc_client_over_receive)),
        ipc_server_send_over_receive => (Stage::Send(Server), Some(ipc_server_over_receive)),
        ipc_server_send_wait_receive => (Stage::Send(Server), Some(ipc_wait_receive)),
        ipc_client_over_receive => (Stage::Over(Client), Some(ipc_client_receive)),
        ipc_server_over_receive => (Stage::Over(Server), Some(ipc_server_receive)),
        ipc_client_ack_send => (Stage::Ack(Client), Some(ipc_client_send)),
        ipc_server_ack_send => (Stage::Ack(Server), Some(ipc_server_send)),
        ipc_client_ack_send_over_receive => {
            (Stage::Ack(Client), Some(ipc_client_send_over_receive))
        }
        ipc_server_ack_send_over_receive => {
            (Stage::Ack(Server), Some(ipc_server_send_over_receive))
        }
        ipc_server_ack_send_wait_receive => {
            (Stage::Ack(Server), Some(ipc_server_send_wait_receive))
        }
        ipc_client_receive => (Stage::Receive(Client), None),
        ipc_server_receive => (Stage::Receive(Server), None),
        ipc_call => (Stage::Call, None),
        ipc_send => (Stage::Oneway, None),
        ipc_reply => (Stage::Reply, None),
        ipc_reply_wait_receive => (Stage::Reply, Some(ipc_wait_receive)),
        ipc_setup_wait_receive => (Stage::Setup, Some(ipc_wait_receive)),
        ipc_wait_receive => (Stage::Wait, None),
        _ => return None,
    })
}

/// [`stage_of`] the entry point with each number.
static STAGES: [Option<(Stage, Option<Entry>)>; NUMBERS] = {
    let mut stages = [None; NUMBERS];
    let mut number = 0;
    while number < NUMBERS {
        if let Some(entry) = Entry::from_number(number as u16) {
            stages[number] = stage_of(entry);
        }
        number += 1;
    }
    stages
};

/// What a thread's call does first, and the entry point that does the rest.
#[inline]
fn stage(thread: &Thread) -> Option<(Stage, Option<Entry>)> {
    *STAGES.get(usize::from(thread.word().number()))?
}

/// Runs the caller's message transfer to its end, or to where it must wait.
pub fn run(call: &mut Call) -> Done {
    while let Some((stage, next)) = stage(call.thread()) {
        match stage {
            Stage::Connect => connect(call)?,
            Stage::Send(side) => send(call, side, next)?,
            Stage::Over(side) => over(call, side)?,
            Stage::Ack(side) => ack(call, side, next)?,
            Stage::Receive(side) => receive(call, side)?,
            Stage::Call => queue_on_port(call, Status::ConnectInvalidDest)?,
            Stage::Oneway => queue_on_port(call, Status::InvalidDest)?,
            Stage::Reply => reply(call, next)?,
            Stage::Setup => setup(call, next)?,
            Stage::Wait => wait_receive(call)?,
        }
        if !call.thread().in_call {
            return Ok(());
        }
    }
    Ok(())
}

/// A stage is complete: on to the next, or done.
fn advance(call: &mut Call, next: Option<Entry>) {
    let thread = call.thread();
    match next {
        Some(entry) => thread.become_entry(entry),
        None => thread.complete_transfer(Status::Success),
    }
}

fn finish(call: &mut Call, status: Status) -> Done {
    call.thread().complete_transfer(status);
    Ok(())
}

/// The port that parameter 0 refers to; `None` if there is no live one.
fn destination(call: &mut Call) -> Result<Option<Id<Port>>, Stop> {
    let reference = call.object::<Ref>(0)?;
    let kernel = call.kernel();
    match kernel.refs[reference].link {
        Link::Port(port) => Ok(kernel.ports.get(port).is_some().then_some(port)),
        _ => match kernel.link(reference) {
            Link::Null => Ok(None),
            _ => Err(Insanity::NotPortRef.into()),
        },
    }
}

/// Meets a server thread that waits for messages of a port; or waits at the port until one deals with
/// the caller: connects to it, or takes its message. Commit point: where the two meet ([`meet`]).
fn queue_on_port(call: &mut Call, no_port: Status) -> Done {
    let Some(port) = destination(call)? else {
        return finish(call, no_port);
    };
    let id = call.id;
    while let Some(server) = call.kernel().waiting_server(port) {
        if meet(call, port, id, server)? {
            return Ok(());
        }
    }
    call.kernel().wake_donor(port);
    call.wait(Wait::Port(port))
}

fn connect(call: &mut Call) -> Done {
    let id = call.id;
    call.kernel().disconnect(id, Side::Client);
    queue_on_port(call, Status::ConnectInvalidDest)
}

/// How the caller stands to its partner.
enum Partner {
    /// There is none.
    Gone,
    /// It cannot take part now: it is about to be made again from its state, or points elsewhere.
    Absent,
    /// It sleeps in this wait.
    Asleep(Id<Thread>, Wait),
    /// It does something else.
    Busy,
}

/// The caller's partner in the role `side`, if the caller is what it must be: sender or receiver.
fn partner(call: &mut Call, side: Side, sender: bool) -> Result<Partner, Stop> {
    let Some(connection) = call.thread().connection(side) else {
        return Ok(Partner::Gone);
    };
    if connection.sender != sender {
        let insanity = if sender {
            Insanity::NotSender
        } else {
            Insanity::NotReceiver
        };
        return Err(insanity.into());
    }
    let id = call.id;
    let Some(thread) = call.kernel().threads.get(connection.partner) else {
        return Ok(Partner::Absent);
    };
    if thread
        .connection(side.other())
        .is_none_or(|back| back.partner != id)
    {
        return Ok(Partner::Absent);
    }
    Ok(match thread.wait() {
        Some(wait) => Partner::Asleep(connection.partner, wait),
        None => Partner::Busy,
    })
}

/// Sends what the registers say. Commit points: each piece, and the step to the next stage.
fn send(call: &mut Call, side: Side, next: Option<Entry>) -> Done {
    let other = side.other();
    let id = call.id;
    loop {
        let partner = match partner(call, side, true)? {
            Partner::Gone => return finish(call, Status::SendDisconnected),
            partner => partner,
        };
        if Cursor::sending(&call.thread().frame).is_empty() {
            // A receiver that has no room for more does not wait for the end.
            if let Partner::Asleep(receiver, Wait::Receive(s)) = partner
                && s == other
                && next.is_none()
            {
                let kernel = call.kernel();
                if Cursor::receiving(&kernel.threads[receiver].frame).no_data() {
                    kernel.finish(receiver, Status::RecvMoreData);
                }
            }
            return sent(call, side, next);
        }
        match partner {
            Partner::Asleep(receiver, Wait::Receive(s)) if s == other => {
                if let Some(outcome) = move_message(call, id, receiver)? {
                    match outcome {
                        Outcome::Sent => {}
                        Outcome::Enough => call.preemption_point()?,
                        Outcome::DataFull => {
                            call.kernel().finish(receiver, Status::RecvMoreData);
                        }
                        Outcome::RefsFull => {
                            call.kernel().finish(receiver, Status::RecvMoreRefs);
                        }
                    }
                }
            }
            Partner::Asleep(_, Wait::Ack(s)) if s == other => drop_message(call.thread()),
            _ => {
                return call.wait(Wait::Send(side));
            }
        }
    }
}

/// All is sent.
fn sent(call: &mut Call, side: Side, next: Option<Entry>) -> Done {
    if next == Some(Entry::ipc_wait_receive) {
        let id = call.id;
        call.kernel().disconnect(id, side);
    }
    advance(call, next);
    Ok(())
}

/// What a sender still offers is thrown away.
fn drop_message(thread: &mut Thread) {
    let mut cursor = Cursor::sending(&thread.frame);
    cursor.drop_all();
    cursor.store_sending(&mut thread.frame);
}

/// Words between two preemption points: 8 KiB (OSDI '99 5.3). Only messages on a connection have
/// them: a one-way or idempotent message is delivered at once or again from its beginning.
const PREEMPTION_WORDS: u64 = (8 << 10) / WORD_SIZE;

/// Moves what can be moved before a preemption point, for both threads. `None`: the partner has to
/// deal with something.
fn move_message(
    call: &mut Call,
    sender: Id<Thread>,
    receiver: Id<Thread>,
) -> Result<Option<Outcome>, Stop> {
    let caller = call.id;
    let kernel = call.kernel();
    let (mut from, mut to) = (kernel.sending(sender), kernel.receiving(receiver));
    let most = if kernel.preemption_points {
        PREEMPTION_WORDS
    } else {
        u64::MAX
    };
    let result = kernel.transfer(&mut from, &mut to, most);
    if mutant!(advanced_before_copy) && result.is_err() {
        let words = piece(&from.cursor, &to.cursor);
        for party in [&mut from, &mut to] {
            party.cursor.advance(words);
        }
    }
    let (from, to) = (from.cursor, to.cursor);
    from.store_sending(&mut kernel.threads[sender].frame);
    if mutant!(progress_after_preemption) {
        call.preemption_point()?;
        to.store_receiving(&mut call.kernel().threads[receiver].frame);
        return Ok(result.ok());
    }
    to.store_receiving(&mut kernel.threads[receiver].frame);
    match result {
        Ok(outcome) => Ok(Some(outcome)),
        Err(Trouble { thread, stop }) if thread == caller => Err(stop),
        Err(Trouble { thread, stop }) => {
            kernel.trouble_other(thread, stop);
            Ok(None)
        }
    }
}

/// Turns the connection over. Commit point: when the partner acknowledges.
fn over(call: &mut Call, side: Side) -> Done {
    let other = side.other();
    let id = call.id;
    match partner(call, side, true)? {
        Partner::Gone => finish(call, Status::OverDisconnected),
        Partner::Asleep(receiver, Wait::Ack(s)) if s == other => {
            let kernel = call.kernel();
            kernel.advance_other(receiver);
            kernel.turn_over(receiver, other, id);
            kernel.wake(receiver);
            let next = stage(call.thread()).and_then(|(_, next)| next);
            advance(call, next);
            Ok(())
        }
        partner => {
            if let Partner::Asleep(receiver, Wait::Receive(s)) = partner
                && s == other
            {
                // The end of the message; the partner has yet to acknowledge.
                call.kernel().finish(receiver, Status::Success);
            }
            call.wait(Wait::Over(side))
        }
    }
}

/// Takes the connection over. Commit point: when the partner turns it over.
fn ack(call: &mut Call, side: Side, next: Option<Entry>) -> Done {
    let other = side.other();
    let id = call.id;
    match partner(call, side, false)? {
        Partner::Gone => return finish(call, Status::AckDisconnected),
        Partner::Asleep(sender, Wait::Over(s)) if s == other => {
            let kernel = call.kernel();
            kernel.turn_over(id, side, sender);
            kernel.advance_other(sender);
            kernel.sleep(sender, Wait::Receive(other));
            advance(call, next);
            return Ok(());
        }
        Partner::Asleep(sender, Wait::Send(s)) if s == other => {
            let kernel = call.kernel();
            drop_message(&mut kernel.threads[sender]);
            kernel.wake(sender);
        }
        _ => {}
    }
    call.wait(Wait::Ack(side))
}

/// Receives. Commit points: each piece, and the end.
fn receive(call: &mut Call, side: Side) -> Done {
    let other = side.other();
    let id = call.id;
    loop {
        match partner(call, side, false)? {
            Partner::Gone => return finish(call, Status::RecvDisconnected),
            Partner::Asleep(_, Wait::Over(s)) if s == other => {
                return finish(call, Status::Success);
            }
            Partner::Asleep(sender, Wait::Send(s)) if s == other => {
                let Some(outcome) = move_message(call, sender, id)? else {
                    continue;
                };
                match outcome {
                    Outcome::DataFull => return finish(call, Status::RecvMoreData),
                    Outcome::RefsFull => return finish(call, Status::RecvMoreRefs),
                    Outcome::Enough => call.preemption_point()?,
                    Outcome::Sent => {
                        let full = Cursor::receiving(&call.thread().frame).no_data();
                        if call.kernel().sent_other(sender, other) && full {
                            return finish(call, Status::RecvMoreData);
                        }
                    }
                }
            }
            _ => {
                if mutant!(over_on_stack) && side == Side::Server {
                    call.thread().become_entry(Entry::ipc_server_over_receive);
                }
                return call.wait(Wait::Receive(side));
            }
        }
    }
}

/// Makes the caller a server on the port set that parameter 0 names.
fn setup(call: &mut Call, next: Option<Entry>) -> Done {
    call.object::<Pset>(0)?;
    let handle = call.argument(0);
    call.thread().server_pset = handle;
    advance(call, next);
    Ok(())
}

/// Answers the idempotent call that the caller serves, if its client still waits. Commit point: the
/// client's completion.
fn reply(call: &mut Call, next: Option<Entry>) -> Done {
    let id = call.id;
    let client = call.thread().idempotent_client;
    let kernel = call.kernel();
    let waiting = client.filter(|&client| {
        kernel
            .threads
            .get(client)
            .is_some_and(|c| c.wait() == Some(Wait::Reply(id)))
    });
    let waiting = if mutant!(reply_unlooked) {
        client
    } else {
        waiting
    };
    if let Some(client) = waiting {
        if kernel.threads[client].exception.take().is_none() {
            let (mut from, mut to) = (kernel.sending(id), kernel.receiving(client));
            match kernel.transfer(&mut from, &mut to, u64::MAX) {
                Ok(_) => {
                    let thread = &mut kernel.threads[client];
                    to.cursor.store_receiving(&mut thread.frame);
                    thread.complete_transfer(Status::Success);
                }
                Err(Trouble { thread, stop }) if thread == id => return Err(stop),
                // The reply is lost; the client will ask again.
                Err(Trouble { thread, stop }) => kernel.trouble_other(thread, stop),
            }
        }
        kernel.wake_from_reply(client, id);
    }
    call.thread().idempotent_client = None;
    advance(call, next);
    Ok(())
}

/// Waits for a message on the caller's port set. Commit point: taking a client from its port.
fn wait_receive(call: &mut Call) -> Done {
    let id = call.id;
    let handle = call.thread().server_pset;
    let kernel = call.kernel();
    let pset = kernel.object::<Pset>(id, handle)?;
    kernel.threads[id].notified = None;
    kernel.disconnect(id, Side::Server);
    kernel.abandon_client(id);
    let Some((port, client)) = kernel.first_client(pset) else {
        return call.wait(Wait::Pset(pset));
    };
    if kernel.threads[client].wait() == Some(Wait::Ask(port)) {
        let request = kernel.time_request(client);
        deliver_words(call, client, &request.to_words())?;
        let kernel = call.kernel();
        kernel.unqueue(client, Wait::Ask(port));
        kernel.threads[client].asked = true;
        kernel.wait_for_time(client);
        kernel.receives(id, port, Flavour::Oneway);
        return finish(call, Status::Success);
    }
    let thread = &kernel.threads[client];
    if let Some(raised) = thread.exception {
        let message = thread.message(&raised);
        deliver_words(call, client, &message.to_words())?;
        let kernel = call.kernel();
        kernel.wait_instead(client, Wait::Reply(id));
        kernel.threads[id].idempotent_client = Some(client);
        kernel.receives(id, port, Flavour::Idempotent);
        return finish(call, Status::Success);
    }
    meet(call, port, client, id).map(drop)
}

/// A client and a server meet at a port: the caller is one of them, the other waits for it. Says whether
/// they did: else the other, which has to deal with something first, waits no longer. Commit point: the
/// server has the message, or a client.
fn meet(
    call: &mut Call,
    port: Id<Port>,
    client: Id<Thread>,
    server: Id<Thread>,
) -> Result<bool, Stop> {
    let caller = call.id;
    let kernel = call.kernel();
    match stage(&kernel.threads[client]) {
        // A client could keep a driver waiting.
        Some((Stage::Connect, _)) if kernel.is_own(server) => {
            kernel.finish(client, Status::ConnectInvalidDest);
        }
        Some((Stage::Connect, Some(next))) => {
            kernel.connect(client, server);
            kernel.receives(server, port, Flavour::Reliable);
            kernel.threads[server].become_entry(Entry::ipc_server_receive);
            if caller == client {
                kernel.wait_instead(server, Wait::Receive(Side::Server));
            }
            if !mutant!(connect_again) {
                kernel.threads[client].become_entry(next);
            }
            if caller == client {
                kernel.send_at_once(client, server);
            }
            if caller == server {
                kernel.wait_instead(client, Wait::Send(Side::Client));
            }
        }
        Some((stage @ (Stage::Call | Stage::Oneway), _)) => {
            if !deliver(call, client, server)? {
                return Ok(false);
            }
            let kernel = call.kernel();
            if stage == Stage::Call {
                kernel.receives(server, port, Flavour::Idempotent);
                kernel.threads[server].idempotent_client = Some(client);
            } else {
                kernel.receives(server, port, Flavour::Oneway);
                kernel.finish(client, Status::Success);
            }
            kernel.finish(server, Status::Success);
            if stage == Stage::Call {
                if caller == client {
                    call.wait(Wait::Reply(server))?;
                } else {
                    kernel.wait_instead(client, Wait::Reply(server));
                }
            }
        }
        // A thread whose call is none of these does not queue on a port.
        _ => kernel.wake(client),
    }
    Ok(true)
}

/// Copies a client's message into a server's buffers, cut to fit. The client's registers stay: the
/// message can be delivered again. Says whether it is delivered: else the one that is not the caller has to
/// deal with something first.
fn deliver(call: &mut Call, client: Id<Thread>, server: Id<Thread>) -> Result<bool, Stop> {
    let caller = call.id;
    let kernel = call.kernel();
    let (mut from, mut to) = (kernel.sending(client), kernel.receiving(server));
    match kernel.transfer(&mut from, &mut to, u64::MAX) {
        Ok(_) => {
            to.cursor.store_receiving(&mut kernel.threads[server].frame);
            Ok(true)
        }
        Err(Trouble { thread, stop }) if thread == caller => Err(stop),
        Err(Trouble { thread, stop }) => {
            kernel.trouble_other(thread, stop);
            Ok(false)
        }
    }
}

/// Writes a message of the kernel's, and a reference to the thread that it is about, into the caller's
/// buffers.
fn deliver_words(call: &mut Call, client: Id<Thread>, words: &[u64]) -> Done {
    let id = call.id;
    let mut to = Cursor::receiving(&call.thread().frame);
    let count = to.words.min(words.len() as u64);
    if count > 0 && !to.address.is_multiple_of(8) {
        return Err(Insanity::BufferUnaligned.into());
    }
    for (n, word) in words.iter().take(count as usize).enumerate() {
        call.write(to.address + n as u64 * 8, word)?;
    }
    to.address += count * 8;
    to.words -= count;
    if to.refs > 0 {
        let handle = call.read::<u64>(to.ref_table)?;
        let reference = call.kernel().object::<Ref>(id, handle)?;
        call.kernel().refs[reference].link = Link::Thread(client);
        to.ref_table += 8;
        to.refs -= 1;
    }
    to.store_receiving(&mut call.thread().frame);
    Ok(())
}

impl Kernel {
    /// Sends the message of a client that has just connected, if nothing is in the way, as most often. Else the next
    /// stage does.
    #[inline]
    fn send_at_once(&mut self, client: Id<Thread>, server: Id<Thread>) {
        let (from, to) = (&self.threads[client], &self.threads[server]);
        let Some(words) = self.copy_at_once(from, self.view_of(from), to) else {
            return;
        };
        sent_all(&mut self.threads[client].frame);
        let to = &mut self.threads[server].frame;
        received(to, words);
        if mutant!(pointer_not_advanced) {
            to.r10 -= words * WORD_SIZE;
        }
    }

    /// Completes the transfer of a thread, and wakes it if it sleeps.
    fn finish(&mut self, id: Id<Thread>, status: Status) {
        self.threads[id].complete_transfer(status);
        self.wake(id);
    }

    /// A server has a message, or a client, that came to a port.
    fn receives(&mut self, server: Id<Thread>, port: Id<Port>, flavour: Flavour) {
        let alias = self.ports[port].alias;
        let thread = &mut self.threads[server];
        thread.frame.r15 = alias;
        thread.frame.rax = thread.word().with_flavour(flavour as u8).0;
    }

    /// The stage of a sleeping thread is complete: its call is that of the next.
    fn advance_other(&mut self, id: Id<Thread>) {
        if let Some((_, Some(next))) = stage(&self.threads[id]) {
            self.threads[id].become_entry(next);
        }
    }

    /// A sleeping sender, in the role `side`, has had all its data taken. If it will turn over, it
    /// sleeps on as one that does; else it is woken. Says whether its call ends here.
    fn sent_other(&mut self, id: Id<Thread>, side: Side) -> bool {
        match stage(&self.threads[id]) {
            Some((_, Some(next))) if matches!(stage_of(next), Some((Stage::Over(_), _))) => {
                self.threads[id].become_entry(next);
                self.sleep(id, Wait::Over(side));
                false
            }
            Some((_, None)) => {
                self.finish(id, Status::Success);
                true
            }
            _ => {
                self.wake(id);
                false
            }
        }
    }

    /// A sleeping thread's own memory or parameters stop a transfer that another thread does: it
    /// takes the exception itself, and makes its call again afterwards.
    fn trouble_other(&mut self, id: Id<Thread>, stop: Stop) {
        match stop {
            Stop::Fault => self.take_fault(id),
            Stop::Insanity(insanity) => {
                self.raise(id, Raised::new(Exception::Insanity, insanity as u64));
            }
            Stop::Restart => self.wake(id),
        }
    }

    /// Wakes a client from its wait for a reply, if it is still in it.
    fn wake_from_reply(&mut self, client: Id<Thread>, server: Id<Thread>) {
        if self.threads[client].wait() == Some(Wait::Reply(server)) {
            self.wake(client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fluke_abi::entry::{Convention, TABLE};

    #[test]
    fn the_chain_of_stages_is_the_tables_restart_points() {
        for row in TABLE
            .iter()
            .filter(|row| row.convention == Convention::Message)
        {
            let mut chain = Vec::new();
            let mut at = Entry::from_number(row.number);
            while let Some(entry) = at {
                let (stage, next) = stage_of(entry).expect(row.name);
                // A reliable client makes a waiting server a receiver.
                at = next.or((stage == Stage::Wait).then_some(Entry::ipc_server_receive));
                chain.extend(at);
            }
            assert_eq!(chain, row.restart_points, "{}", row.name);
        }
    }
}
