//! Interrupts at every wait: a thread asleep in a call takes an interrupt or an alert, its handler returns,
//! and the call goes on and ends as if nothing had happened. With exceptions disabled it waits until they
//! are enabled.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::Cell;
use core::sync::atomic::AtomicU64;

use fluke_abi::code::{Exception, Status, Wakeup};
use fluke_abi::entry::Entry;
use fluke_abi::state::ThreadFlags;
use libfluke::object::{Cond, Mutex, Port, Pset, Ref, Target};
use libfluke::{sys, thread};

use super::Checks;
use super::pages::{Fault, Pages};
use crate::caller::{Call, Caller, End, eventually, plain};
use crate::resume;

/// Words of a message, which every receiver has just room for.
const WORDS: u64 = 8;
/// A time that does not come.
const NEVER: u64 = u64::MAX;

/// A call that sleeps.
struct Sleeper<'a> {
    /// Calls before it.
    before: Vec<Call>,
    call: Call,
    /// The call that it sleeps in.
    asleep: Entry,
    /// Says that it sleeps, where to stop it for a look would end that.
    sleeps: Option<&'a dyn Fn() -> bool>,
    /// What makes it end.
    wake: &'a mut dyn FnMut(&Caller) -> Result<(), Status>,
    end: Status,
}

/// A call with messages.
fn message(entry: Entry, to: u64, send: u64, receive: u64) -> Call {
    let buffers = Box::leak(Box::new([const { AtomicU64::new(0) }; 2 * WORDS as usize]));
    let at = buffers.as_ptr() as u64;
    plain(entry, &[to, at, send, at + WORDS * 8, receive])
}

fn interrupt(caller: &Caller) {
    // SAFETY: a thread.
    unsafe { sys::thread_interrupt(caller.thread().handle()) };
}

/// Interrupts a sleeper, and looks how its call ends.
fn disturb(
    checks: &mut Checks,
    sleeper: Sleeper<'_>,
    code: Exception,
    post: &dyn Fn(&Caller),
) -> Result<(), Status> {
    let name = sleeper.asleep.row().name;
    let mut calls = sleeper.before;
    calls.push(sleeper.call);
    let count = calls.len() as u64;
    let caller = Caller::with(resume::install, calls)?;
    let asleep = |caller: &Caller| {
        eventually(|| caller.begun() == count) && caller.asleep_in(sleeper.asleep)
    };
    let slept = match sleeper.sleeps {
        Some(sleeps) => eventually(sleeps),
        None => asleep(&caller),
    };
    checks.that(slept, format_args!("{name} sleeps"));
    let taken = resume::taken(code);
    post(&caller);
    let took = eventually(|| resume::taken(code) == taken + 1);
    checks.that(took, format_args!("{name}: {code:?} taken"));
    checks.that(
        asleep(&caller),
        format_args!("{name} sleeps after {code:?}"),
    );
    checks.that(
        caller.end_now() == End::Hangs,
        format_args!("{name} waits after {code:?}"),
    );
    // With exceptions disabled.
    let enable = |enabled: bool| {
        let mut state = caller.thread().state(None);
        state.flags &= !(ThreadFlags::STOPPED | ThreadFlags::EXCEPTION_ENABLE).bits();
        if enabled {
            state.flags |= ThreadFlags::EXCEPTION_ENABLE.bits();
        }
        // SAFETY: the state is the thread's own.
        unsafe { caller.thread().set_state(Some(&state), None, None, None) };
        state.flags
    };
    enable(false);
    post(&caller);
    checks.that(
        asleep(&caller),
        format_args!("{name} sleeps with exceptions disabled"),
    );
    let flag = match code {
        Exception::ClientAlert => ThreadFlags::CLIENT_ALERT_PENDING,
        Exception::ServerAlert => ThreadFlags::SERVER_ALERT_PENDING,
        _ => ThreadFlags::INTERRUPT_PENDING,
    };
    let early = resume::taken(code) != taken + 1;
    let flags = ThreadFlags::from_bits_truncate(enable(true));
    checks.that(
        flags.contains(flag) && !early,
        format_args!("{name}: {code:?} held back"),
    );
    let took = eventually(|| resume::taken(code) == taken + 2);
    checks.that(took, format_args!("{name}: {code:?} taken once enabled"));
    checks.that(asleep(&caller), format_args!("{name} sleeps after that"));
    (sleeper.wake)(&caller)?;
    let (end, expected) = (caller.end(), End::Status(sleeper.end));
    checks.that(end == expected, format_args!("{name} ends with {end:?}"));
    checks.that(
        resume::taken(code) == taken + 2,
        format_args!("{name}: {code:?} only once"),
    );
    caller.destroy();
    Ok(())
}

