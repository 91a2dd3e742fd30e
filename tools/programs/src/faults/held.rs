//! Long messages stopped in their middle by a page that the keeper holds back: the registers of both
//! threads say how much is done.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::Status;
use fluke_abi::entry::Entry;
use fluke_abi::ipc::{CallWord, WORD_SIZE};
use fluke_abi::layout::{GATE, PAGE_SIZE};
use libfluke::object::{Port, Pset, Ref};

use super::Checks;
use super::pages::{Fault, Pages};
use crate::caller::{Caller, End, eventually, plain};
use crate::resume;

/// The figures of the example in OSDI '99, section 4.3: of 8,192 bytes, 6,144 have gone.
const WORDS: u64 = 8192 / WORD_SIZE;
const DONE: u64 = 6144 / WORD_SIZE;
/// The message begins in the middle of this page, and is stopped at the page after the next.
const PAGE: usize = 20;
const OFFSET: u64 = PAGE_SIZE / 2;

/// Where the missing page is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Sender,
    Receiver,
}

/// Sends a long message with `entry`, which turns into `sends`; the server is in `receives` then, with so
/// many words done in both.
fn held(
    pages: &'static Pages,
    checks: &mut Checks,
    (entry, sends, receives, done): (Entry, Entry, Entry, u64),
    place: Place,
    client_first: bool,
) -> Result<(), Status> {
    let name = entry.row().name;
    let pset = Pset::alloc()?;
    let port = Ref::to(Port::in_set(pset, 0)?)?;
    let paged = pages.address(PAGE, Fault::Hard) + OFFSET;
    let paged_words = &pages.words(PAGE)[(OFFSET / WORD_SIZE) as usize..][..WORDS as usize];
    let plain_words: &'static [AtomicU64; WORDS as usize] =
        Box::leak(Box::new([const { AtomicU64::new(0) }; WORDS as usize]));
    let plain_at = plain_words.as_ptr() as u64;
    let (from, to, sent, received) = match place {
        Place::Sender => (paged, plain_at, paged_words, &plain_words[..]),
        Place::Receiver => (plain_at, paged, &plain_words[..], paged_words),
    };
    for (n, (sent, received)) in sent.iter().zip(received).enumerate() {
        sent.store(n as u64 + 1, Relaxed);
        received.store(0, Relaxed);
    }
    pages.spoil(PAGE + 2, Fault::Hard);
    pages.hold(true);
    let client = || {
        let call = plain(entry, &[port.handle() as u64, from, WORDS]);
        Caller::with(resume::install, [call].into())
    };
    let server = || {
        let pset = pset.handle() as u64;
        let call = plain(Entry::ipc_setup_wait_receive, &[pset, 0, 0, to, WORDS]);
        Caller::with(resume::install, [call].into())
    };
    let (client, server) = if client_first {
        let client = client()?;
        client.asleep();
        (client, server()?)
    } else {
        let server = server()?;
        server.asleep_in(Entry::ipc_wait_receive);
        (client()?, server)
    };
    let what = |what| (name, place, client_first, what);
    checks.that(
        eventually(|| pages.holds()),
        format_args!("{:?}", what("held back")),
    );
    let there = |caller: &Caller, entry: Entry| {
        let registers = caller.registers();
        let at = Entry::from_number(CallWord(registers.rax).number());
        (registers.rip == GATE && at == Some(entry)).then_some(registers)
    };
    let progress = there(&client, sends).map(|registers| (registers.rsi, registers.rdx));
    let expected = Some((from + done * WORD_SIZE, WORDS - done));
    checks.that(
        progress == expected,
        format_args!("{:?}: {progress:x?}", what("sender's registers")),
    );
    let progress = there(&server, receives).map(|registers| (registers.r10, registers.r8));
    let expected = Some((to + done * WORD_SIZE, WORDS - done));
    checks.that(
        progress == expected,
        format_args!("{:?}: {progress:x?}", what("receiver's registers")),
    );
    pages.hold(false);
    if entry == Entry::ipc_call {
        let end = server.end();
        let right = end == End::Status(Status::Success);
        checks.that(right, format_args!("{:?}: {end:?}", what("end")));
    } else {
        let end = [client.end(), server.end()];
        let last = match done {
            0 => Status::Success,
            _ => Status::RecvMoreData,
        };
        let right = end == [End::Status(Status::Success), End::Status(last)];
        checks.that(right, format_args!("{:?}: {end:?}", what("end")));
    }
    let same = sent
        .iter()
        .zip(received)
        .all(|(sent, received)| sent.load(Relaxed) == received.load(Relaxed));
    checks.that(same, format_args!("{:?}", what("message")));
    checks.that(
        pages.faults(PAGE + 2) > 0,
        format_args!("{:?}", what("the missing page")),
    );
    client.destroy();
    server.destroy();
    Ok(())
}

pub fn test(pages: &'static Pages, checks: &mut Checks) -> Result<(), Status> {
    use Entry::{ipc_call, ipc_client_connect_send, ipc_client_send, ipc_send};
    use Entry::{ipc_server_receive, ipc_wait_receive};
    for place in [Place::Sender, Place::Receiver] {
        for client_first in [false, true] {
            // A reliable message goes on where it was; the others begin again.
            for scene in [
                (
                    ipc_client_connect_send,
                    ipc_client_send,
                    ipc_server_receive,
                    DONE,
                ),
                (ipc_call, ipc_call, ipc_wait_receive, 0),
                (ipc_send, ipc_send, ipc_wait_receive, 0),
            ] {
                held(pages, checks, scene, place, client_first)?;
            }
        }
    }
    Ok(())
}
