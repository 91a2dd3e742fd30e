//! Message transfers between two threads: the ends of calls that need a partner, in every row.
//!
//! The calling thread makes the calls that are looked at, and a partner plays its part. Neither waits for the
//! other but in these calls: each scene begins with a connection, and ends with none.

use alloc::boxed::Box;
use alloc::format;
use alloc::vec::Vec;

use fluke_abi::code::{Insanity, Status};
use fluke_abi::entry::{Convention, Entry, Row, TABLE};
use libfluke::object::{Mutex, Port, Pset, Ref};
use libfluke::println;

use super::{empty, note, pairs};
use crate::caller::{Call, Caller, End, plain};
use crate::handler;

/// Words of a message that the receiver has no room for.
const MANY: u64 = 64;
/// Words that it has room for.
const FEW: u64 = 4;

/// One direction of a message: a buffer, and a table of one reference if it is not 0.
#[derive(Clone, Copy, Default)]
struct Part {
    address: u64,
    words: u64,
    refs: u64,
}

fn message(number: u16, dest: u64, send: Part, receive: Part) -> Call {
    let (word, mut registers) = plain(
        Entry::ipc_send,
        &[
            dest,
            send.address,
            send.words,
            receive.address,
            receive.words,
        ],
    );
    (registers[6], registers[8]) = (send.refs, receive.refs);
    let word = word
        .with_number(number)
        .with_send_refs(u8::from(send.refs != 0))
        .with_recv_refs(u8::from(receive.refs != 0));
    (word, registers)
}

/// A role in a connection.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Client,
    Server,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }

    /// The call that does `what` in this role.
    fn call(self, what: &str, send: Part, receive: Part) -> Call {
        let name = match self {
            Self::Client => format!("ipc_client_{what}"),
            Self::Server => format!("ipc_server_{what}"),
        };
        let row = TABLE.iter().find(|row| row.name == name);
        message(row.map_or(0, |row| row.number), 0, send, receive)
    }

    fn disconnect(self) -> Call {
        self.call("disconnect", Part::default(), Part::default())
    }
}

/// What scenes are made with.
struct Stage {
    pset: u64,
    /// A reference to a port in the set.
    port: u64,
    few: Part,
    many: Part,
    /// A reference, and no words.
    reference: Part,
    /// What is wrong with a buffer or a reference.
    bad: [(Part, Insanity); 4],
}

impl Stage {
    /// Buffers are at `memory`.
    fn new(memory: u64) -> Result<Self, Status> {
        let (pset, port) = service()?;
        let table = |handle: u64| Box::leak(Box::new(handle)) as *const u64 as u64;
        let part = |words, refs| Part {
            address: memory,
            words,
            refs,
        };
        let reference = Ref::alloc()?.handle() as u64;
        let mutex = Mutex::alloc()?.handle() as u64;
        let unaligned = Part {
            address: memory + 4,
            ..part(FEW, 0)
        };
        Ok(Self {
            pset,
            port,
            few: part(FEW, table(reference)),
            many: part(MANY, table(reference)),
            reference: part(0, table(reference)),
            bad: [
                (unaligned, Insanity::BufferUnaligned),
                (part(FEW, table(reference + 8)), Insanity::NotAligned),
                (part(FEW, table(empty())), Insanity::NoObject),
                (part(FEW, table(mutex)), Insanity::NotRef),
            ],
        })
    }

    /// Becomes a server, with that room for what a client sends.
    fn serve(&self, room: Part) -> Call {
        let number = Entry::ipc_setup_wait_receive as u16;
        message(number, self.pset, Part::default(), room)
    }

    /// Sends to the port.
    fn send(&self, entry: Entry, send: Part) -> Call {
        message(entry as u16, self.port, send, self.many)
    }

    /// Makes a connection, and becomes its sender or receiver: a server is a sender when its client has turned
    /// the connection over, and nothing is under way when the client has what the server then sends.
    fn enter(&self, side: Side, sender: bool) -> Vec<Call> {
        let nothing = Part::default();
        match (side, sender) {
            (Side::Client, true) => [self.send(Entry::ipc_client_connect_send, nothing)].into(),
            (Side::Server, false) => [self.serve(nothing)].into(),
            (Side::Client, false) => {
                let number = Entry::ipc_client_connect_send_over_receive as u16;
                [message(number, self.port, nothing, self.few)].into()
            }
            (Side::Server, true) => [
                self.serve(nothing),
                side.call("ack_send", self.few, nothing),
            ]
            .into(),
        }
    }
}

