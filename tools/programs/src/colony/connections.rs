//! Who waits for messages, or for them to be taken.

use alloc::vec;

use fluke_abi::code::Status;
use fluke_abi::entry::Entry;
use fluke_abi::ipc::{Buffer, Params};
use libfluke::object::{Pset, Ref};
use libfluke::rpc::{self, Server};
use libfluke::sys;

use super::{Colony, hold, service, stand_by};

/// Words of a long message, and of the piece of it that is received first.
const LONG: u64 = 1500;
const PIECE: u64 = 600;
/// Words of a short message.
const SHORT: u64 = 4;
/// The sum of the words of a message of so many.
const fn sum(words: u64) -> u64 {
    words * (words - 1) / 2
}

/// The words of a message.
fn message(words: u64) -> vec::Vec<u64> {
    (0..words).collect()
}

/// A connection's end, to send or receive.
#[derive(Default)]
struct End {
    sum: u64,
}

type Call = unsafe fn(*mut Params) -> u64;

impl End {
    fn send(&self, call: Call, words: u64) -> Status {
        let message = message(words);
        let mut params = Params {
            send: Buffer {
                address: message.as_ptr() as u64,
                words,
            },
            ..Params::default()
        };
        // SAFETY: the message is borrowed for the call.
        sys::status(unsafe { call(&raw mut params) })
    }

    /// Receives up to so many words, and adds them up.
    fn receive(&mut self, call: Call, words: u64) -> Status {
        let mut buffer = vec![0u64; words as usize];
        let mut params = Params {
            recv: Buffer {
                address: buffer.as_mut_ptr() as u64,
                words,
            },
            ..Params::default()
        };
        // SAFETY: the buffer is borrowed for the call.
        let status = sys::status(unsafe { call(&raw mut params) });
        let received = words - params.recv.words;
        self.sum += buffer[..received as usize].iter().sum::<u64>();
        status
    }

    /// Waits for a message on a port set, as `receive`.
    fn wait(&mut self, pset: &Pset, words: u64) {
        let mut buffer = vec![0u64; words as usize];
        let mut server = Server::new(pset, &mut buffer, &[]);
        server.wait();
        self.sum += server.words().iter().sum::<u64>();
    }
}

fn connect(port: &Ref, words: u64) -> Status {
    let message = message(words);
    let mut params = Params {
        send: Buffer {
            address: message.as_ptr() as u64,
            words,
        },
        ..Params::default()
    };
    // SAFETY: the message is borrowed for the call.
    sys::status(unsafe { sys::ipc_client_connect_send(port.handle(), &raw mut params) })
}

fn disconnect_client() {
    // SAFETY: the call has no parameters.
    unsafe { sys::ipc_client_disconnect() };
}

fn disconnect_server() {
    // SAFETY: as above.
    unsafe { sys::ipc_server_disconnect() };
}

/// Adds all of them.
pub fn settle(colony: &mut Colony) -> Result<(), Status> {
    for part in [queued, taken, sending, turning, receiving, acknowledging] {
        part(colony)?;
    }
    Ok(())
}

/// In the queue of a port that nobody serves yet.
fn queued(colony: &mut Colony) -> Result<(), Status> {
    let (pset, port) = service()?;
    colony.settle("ipc_call, queued", Entry::ipc_call, 21, move || {
        let mut reply = [0; 2];
        rpc::call(port, &[20, 1], &mut reply).map_or(0, |_| reply[0])
    })?;
    colony.settle("ipc_send, queued", Entry::ipc_send, 1, move || {
        u64::from(rpc::send(port, &[100, 1]).is_ok())
    })?;
    colony.settle(
        "ipc_client_connect_send, queued",
        Entry::ipc_client_connect_send,
        1,
        move || {
            let sent = connect(port, 2) == Status::Success;
            disconnect_client();
            u64::from(sent)
        },
    )?;
    // 21 + 101 + 1, in whatever order they come.
    colony.settle(
        "a server that has not begun",
        Entry::mutex_lock,
        123,
        move || {
            hold();
            let mut buffer = [0; 8];
            let mut server = Server::new(pset, &mut buffer, &[]);
            let (mut total, mut reply) = (0, 0);
            for _ in 0..3 {
                server.reply_and_wait(&[reply, 0]);
                reply = server.words().iter().sum();
                total += reply;
            }
            server.reply(&[reply, 0]);
            total
        },
    )
}

/// The client of a server that has its call.
fn taken(colony: &mut Colony) -> Result<(), Status> {
    let (pset, port) = service()?;
    colony.settle("ipc_call, taken", Entry::ipc_call, 5, move || {
        let mut reply = [0; 2];
        rpc::call(port, &[2, 3], &mut reply).map_or(0, |_| reply[0])
    })?;
    colony.settle("a server of a call", Entry::mutex_lock, 5, move || {
        let mut buffer = [0; 8];
        let mut server = Server::new(pset, &mut buffer, &[]);
        server.wait();
        hold();
        let first: u64 = server.words().iter().sum();
        server.reply(&[first, 0]);
        first
    })?;
    colony.settle("a server that stands by", Entry::mutex_lock, 1, move || {
        hold();
        stand_by(pset).is_ok().into()
    })
}

