//! Messages: clients, and servers that wait for all three flavours.

use fluke_abi::code::Status;
use fluke_abi::ipc::{Buffer, Flavour, Params};
use fluke_abi::object;

use crate::object::{Pset, Ref};
use crate::sys;

/// Fewest words in the first buffer of a message (`FLUKE_MIN_MSG_SIZE`).
pub const MIN_WORDS: usize = 2;

/// Most references in a message of this library's.
pub const REFS_MAX: usize = 4;

fn send_buffer(words: &[u64]) -> Buffer {
    Buffer {
        address: words.as_ptr() as u64,
        words: words.len() as u64,
    }
}

fn recv_buffer(words: &mut [u64]) -> Buffer {
    Buffer {
        address: words.as_mut_ptr() as u64,
        words: words.len() as u64,
    }
}

/// A message that begins a rendezvous, padded to the least size.
fn padded<'a>(words: &'a [u64], pad: &'a mut [u64; MIN_WORDS]) -> &'a [u64] {
    if words.len() >= MIN_WORDS {
        return words;
    }
    pad[..words.len()].copy_from_slice(words);
    pad
}

fn handles(refs: &[&Ref]) -> [*mut object::Ref; REFS_MAX] {
    let mut table = [core::ptr::null_mut(); REFS_MAX];
    for (entry, reference) in table.iter_mut().zip(refs) {
        *entry = reference.handle();
    }
    table
}

/// One-way message. Success does not prove delivery.
pub fn send(dest: &Ref, message: &[u64]) -> Result<(), Status> {
    let mut pad = [0; MIN_WORDS];
    let mut params = Params {
        send: send_buffer(padded(message, &mut pad)),
        ..Params::default()
    };
    // SAFETY: the buffer is borrowed for the call.
    sys::check(unsafe { sys::ipc_send(dest.handle(), &raw mut params) })
}

/// Idempotent request: it may be delivered more than once. Returns the words of the reply, which
/// is cut to fit.
pub fn call(dest: &Ref, request: &[u64], reply: &mut [u64]) -> Result<usize, Status> {
    let (mut pad, mut least) = ([0; MIN_WORDS], [0; MIN_WORDS]);
    let room = reply.len();
    let recv = recv_buffer(if room >= MIN_WORDS {
        &mut *reply
    } else {
        &mut least
    });
    let words = recv.words;
    let mut params = Params {
        send: send_buffer(padded(request, &mut pad)),
        recv,
        ..Params::default()
    };
    // SAFETY: the buffers are borrowed for the call.
    sys::check(unsafe { sys::ipc_call(dest.handle(), &raw mut params) })?;
    if room < MIN_WORDS {
        reply.copy_from_slice(&least[..room]);
    }
    Ok(((words - params.recv.words) as usize).min(room))
}

/// Reliable request with references. Returns the words of the reply.
pub fn rpc(dest: &Ref, request: &[u64], refs: &[&Ref], reply: &mut [u64]) -> Result<usize, Status> {
    let mut pad = [0; MIN_WORDS];
    let refs = &refs[..refs.len().min(REFS_MAX)];
    let table = handles(refs);
    let room = reply.len() as u64;
    let mut params = Params {
        send: send_buffer(padded(request, &mut pad)),
        send_refs: refs.len() as u8,
        send_ref_table: table.as_ptr(),
        recv: recv_buffer(reply),
        ..Params::default()
    };
    // SAFETY: buffers and table are borrowed for the call.
    let status = sys::status(unsafe {
        sys::ipc_client_connect_send_over_receive(dest.handle(), &raw mut params)
    });
    match status {
        // The server ends the exchange by disconnecting, or by turning over once more.
        Status::Success | Status::RecvDisconnected => Ok((room - params.recv.words) as usize),
        other => Err(other),
    }
}

/// A message that a server thread has received.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Which flavour it has.
    pub flavour: Flavour,
    /// Alias of the port it came through.
    pub alias: u64,
    /// Words received.
    pub words: usize,
    /// References received.
    pub refs: usize,
    /// How the transfer ended: `Success`, `RecvMoreData` if there is more of a reliable message,
    /// `RecvDisconnected` if the client is gone.
    pub status: Status,
}