/// A port set, and a reference to a port in it.
fn service() -> Result<(u64, u64), Status> {
    let pset = Pset::alloc()?;
    let port = Ref::to(Port::in_set(pset, 0)?)?;
    Ok((pset.handle() as u64, port.handle() as u64))
}

/// Calls of the calling thread, of which one is looked at and the rest sees to it that the partner is left
/// behind; calls of the partner; and how the one must end.
struct Scene {
    row: &'static Row,
    before: Vec<Call>,
    call: Call,
    after: Vec<Call>,
    partner: Vec<Call>,
    expected: End,
}

/// What a row is, by the words of its name.
struct Script<'a> {
    stage: &'a Stage,
    row: &'static Row,
    side: Side,
    /// Whether it begins as the sender of a connection.
    sender: bool,
    scenes: &'a mut Vec<Scene>,
}

impl Script<'_> {
    fn has(&self, word: &str) -> bool {
        self.row.name.split('_').any(|w| w == word)
    }

    /// Whether the call itself makes the connection.
    fn connects(&self) -> bool {
        self.has("connect") || self.has("setup")
    }

    /// The partner's calls until it has taken what the call sends first.
    fn take(&self, room: Part) -> Vec<Call> {
        let (other, nothing) = (self.side.other(), Part::default());
        if self.has("connect") {
            return [self.stage.serve(room)].into();
        }
        if self.has("setup") {
            return Vec::new();
        }
        let mut calls = self.stage.enter(other, !self.sender);
        if self.has("ack") {
            calls.push(other.call("over_receive", nothing, room));
        } else if self.has("send") {
            calls.push(other.call("receive", nothing, room));
        }
        calls
    }

    fn add(
        &mut self,
        before: Vec<Call>,
        (send, receive): (Part, Part),
        partner: Vec<Call>,
        end: End,
    ) {
        let dest = match self.row.parameters[0].0 {
            "dest" => self.stage.port,
            "pset" => self.stage.pset,
            _ => 0,
        };
        let nothing = Part::default();
        self.scenes.push(Scene {
            row: self.row,
            before,
            call: message(self.row.number, dest, send, receive),
            after: [
                message(Entry::ipc_reply as u16, 0, nothing, nothing),
                self.side.disconnect(),
            ]
            .into(),
            partner,
            expected: end,
        });
    }

    /// A scene in which the partner takes what is sent, into `room`, and makes more calls.
    fn scene(&mut self, parts: (Part, Part), room: Part, then: &[Call], end: End) {
        let before = if self.connects() {
            Vec::new()
        } else {
            self.stage.enter(self.side, self.sender)
        };
        let mut partner = self.take(room);
        partner.extend(then);
        self.add(before, parts, partner, end);
    }

    /// What the partner does to make the call receive; with `over`, to the end.
    fn answer(&self, part: Part, over: bool) -> Call {
        let (other, nothing) = (self.side.other(), Part::default());
        match (self.has("wait"), self.has("over"), over) {
            (true, _, true) => self.stage.send(Entry::ipc_send, part),
            (true, _, false) => self.stage.send(Entry::ipc_client_connect_send, part),
            (_, true, true) => other.call("ack_send_over_receive", part, nothing),
            (_, true, false) => other.call("ack_send", part, nothing),
            (_, false, true) => other.call("over_receive", part, nothing),
            (_, false, false) => other.call("send", part, nothing),
        }
    }

    /// All scenes of the row.
    fn write(&mut self) -> Result<(), Status> {
        let (few, many, nothing) = (self.stage.few, self.stage.many, Part::default());
        let reference = self.stage.reference;
        let leave = self.side.other().disconnect();
        let status = End::Status;
        if self.has("send") && (self.has("ack") || self.has("connect")) {
            let end = status(Status::SendDisconnected);
            self.scene((many, nothing), nothing, &[leave], end);
        }
        if self.has("send") && self.has("over") {
            let end = status(Status::OverDisconnected);
            self.scene((nothing, nothing), nothing, &[leave], end);
        }
        if self.has("receive") {
            let room = Part { refs: 0, ..few };
            for (answer, end) in [
                (&[self.answer(nothing, true)][..], Status::Success),
                (
                    &[self.answer(nothing, false), leave],
                    Status::RecvDisconnected,
                ),
                (&[self.answer(many, false)], Status::RecvMoreData),
                (&[self.answer(reference, false)], Status::RecvMoreRefs),
            ] {
                self.scene((nothing, room), nothing, answer, status(end));
            }
        } else if !self.has("reply") {
            self.scene((nothing, nothing), nothing, &[], status(Status::Success));
        }
        for (bad, insanity) in self.stage.bad {
            let end = End::Insanity(insanity);
            if self.has("reply") {
                let before = [self.stage.serve(nothing)].into();
                let partner = [self.stage.send(Entry::ipc_call, nothing)].into();
                self.add(before, (bad, few), partner, end);
            } else if self.has("send") {
                self.scene((bad, nothing), many, &[], end);
            } else {
                self.scene((nothing, bad), nothing, &[self.answer(few, false)], end);
            }
        }
        let role = if self.sender {
            Insanity::NotSender
        } else {
            Insanity::NotReceiver
        };
        if self.row.may_raise(role) {
            let other = self.side.other();
            let before = self.stage.enter(self.side, !self.sender);
            let mut partner = self.stage.enter(other, self.sender);
            // Until it is left.
            partner.push(match self.sender {
                true => other.call("send", many, nothing),
                false => other.call("receive", nothing, many),
            });
            self.add(before, (nothing, nothing), partner, End::Insanity(role));
        }
        if self.has("wait") && !self.connects() {
            // Another object comes to be where the port set was.
            let (pset, port) = service()?;
            let stage = Stage {
                pset,
                port,
                ..*self.stage
            };
            let mut before = stage.enter(self.side, self.sender);
            before.extend([
                plain(Entry::pset_destroy, &[pset]),
                plain(Entry::mutex_create, &[pset]),
            ]);
            let script = Script {
                stage: &stage,
                scenes: self.scenes,
                ..*self
            };
            let partner = script.take(nothing);
            self.add(
                before,
                (nothing, few),
                partner,
                End::Insanity(Insanity::NotPset),
            );
        }
        Ok(())
    }
}

