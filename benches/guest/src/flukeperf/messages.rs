//! Messages: all three flavours, within a space and to another one, from two words to a mebibyte.

use alloc::format;

use fluke_abi::code::Status;
use fluke_abi::ipc::{Buffer, Params, WORD_SIZE};
use fluke_abi::state::PRIORITY_DEFAULT;
use libfluke::object::{Port, Pset, Ref};
use libfluke::rpc::{self, REFS_MAX, Server};
use libfluke::space::{ChildHeap, Error};
use libfluke::{heap, sys, thread};

use crate::meter::Meter;
use crate::neighbour;

/// Bytes of messages to the other space, and how often each is sent.
const SIZES: [(usize, u64); 7] = [
    (16, 8),
    (128, 8),
    (1 << 10, 8),
    (4 << 10, 8),
    (8 << 10, 4),
    (64 << 10, 2),
    (1 << 20, 1),
];

/// The longest message, words.
const WORDS_MAX: usize = (1 << 20) / WORD_SIZE as usize;
/// Heap of the other space, bytes.
const HEAP: u64 = 3 << 20;

/// Memory for so many words, all of it present.
fn words(words: usize) -> Result<&'static mut [u64], Status> {
    let start = heap::pages(words as u64 * WORD_SIZE).ok_or(Status::NoMemory)?;
    // SAFETY: the pages are ours, and never freed.
    let words = unsafe { core::slice::from_raw_parts_mut(start as *mut u64, words) };
    words.fill(0);
    Ok(words)
}

/// Answers each message with its first word.
fn serve(pset: &Pset, buffer: &mut [u64]) -> Result<(), Status> {
    let mut slots = [const { None }; REFS_MAX];
    for slot in &mut slots {
        *slot = Some(Ref::alloc()?);
    }
    let slots: alloc::vec::Vec<&Ref> = slots.into_iter().flatten().collect();
    let mut server = Server::new(pset, buffer, &slots);
    let mut reply = [0];
    loop {
        server.reply_and_wait(&reply);
        reply = [server.words().first().copied().unwrap_or(0)];
    }
}

/// What the other space does.
pub fn serve_as_neighbour() -> u64 {
    let served = words(WORDS_MAX).and_then(|buffer| serve(neighbour::register()?, buffer));
    u64::from(served.is_err()) * crate::FAILED
}

/// Measures all.
pub fn all(meter: &mut Meter) -> Result<(), Error> {
    let pset = Pset::alloc()?;
    let here = Ref::to(Port::in_set(pset, 0)?)?;
    let buffer = words(64)?;
    let server = thread::spawn(move || {
        let _ = serve(pset, buffer);
    })?;
    // So that nobody's time is up in the middle, and each goes on when it can.
    server.set_priority(PRIORITY_DEFAULT + 1);
    // An answer to the last of them says that all were taken.
    meter.measure("ipc_send-same", 8, || {
        let _ = rpc::send(here, &[1, 2]);
    });
    let _ = rpc::call(here, &[1, 2], &mut [0; 2]);
    both(meter, here, "same");
    server.destroy();
    connection(meter)?;

    if SIZES
        .iter()
        .all(|(bytes, _)| !meter.wants(&format!("ipc_rpc-{bytes}")))
        && !meter.wants("ipc_call-other")
        && !meter.wants("ipc_rpc-other")
    {
        return Ok(());
    }
    let there = neighbour::start(b"flukeperf\0server\0", ChildHeap::Own(HEAP))?;
    both(meter, there, "other");
    let message = words(WORDS_MAX)?;
    for (bytes, times) in SIZES {
        let message = &message[..bytes / WORD_SIZE as usize];
        meter.measure(&format!("ipc_rpc-{bytes}"), times, || {
            let _ = rpc::rpc(there, message, &[], &mut [0]);
        });
    }
    Ok(())
}

/// Requests to a server, which answers with a word.
fn both(meter: &mut Meter, server: &Ref, place: &str) {
    meter.measure(&format!("ipc_call-{place}"), 8, || {
        let _ = rpc::call(server, &[1, 2], &mut [0; 2]);
    });
    meter.measure(&format!("ipc_rpc-{place}"), 8, || {
        let _ = rpc::rpc(server, &[1, 2], &[], &mut [0]);
    });
    let refs = [server; REFS_MAX];
    meter.measure(&format!("ipc_rpc-{place}-refs"), 8, || {
        let _ = rpc::rpc(server, &[1, 2], &refs, &mut [0]);
    });
}

/// A request in parts: connect and send, send, turn over and receive; receive twice, send, disconnect.
fn connection(meter: &mut Meter) -> Result<(), Error> {
    if !meter.wants("ipc_stages") {
        return Ok(());
    }
    let pset = Pset::alloc()?;
    let port = Ref::to(Port::in_set(pset, 0)?)?;
    let server = thread::spawn(move || {
        let mut buffer = [0; 2];
        let mut server = Server::new(pset, &mut buffer, &[]);
        loop {
            server.wait();
            server.more();
            server.reply(&[3]);
        }
    })?;
    server.set_priority(PRIORITY_DEFAULT + 1);
    let message = [1u64, 2];
    let mut answer = [0u64];
    meter.measure("ipc_stages", 8, || {
        let send = Buffer {
            address: message.as_ptr() as u64,
            words: message.len() as u64,
        };
        let mut params = Params {
            send,
            ..Params::default()
        };
        let p = &raw mut params;
        // SAFETY: the buffers outlive the calls.
        unsafe {
            sys::ipc_client_connect_send(port.handle(), p);
            (*p).send = send;
            sys::ipc_client_send(p);
            (*p).recv = Buffer {
                address: answer.as_mut_ptr() as u64,
                words: 1,
            };
            sys::ipc_client_over_receive(p);
            sys::ipc_client_disconnect();
        }
    });
    server.destroy();
    Ok(())
}