/// The calling thread as a server.
#[derive(Debug)]
pub struct Server<'a> {
    pset: &'a Pset,
    buffer: &'a mut [u64],
    slots: &'a [&'a Ref],
    last: Option<Request>,
}

impl<'a> Server<'a> {
    /// A server on `pset`, which receives messages into `buffer` and references into `slots`.
    pub fn new(pset: &'a Pset, buffer: &'a mut [u64], slots: &'a [&'a Ref]) -> Self {
        Self {
            pset,
            buffer,
            slots: &slots[..slots.len().min(REFS_MAX)],
            last: None,
        }
    }

    /// The same, after it has received `last`, which is still to be answered.
    #[must_use]
    pub fn after(mut self, last: Option<Request>) -> Self {
        self.last = last;
        self
    }

    /// What the buffer holds.
    pub fn words(&self) -> &[u64] {
        &self.buffer[..self.last.map_or(0, |request| request.words)]
    }

    /// Answers the last message with `reply`, if it wants an answer, and waits for the next.
    pub fn reply_and_wait(&mut self, reply: &[u64]) -> Request {
        let table = handles(self.slots);
        loop {
            let mut params = Params {
                send: send_buffer(reply),
                recv: recv_buffer(self.buffer),
                recv_refs: self.slots.len() as u8,
                recv_ref_table: table.as_ptr(),
                ..Params::default()
            };
            let p = &raw mut params;
            // SAFETY: buffers and table are borrowed for the call.
            let status = sys::status(unsafe {
                match self.last.take() {
                    None => sys::ipc_setup_wait_receive(self.pset.handle(), p),
                    Some(Request {
                        flavour: Flavour::Idempotent,
                        ..
                    }) => sys::ipc_reply_wait_receive(p),
                    Some(Request {
                        flavour: Flavour::Reliable,
                        status: Status::Success | Status::RecvMoreData | Status::RecvMoreRefs,
                        ..
                    }) => sys::ipc_server_ack_send_wait_receive(p),
                    Some(_) => sys::ipc_wait_receive(p),
                }
            });
            let request = Request {
                flavour: Flavour::from_number(params.flavour),
                alias: params.alias,
                words: self.buffer.len() - params.recv.words as usize,
                refs: self.slots.len() - usize::from(params.recv_refs),
                status,
            };
            self.last = Some(request);
            // No flavour: the client was gone before the reply, and there is nothing new yet.
            if request.flavour != Flavour::None {
                return request;
            }
        }
    }

    /// Answers the last message with `reply`, if it wants an answer, and waits for nothing.
    pub fn reply(&mut self, reply: &[u64]) {
        let mut params = Params {
            send: send_buffer(reply),
            ..Params::default()
        };
        let p = &raw mut params;
        // SAFETY: the buffer is borrowed for the calls. A client that has gone does not want it.
        unsafe {
            match self.last.take().map(|last| last.flavour) {
                Some(Flavour::Idempotent) => {
                    sys::ipc_reply(p);
                }
                Some(Flavour::Reliable) => {
                    sys::ipc_server_ack_send(p);
                    sys::ipc_server_disconnect();
                }
                _ => {}
            }
        }
    }

    /// Waits for the next message, with an empty answer to the last.
    pub fn wait(&mut self) -> Request {
        self.reply_and_wait(&[])
    }

    /// Receives more of a reliable message whose transfer ended with `RecvMoreData`, over what
    /// the buffer holds.
    pub fn more(&mut self) -> Request {
        let mut params = Params {
            recv: recv_buffer(self.buffer),
            ..Params::default()
        };
        // SAFETY: the buffer is borrowed for the call.
        let status = sys::status(unsafe { sys::ipc_server_receive(&raw mut params) });
        let request = Request {
            flavour: Flavour::Reliable,
            alias: self.last.map_or(0, |request| request.alias),
            words: self.buffer.len() - params.recv.words as usize,
            refs: 0,
            status,
        };
        self.last = Some(request);
        request
    }
}
