//! The state machine of reliable connections against what its users may rely on: random calls of
//! both threads, in any order, interrupted anywhere.
//!
//! The reference is a stream: what is received is what was sent, in order and without gaps, as far
//! as nobody threw it away by taking the connection over.

use std::vec::Vec;

use fluke_abi::code::{Insanity, Status};
use fluke_abi::entry::Entry;
use fluke_abi::state::Prot;
use proptest::prelude::*;

use super::engine::stage_of;
use super::transfer::Cursor;
use crate::arch::memory::{read_word, write_word};
use crate::arena::Id;
use crate::call::{Call, Stop};
use crate::entry::dispatch;
use crate::ipc::engine::Stage;
use crate::kernel::Kernel;
use crate::kernel::tests::kernel;
use crate::lock::{self, scheduler};
use crate::mm::{Mapping, Source};
use crate::thread::{Run, Side, Thread, Wait};

/// Where the buffers are, virtual and physical: one to send and one to receive for each thread.
const BASE: u64 = 0x1000_0000;
const MEMORY: u64 = 0x10_0000;
const BUFFER_BYTES: u64 = 0x4000;
/// Most words of a message: more than two pages.
const WORDS_MAX: u64 = 1200;

/// Calls of a client that is sender, and of one that is receiver.
const CLIENT: [[Entry; 3]; 2] = [
    [
        Entry::ipc_client_send,
        Entry::ipc_client_send_over_receive,
        Entry::ipc_client_over_receive,
    ],
    [
        Entry::ipc_client_receive,
        Entry::ipc_client_ack_send,
        Entry::ipc_client_ack_send_over_receive,
    ],
];
/// The same of a server.
const SERVER: [[Entry; 3]; 2] = [
    [
        Entry::ipc_server_send,
        Entry::ipc_server_send_over_receive,
        Entry::ipc_server_over_receive,
    ],
    [
        Entry::ipc_server_receive,
        Entry::ipc_server_ack_send,
        Entry::ipc_server_ack_send_over_receive,
    ],
];

/// One end of the connection.
struct End {
    id: Id<Thread>,
    side: Side,
    /// Room for words when the call began, if there is one.
    room: Option<u64>,
    /// Messages sent: words each.
    sent: Vec<u64>,
    /// Words received.
    received: Vec<u64>,
}

impl End {
    fn buffer(&self, receive: bool) -> u64 {
        (self.side as u64 * 2 + u64::from(receive)) * BUFFER_BYTES
    }

    fn thread(&self) -> &'static mut Thread {
        &mut lock::held_kernel().threads[self.id]
    }

    fn is_sender(&self) -> bool {
        self.thread()
            .connection(self.side)
            .is_some_and(|c| c.sender)
    }

    /// Sets the registers up for a call, with a fresh message.
    fn prepare(&mut self, entry: Entry, send: u64, room: u64) {
        let message = self.sent.len() as u64;
        for n in 0..send {
            write_word(MEMORY + self.buffer(false) + n * 8, message << 32 | n);
        }
        let (from, to) = (BASE + self.buffer(false), BASE + self.buffer(true));
        let frame = &mut self.thread().frame;
        frame.rax = entry as u64;
        (frame.rsi, frame.rdx) = (from, send);
        (frame.r10, frame.r8) = (to, room);
        self.thread().in_call = true;
        self.room = Some(room);
        let mut at = Some(entry);
        while let Some((stage, next)) = at.and_then(stage_of) {
            if let Stage::Send(_) = stage {
                self.sent.push(send);
            }
            at = next;
        }
    }

    /// Makes the call that the registers name, until it is done or sleeps.
    fn run(&mut self) -> Result<(), Insanity> {
        let entity = self.thread().entity;
        scheduler().run_now(entity);
        self.thread().run = Run::Scheduled;
        while self.thread().in_call && self.thread().run == Run::Scheduled {
            let mut call = Call::new(&scheduler(), entity);
            match dispatch(&mut call) {
                Ok(()) | Err(Stop::Restart) => {}
                Err(Stop::Insanity(insanity)) => return Err(insanity),
                Err(Stop::Fault) => panic!("fault at {:#x}", lock::held_kernel().fault.address),
            }
        }
        scheduler().block(entity);
        Ok(())
    }

    /// If its call is done: the status, with what it received noted.
    fn finish(&mut self) -> Option<Status> {
        if self.thread().in_call {
            return None;
        }
        let room = self.room.take()?;
        let left = Cursor::receiving(&self.thread().frame).words;
        let at = MEMORY + self.buffer(true);
        self.received
            .extend((0..room - left).map(|n| read_word(at + n * 8)));
        let status = self.thread().word().status();
        Some(status.expect("a call ends with a status"))
    }
}