fn interrupted(checks: &mut Checks, sleeper: Sleeper<'_>) -> Result<(), Status> {
    disturb(checks, sleeper, Exception::Interrupt, &interrupt)
}

fn synchronisation(checks: &mut Checks) -> Result<(), Status> {
    let (mutex, cond) = (Mutex::alloc()?, Cond::alloc()?);
    let [mutex_at, cond_at] = [mutex.handle() as u64, cond.handle() as u64];
    let lock = plain(Entry::mutex_lock, &[mutex_at]);
    mutex.lock();
    let mut wake = |_: &Caller| {
        mutex.unlock();
        Ok(())
    };
    interrupted(
        checks,
        Sleeper {
            before: Vec::new(),
            call: lock,
            asleep: Entry::mutex_lock,
            sleeps: None,
            wake: &mut wake,
            end: Status::Success,
        },
    )?;

    // To be interrupted ends the wait for the condition: the caller goes on to lock the mutex.
    let mutex = Mutex::alloc()?;
    let mutex_at = mutex.handle() as u64;
    let caller = Caller::with(
        resume::install,
        [
            plain(Entry::mutex_lock, &[mutex_at]),
            plain(Entry::cond_wait, &[cond_at, mutex_at]),
        ]
        .into(),
    )?;
    let slept = caller.asleep_without(mutex);
    mutex.lock();
    let taken = resume::taken(Exception::Interrupt);
    interrupt(&caller);
    let took = eventually(|| resume::taken(Exception::Interrupt) == taken + 1);
    checks.that(slept && took, format_args!("cond_wait: interrupt taken"));
    checks.that(
        caller.asleep_in(Entry::mutex_lock) && caller.end_now() == End::Hangs,
        format_args!("cond_wait waits for the mutex"),
    );
    mutex.unlock();
    let end = caller.end();
    let right = end == End::Status(Status::Success) && !mutex.try_lock();
    checks.that(
        right,
        format_args!("cond_wait ends with {end:?}, and the mutex"),
    );
    caller.destroy();
    Ok(())
}

fn clocks(checks: &mut Checks) -> Result<(), Status> {
    // What wakes it is a change of its deadline.
    let mut wake = |caller: &Caller| {
        let mut state = caller.thread().state(None);
        state.flags &= !ThreadFlags::STOPPED.bits();
        state.registers.rdi = 0;
        // SAFETY: the state is the thread's own, but for its deadline.
        unsafe { caller.thread().set_state(Some(&state), None, None, None) };
        Ok(())
    };
    interrupted(
        checks,
        Sleeper {
            before: Vec::new(),
            call: plain(Entry::thread_sleep, &[NEVER]),
            asleep: Entry::thread_sleep,
            sleeps: None,
            wake: &mut wake,
            end: Status::Success,
        },
    )
}

fn donations(checks: &mut Checks) -> Result<(), Status> {
    let scheduler = Port::in_set(Pset::alloc()?, 0)?;
    let (pset, to_scheduler) = (Pset::alloc()?, Ref::to(scheduler)?);
    let target = thread::spawn(|| {
        loop {
            core::hint::spin_loop();
        }
    })?;
    target.thread().set_scheduler(to_scheduler, 0);
    let port = Port::in_set(pset, 0)?;
    let call = plain(
        Entry::thread_schedule,
        &[
            target.thread().handle() as u64,
            port.handle() as u64,
            Wakeup::OnSwitch as u64,
        ],
    );
    let to_port = Ref::to(port)?;
    let mut wake = |_: &Caller| {
        let send = message(Entry::ipc_send, to_port.handle() as u64, WORDS, 0);
        Caller::new([send].into()).map(|_| ())
    };
    interrupted(
        checks,
        Sleeper {
            before: Vec::new(),
            call,
            asleep: Entry::thread_schedule,
            sleeps: None,
            wake: &mut wake,
            end: Status::Success,
        },
    )?;
    target.destroy();
    Ok(())
}

/// A port in a set of its own: the set, and a link to the port.
fn service() -> Result<(&'static Pset, &'static Ref), Status> {
    let pset = Pset::alloc()?;
    Ok((pset, Ref::to(Port::in_set(pset, 0)?)?))
}