/// A sender whose message is received in part.
fn sending(colony: &mut Colony) -> Result<(), Status> {
    let (pset, port) = service()?;
    colony.settle("ipc_client_send", Entry::ipc_client_send, 1, move || {
        let sent = connect(port, LONG) == Status::Success;
        disconnect_client();
        u64::from(sent)
    })?;
    colony.settle(
        "a receiver of a part",
        Entry::mutex_lock,
        sum(LONG),
        move || {
            let mut end = End::default();
            end.wait(pset, PIECE);
            hold();
            while end.receive(sys::ipc_server_receive, PIECE) == Status::RecvMoreData {}
            end.sum
        },
    )?;
    // The same where the server sends.
    let (pset, port) = service()?;
    colony.settle(
        "a client that receives a part",
        Entry::mutex_lock,
        sum(LONG),
        move || {
            let mut end = End::default();
            connect(port, SHORT);
            end.receive(sys::ipc_client_over_receive, PIECE);
            hold();
            while end.receive(sys::ipc_client_receive, PIECE) == Status::RecvMoreData {}
            end.sum
        },
    )?;
    colony.settle("ipc_server_send", Entry::ipc_server_send, 1, move || {
        let mut end = End::default();
        end.wait(pset, SHORT);
        let sent = end.send(sys::ipc_server_ack_send, LONG) == Status::Success;
        disconnect_server();
        u64::from(sent)
    })
}

/// A client that turns the connection over, before a server that takes its time.
fn turning(colony: &mut Colony) -> Result<(), Status> {
    let (pset, port) = service()?;
    colony.settle(
        "ipc_client_over_receive",
        Entry::ipc_client_over_receive,
        sum(LONG),
        move || {
            // With a word to spare, so that it ends with the server's disconnecting.
            let mut reply = vec![0; LONG as usize + 1];
            let message = message(LONG);
            let words = rpc::rpc(port, &message, &[], &mut reply);
            words.map_or(0, |words| reply[..words].iter().sum())
        },
    )?;
    colony.settle(
        "a server before its answer",
        Entry::mutex_lock,
        sum(LONG),
        move || {
            let mut end = End::default();
            end.wait(pset, LONG + 1);
            hold();
            end.send(sys::ipc_server_ack_send, LONG);
            disconnect_server();
            end.sum
        },
    )?;
    // And a server that turns it back.
    let (pset, port) = service()?;
    colony.settle(
        "ipc_server_over_receive",
        Entry::ipc_server_over_receive,
        sum(PIECE),
        move || {
            let mut end = End::default();
            end.wait(pset, SHORT + 1);
            end.send(sys::ipc_server_ack_send, SHORT);
            end.sum = 0;
            end.receive(sys::ipc_server_over_receive, LONG);
            end.sum
        },
    )?;
    colony.settle(
        "a client before its second message",
        Entry::mutex_lock,
        sum(SHORT),
        move || {
            let mut end = End::default();
            connect(port, SHORT);
            end.receive(sys::ipc_client_over_receive, SHORT + 1);
            hold();
            end.send(sys::ipc_client_ack_send, PIECE);
            disconnect_client();
            end.sum
        },
    )
}

/// Receivers whose partner has more to send, but not now.
fn receiving(colony: &mut Colony) -> Result<(), Status> {
    let (pset, port) = service()?;
    colony.settle(
        "ipc_client_receive",
        Entry::ipc_client_receive,
        2 * sum(SHORT),
        move || {
            let mut end = End::default();
            connect(port, SHORT);
            end.receive(sys::ipc_client_over_receive, LONG);
            end.sum
        },
    )?;
    colony.settle(
        "a server in the middle of its answer",
        Entry::mutex_lock,
        sum(SHORT),
        move || {
            let mut end = End::default();
            end.wait(pset, SHORT + 1);
            end.send(sys::ipc_server_ack_send, SHORT);
            hold();
            end.send(sys::ipc_server_send, SHORT);
            disconnect_server();
            end.sum
        },
    )?;
    let (pset, port) = service()?;
    colony.settle(
        "ipc_server_receive",
        Entry::ipc_server_receive,
        2 * sum(SHORT),
        move || {
            let mut end = End::default();
            end.wait(pset, LONG);
            end.sum
        },
    )?;
    colony.settle(
        "a client in the middle of its message",
        Entry::mutex_lock,
        1,
        move || {
            let end = End::default();
            connect(port, SHORT);
            hold();
            let sent = end.send(sys::ipc_client_send, SHORT) == Status::Success;
            disconnect_client();
            u64::from(sent)
        },
    )
}

/// Receivers that want to send.
fn acknowledging(colony: &mut Colony) -> Result<(), Status> {
    let (pset, port) = service()?;
    colony.settle(
        "ipc_server_ack_send",
        Entry::ipc_server_ack_send,
        sum(SHORT),
        move || {
            let mut end = End::default();
            end.wait(pset, SHORT);
            end.send(sys::ipc_server_ack_send, PIECE);
            disconnect_server();
            end.sum
        },
    )?;
    colony.settle(
        "a client that has not turned over",
        Entry::mutex_lock,
        sum(PIECE),
        move || {
            let mut end = End::default();
            connect(port, SHORT);
            hold();
            while end.receive(sys::ipc_client_over_receive, LONG) == Status::RecvMoreData {}
            end.sum
        },
    )?;
    let (pset, port) = service()?;
    colony.settle(
        "ipc_client_ack_send",
        Entry::ipc_client_ack_send,
        sum(SHORT),
        move || {
            let mut end = End::default();
            connect(port, SHORT);
            end.receive(sys::ipc_client_over_receive, SHORT);
            end.send(sys::ipc_client_ack_send, PIECE);
            disconnect_client();
            end.sum
        },
    )?;
    colony.settle(
        "a server that has not turned over",
        Entry::mutex_lock,
        sum(PIECE),
        move || {
            let mut end = End::default();
            end.wait(pset, SHORT + 1);
            end.send(sys::ipc_server_ack_send, SHORT);
            hold();
            end.sum = 0;
            end.receive(sys::ipc_server_over_receive, LONG);
            end.sum
        },
    )
}