/// Makes the calls, with buffers at `memory`; how many did not end as they must.
pub fn run(memory: u64) -> Result<usize, Status> {
    let stage = Stage::new(memory)?;
    let mut scenes = Vec::new();
    for row in TABLE
        .iter()
        .filter(|row| row.built && row.convention == Convention::Message)
    {
        let client = row.name.starts_with("ipc_client");
        let mut script = Script {
            stage: &stage,
            row,
            side: if client { Side::Client } else { Side::Server },
            sender: !row.may_raise(Insanity::NotReceiver)
                && (client || row.may_raise(Insanity::NotSender)),
            scenes: &mut scenes,
        };
        if script.has("client") || script.has("server") || script.has("wait") || script.has("reply")
        {
            script.write()?;
        }
    }
    let partner = Caller::new(
        scenes
            .iter()
            .flat_map(|scene| scene.partner.iter().copied())
            .collect(),
    )?;
    let mut wrong = 0;
    for (number, scene) in scenes.iter().enumerate() {
        note(scene.row.number, number as u64, 0);
        let make = |&(word, registers): &Call| {
            // SAFETY: all that the registers point to is there for good.
            unsafe { handler::call(word.0, registers) }
        };
        scene.before.iter().map(make).for_each(drop);
        let end = End::of(make(&scene.call));
        scene.after.iter().map(make).for_each(drop);
        pairs::ended(scene.row, end);
        if end != scene.expected {
            println!(
                "wild: {} ended with {end:?}, not {:?} (scene {number})",
                scene.row.name, scene.expected
            );
            wrong += 1;
        }
    }
    if partner.end() == End::Hangs {
        println!("wild: the partner of message transfers hangs");
        wrong += 1;
    }
    Ok(wrong)
}