/// Two threads in one space, connected.
fn ends(preemption_points: bool) -> [End; 2] {
    let mut kernel = kernel();
    kernel.preemption_points = preemption_points;
    let space = kernel.create_space(None).unwrap();
    let mut mapping = Mapping::new(0);
    (mapping.start, mapping.size) = (BASE, 4 * BUFFER_BYTES);
    (mapping.prot, mapping.source) = (Prot::all(), Source::Physical(MEMORY));
    let mapping = kernel.mappings.insert(mapping).ok().unwrap();
    kernel.aim_mapping(mapping, space);
    let [client, server] = [(); 2].map(|()| {
        let id = kernel.create_thread(None).unwrap();
        kernel.threads[id].space = Some(space);
        id
    });
    kernel.connect(client, server);
    lock::tests::install(kernel);
    [(client, Side::Client), (server, Side::Server)].map(|(id, side)| End {
        id,
        side,
        room: None,
        sent: Vec::new(),
        received: Vec::new(),
    })
}

/// Checks that what one end received is what the other sent: messages in order, each from its start
/// and without gaps, and none cut short that nobody threw away.
fn check_stream(from: &End, to: &End, may_lose: bool) -> Result<(), TestCaseError> {
    let mut expected = (0, 0);
    for &word in &to.received {
        let (message, n) = (word >> 32, word & 0xffff_ffff);
        while expected.0 < message {
            let all = expected.1 == from.sent[expected.0 as usize];
            prop_assert!(
                all || may_lose,
                "message {} cut at {}",
                expected.0,
                expected.1
            );
            expected = (expected.0 + 1, 0);
        }
        prop_assert_eq!((message, n), expected);
        expected.1 += 1;
    }
    Ok(())
}

/// Lets whoever is awake go on, until everybody is done or asleep.
fn settle(ends: &mut [End; 2]) -> Result<(), TestCaseError> {
    while let Some(end) = ends
        .iter_mut()
        .find(|end| end.thread().in_call && end.thread().run == Run::Scheduled)
    {
        prop_assert_eq!(end.run(), Ok(()));
    }
    Ok(())
}

proptest! {
    #[test]
    fn a_connection_is_two_streams(
        preemption_points: bool,
        operations in prop::collection::vec(
            (0usize..2, 0usize..2, 0usize..3, 0..WORDS_MAX, 0..WORDS_MAX), 1..40)
    ) {
        let mut ends = ends(preemption_points);
        let mut taken_over = false;
        for (who, role, call, send, room) in operations {
            let end = &mut ends[who];
            if end.thread().in_call {
                // Interrupted, and made again from its registers: that changes nothing.
                prop_assert!(end.thread().wait().is_some());
                lock::held_kernel().interrupt_wait(end.id);
                prop_assert_eq!(end.run(), Ok(()));
            } else {
                let entries = if who == 0 { &CLIENT } else { &SERVER };
                let right = end.is_sender() == (role == 0);
                let count = end.sent.len();
                end.prepare(entries[role][call], send, room);
                if right {
                    taken_over |= role == 1 && call > 0;
                    prop_assert_eq!(end.run(), Ok(()));
                } else {
                    let wrong = if role == 0 { Insanity::NotSender } else { Insanity::NotReceiver };
                    prop_assert_eq!(end.run(), Err(wrong));
                    // No effect at all.
                    end.thread().in_call = false;
                    end.thread().run = Run::Stopped;
                    end.sent.truncate(count);
                    end.room = None;
                }
            }
            settle(&mut ends)?;
            for end in &mut ends {
                if let Some(status) = end.finish() {
                    let full = Cursor::receiving(&end.thread().frame).words == 0;
                    prop_assert!(
                        status == Status::Success || status == Status::RecvMoreData && full,
                        "{:?}", status
                    );
                }
            }
            let [client, server] = &ends;
            prop_assert_ne!(client.is_sender(), server.is_sender());
            // Any two waits of the two match, so both asleep is a wake-up that was lost.
            let asleep = |end: &End| end.thread().in_call;
            prop_assert!(
                !(asleep(client) && asleep(server)),
                "{:?} and {:?}", client.thread().wait(), server.thread().wait()
            );
            check_stream(client, server, taken_over)?;
            check_stream(server, client, taken_over)?;
        }
        // Whoever still sleeps learns of the end.
        let [client, server] = &ends;
        for (end, other) in [(client, server), (server, client)] {
            if let Some(wait) = end.thread().wait() {
                lock::held_kernel().disconnect(other.id, other.side);
                prop_assert!(!end.thread().in_call);
                let expected = match wait {
                    Wait::Send(_) => Status::SendDisconnected,
                    Wait::Receive(_) => Status::RecvDisconnected,
                    Wait::Over(_) => Status::OverDisconnected,
                    _ => Status::AckDisconnected,
                };
                prop_assert_eq!(end.thread().word().status(), Some(expected));
            }
        }
    }
}

/// A thread that is made from a state is joined to a partner that is yet to be made from its own; not to one
/// that has left meanwhile, unless that one's end was set since.
#[test]
fn who_has_left_is_nobodys_partner() {
    let [client, server] = ends(false);
    let kernel = lock::held_kernel();
    let joined = |kernel: &mut Kernel| {
        kernel.set_partner(client.id, Side::Client, Some(server.id), false);
        kernel.threads[client.id].connection(Side::Client).is_some()
    };
    kernel.disconnect(server.id, Side::Server);
    assert!(!joined(kernel), "it has left");
    kernel.set_partner(server.id, Side::Server, None, false);
    assert!(joined(kernel), "it is as if new");
}