fn serve(pset: &Pset) -> Call {
    message(
        Entry::ipc_setup_wait_receive,
        pset.handle() as u64,
        0,
        WORDS,
    )
}

/// Clients that wait on a port, and a server that waits on its set.
fn ports(checks: &mut Checks) -> Result<(), Status> {
    for entry in [
        Entry::ipc_send,
        Entry::ipc_call,
        Entry::ipc_client_connect_send,
        Entry::ipc_client_connect_send_over_receive,
    ] {
        let (pset, port) = service()?;
        let mut server = None;
        let mut wake = |_: &Caller| {
            let answer = match entry {
                Entry::ipc_call => Some(message(Entry::ipc_reply, 0, WORDS, 0)),
                Entry::ipc_client_connect_send_over_receive => {
                    Some(message(Entry::ipc_server_ack_send, 0, WORDS, 0))
                }
                _ => None,
            };
            let calls = [Some(serve(pset)), answer];
            server = Some(Caller::new(calls.into_iter().flatten().collect())?);
            Ok(())
        };
        interrupted(
            checks,
            Sleeper {
                before: Vec::new(),
                call: message(entry, port.handle() as u64, WORDS, WORDS),
                asleep: entry,
                sleeps: None,
                wake: &mut wake,
                end: match entry {
                    Entry::ipc_client_connect_send_over_receive => Status::RecvMoreData,
                    _ => Status::Success,
                },
            },
        )?;
        if let Some(server) = server {
            server.destroy();
        }
    }
    let (pset, port) = service()?;
    let mut wake = |_: &Caller| {
        let send = message(Entry::ipc_send, port.handle() as u64, WORDS, 0);
        Caller::new([send].into()).map(|_| ())
    };
    interrupted(
        checks,
        Sleeper {
            before: Vec::new(),
            call: serve(pset),
            asleep: Entry::ipc_wait_receive,
            sleeps: None,
            wake: &mut wake,
            end: Status::Success,
        },
    )?;

    // A client whose message has been taken: interrupted, it asks again.
    let (pset, port) = service()?;
    let taker = Caller::new([serve(pset)].into())?;
    let mut server = None;
    let mut wake = |_: &Caller| {
        let reply = message(Entry::ipc_reply, 0, WORDS, 0);
        server = Some(Caller::new([serve(pset), reply].into())?);
        Ok(())
    };
    interrupted(
        checks,
        Sleeper {
            before: Vec::new(),
            call: message(Entry::ipc_call, port.handle() as u64, WORDS, WORDS),
            asleep: Entry::ipc_call,
            sleeps: Some(&|| taker.end_now() != End::Hangs),
            wake: &mut wake,
            end: Status::Success,
        },
    )?;
    let end = taker.end();
    checks.that(
        end == End::Status(Status::Success),
        format_args!("the first server has a message: {end:?}"),
    );
    Ok(())
}

/// The entry point of the same name for the other side.
fn mirror(entry: Entry) -> Entry {
    use Entry::*;
    match entry {
        ipc_client_send => ipc_server_send,
        ipc_client_over_receive => ipc_server_over_receive,
        ipc_client_receive => ipc_server_receive,
        ipc_client_ack_send => ipc_server_ack_send,
        other => other,
    }
}

/// Waits in a connection, in both roles: interrupts, and alerts by the partner.
fn connections(checks: &mut Checks) -> Result<(), Status> {
    use Entry::{
        ipc_client_ack_send, ipc_client_over_receive, ipc_client_receive, ipc_client_send,
    };
    // What sleeps, what its partner does in the end, and how it ends.
    let scenes = [
        (ipc_client_send, ipc_client_receive, Status::Success),
        (
            ipc_client_over_receive,
            ipc_client_ack_send,
            Status::RecvMoreData,
        ),
        (ipc_client_receive, ipc_client_send, Status::RecvMoreData),
        (
            ipc_client_ack_send,
            ipc_client_over_receive,
            Status::Success,
        ),
    ];
    for (asleep, partner, end) in scenes {
        for client in [true, false] {
            for alert in [false, true] {
                let (asleep, partner) = match client {
                    true => (asleep, mirror(partner)),
                    false => (mirror(asleep), partner),
                };
                connection(checks, (asleep, partner, end), client, alert)?;
            }
        }
    }
    Ok(())
}

/// Gives a caller that waits at a gate its end of a connection.
fn join(caller: &Caller, to: &Ref, client: bool, sender: bool) {
    let mut state = caller.thread().state(None);
    state.flags &= !ThreadFlags::STOPPED.bits();
    state.flags |= sender_flag(client, sender).bits();
    let (as_server, as_client) = match client {
        true => (None, Some(to)),
        false => (Some(to), None),
    };
    // SAFETY: the state is the thread's own.
    unsafe {
        caller
            .thread()
            .set_state(Some(&state), None, as_server, as_client);
    }
}

const fn sender_flag(client: bool, sender: bool) -> ThreadFlags {
    match (sender, client) {
        (false, _) => ThreadFlags::empty(),
        (true, true) => ThreadFlags::CLIENT_SENDER,
        (true, false) => ThreadFlags::SERVER_SENDER,
    }
}

fn connection(
    checks: &mut Checks,
    (asleep, partner, end): (Entry, Entry, Status),
    client: bool,
    alert: bool,
) -> Result<(), Status> {
    let sender = asleep.row().name.ends_with("_server_send")
        || asleep.row().name.ends_with("_client_send")
        || asleep.row().name.ends_with("_over_receive");
    let code = match (alert, client) {
        (false, _) => Exception::Interrupt,
        (true, true) => Exception::ClientAlert,
        (true, false) => Exception::ServerAlert,
    };
    // The partner gives an alert behind each gate but the last.
    let ring = match client {
        true => Entry::ipc_server_alert,
        false => Entry::ipc_client_alert,
    };
    let mut gates = Vec::new();
    let mut calls = Vec::new();
    for _ in 0..if alert { 2 } else { 0 } {
        gates.push(Mutex::alloc()?);
        calls.push(plain(ring, &[]));
    }
    gates.push(Mutex::alloc()?);
    calls.push(message(partner, 0, WORDS, WORDS));
    gates.iter().for_each(|gate| gate.lock());
    let pass = |gate: &&Mutex| plain(Entry::mutex_lock, &[gate.handle() as u64]);
    let calls = gates.iter().map(pass).zip(calls);
    let other = Caller::new(calls.flat_map(|(pass, call)| [pass, call]).collect())?;
    checks.that(
        other.asleep_in(Entry::mutex_lock),
        format_args!("the partner waits"),
    );

    let links = [Ref::to(other.thread())?, Ref::alloc()?];
    let set = match client {
        true => Entry::thread_set_server,
        false => Entry::thread_set_client,
    };
    let flags = sender_flag(client, sender).bits();
    let posts = Cell::new(0);
    let post = |caller: &Caller| {
        if posts.get() == 0 {
            caller.thread().point(links[1]);
            join(&other, links[1], !client, !sender);
        }
        if alert {
            gates[posts.get()].unlock();
            posts.set(posts.get() + 1);
            // It has given the alert when it comes to the next gate.
            eventually(|| other.begun() == 2 * posts.get() as u64 + 1);
        } else {
            posts.set(1);
            interrupt(caller);
        }
    };
    let mut wake = |_: &Caller| {
        gates[gates.len() - 1].unlock();
        Ok(())
    };
    disturb(
        checks,
        Sleeper {
            before: [plain(set, &[0, links[0].handle() as u64, flags])].into(),
            call: message(asleep, 0, WORDS, WORDS),
            asleep,
            sleeps: None,
            wake: &mut wake,
            end,
        },
        code,
        &post,
    )?;
    other.destroy();
    links.iter().for_each(|link| link.destroy());
    Ok(())
}

/// A fault that the keeper holds back.
fn faults(checks: &mut Checks, pages: &'static Pages) -> Result<(), Status> {
    const PAGE: usize = 0;
    let mutex = pages.alias(PAGE);
    // SAFETY: the page is ours.
    sys::check(unsafe { sys::mutex_create(mutex as *mut _) })?;
    pages.spoil(PAGE, Fault::Hard);
    pages.hold(true);
    let mut wake = |_: &Caller| {
        let held = eventually(|| pages.holds());
        pages.hold(false);
        if held { Ok(()) } else { Err(Status::NoMemory) }
    };
    interrupted(
        checks,
        Sleeper {
            before: Vec::new(),
            call: plain(Entry::mutex_lock, &[pages.address(PAGE, Fault::Hard)]),
            asleep: Entry::mutex_lock,
            sleeps: Some(&|| pages.holds()),
            wake: &mut wake,
            end: Status::Success,
        },
    )
}

pub fn test(pages: &'static Pages, checks: &mut Checks) -> Result<(), Status> {
    synchronisation(checks)?;
    clocks(checks)?;
    donations(checks)?;
    ports(checks)?;
    connections(checks)?;
    faults(checks, pages)
}
