//! Unmakes what calls wait for: every wait in the kernel ends as the API says when an object that it needs
//! goes away.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::{Exception, Insanity, Status, Wakeup};
use fluke_abi::entry::Entry;
use fluke_abi::layout::{GATE, PAGE_SIZE};
use fluke_abi::state::ThreadFlags;
use libfluke::object::{Cond, Mutex, Port, Pset, Ref, Target, Task, Thread};
use libfluke::space::{Export, READ_WRITE};
use libfluke::startup::startup;
use libfluke::{println, thread};

use crate::caller::{Call, Caller, End, NAP_NS, eventually, plain};
use crate::handler;

/// Words of a message that no receiver here has room for.
const MANY: u64 = 512;
/// How often to race.
const ROUNDS: u64 = 300;
/// Words that every receiver has room for.
const FEW: u64 = 4;
/// Addresses that nothing else uses: exported, and empty.
const EMPTY: u64 = 0x31_0000_0000;
/// Where they are mapped.
const VIEW: u64 = 0x32_0000_0000;

/// A call with messages of so many words.
fn message(entry: Entry, to: u64, send: u64, receive: u64) -> Call {
    let buffer = Box::leak(Box::new([0u64; 2 * MANY as usize])).as_ptr() as u64;
    plain(entry, &[to, buffer, send, buffer + MANY * 8, receive])
}

/// The calls of a server that waits on a port set, and then makes another call.
fn serve(pset: &Pset, room: u64, then: Option<Call>) -> Vec<Call> {
    let wait = message(Entry::ipc_setup_wait_receive, pset.handle() as u64, 0, room);
    [Some(wait), then].into_iter().flatten().collect()
}

#[derive(Default)]
struct Checks {
    done: u64,
    failed: u64,
}

impl Checks {
    fn check(&mut self, what: &str, end: End, expected: End) {
        self.done += 1;
        if end != expected {
            self.failed += 1;
            println!("unmake: {what}: expected {expected:?}, saw {end:?}");
        }
    }

    fn asleep(&mut self, what: &str, asleep: bool) {
        self.done += 1;
        if !asleep {
            self.failed += 1;
            println!("unmake: {what}: the thread did not fall asleep");
        }
    }
}

/// A port set with a port, and a link to the port.
fn service() -> Result<(&'static Pset, &'static Port, &'static Ref), Status> {
    let pset = Pset::alloc()?;
    let port = Port::in_set(pset, 0)?;
    Ok((pset, port, Ref::to(port)?))
}

fn mutexes(checks: &mut Checks) -> Result<(), Status> {
    let (held, free, cond) = (Mutex::alloc()?, Mutex::alloc()?, Cond::alloc()?);
    held.lock();
    let caller = Caller::new([plain(Entry::mutex_lock, &[held.handle() as u64])].into())?;
    checks.asleep("mutex_lock", caller.asleep());
    // SAFETY: the call has no pointers but to an object.
    let refused = unsafe {
        handler::call(
            Entry::mutex_destroy as u64,
            plain(Entry::mutex_destroy, &[held.handle() as u64]).1,
        )
    };
    let locked = End::Insanity(Insanity::MutexLocked);
    checks.check("unmaking a locked mutex", End::of(refused), locked);
    held.unlock();
    let done = End::Status(Status::Success);
    checks.check("mutex_lock, after that", caller.end(), done);

    let calls = |mutex: &Mutex| {
        let mutex = mutex.handle() as u64;
        let lock = plain(Entry::mutex_lock, &[mutex]);
        Vec::from([
            lock,
            plain(Entry::cond_wait, &[cond.handle() as u64, mutex]),
        ])
    };
    let caller = Caller::new(calls(free))?;
    checks.asleep("cond_wait", caller.asleep_without(free));
    cond.destroy();
    checks.check("cond_wait without its condition", caller.end(), done);

    let free = Mutex::alloc()?;
    cond.create()?;
    let caller = Caller::new(calls(free))?;
    checks.asleep("cond_wait", caller.asleep_without(free));
    free.destroy();
    cond.signal();
    let expected = End::Insanity(Insanity::NoObject);
    checks.check("cond_wait without its mutex", caller.end(), expected);
    Ok(())
}

fn ports(checks: &mut Checks) -> Result<(), Status> {
    for (entry, status) in [
        (Entry::ipc_send, Status::InvalidDest),
        (Entry::ipc_call, Status::ConnectInvalidDest),
        (Entry::ipc_client_connect_send, Status::ConnectInvalidDest),
        (
            Entry::ipc_client_connect_send_over_receive,
            Status::ConnectInvalidDest,
        ),
    ] {
        let name = entry.row().name;
        for without_reference in [false, true] {
            let (pset, port, reference) = service()?;
            let call = message(entry, reference.handle() as u64, FEW, FEW);
            let caller = Caller::new([call].into())?;
            checks.asleep(name, caller.asleep());
            let mut expected = End::Status(status);
            if without_reference {
                reference.destroy();
                expected = End::Insanity(Insanity::NoObject);
            }
            port.destroy();
            checks.check(name, caller.end(), expected);
            caller.destroy();
            pset.destroy();
        }
    }
    let pset = Pset::alloc()?;
    let server = Caller::new(serve(pset, FEW, None))?;
    let asleep = server.asleep_in(Entry::ipc_wait_receive);
    checks.asleep("ipc_setup_wait_receive", asleep);
    pset.destroy();
    let expected = End::Insanity(Insanity::NoObject);
    checks.check("waiting on a port set", server.end(), expected);
    Ok(())
}

/// Unmakes one end of a connection while the other waits in `wait`.
fn partner(
    checks: &mut Checks,
    client: (Entry, u64),
    server: (u64, Option<Call>),
    (unmake_client, wait): (bool, Entry),
    expected: Status,
) -> Result<(), Status> {
    let (pset, _, reference) = service()?;
    let call = message(client.0, reference.handle() as u64, client.1, MANY);
    let server = Caller::new(serve(pset, server.0, server.1))?;
    let client = Caller::new([call].into())?;
    let (waits, goes) = if unmake_client {
        (server, client)
    } else {
        (client, server)
    };
    checks.asleep(wait.row().name, waits.asleep_in(wait));
    goes.destroy();
    checks.check(wait.row().name, waits.end(), End::Status(expected));
    waits.destroy();
    Ok(())
}

fn partners(checks: &mut Checks) -> Result<(), Status> {
    use Entry::{ipc_client_connect_send as send, ipc_client_connect_send_over_receive as rpc};
    let answer = || Some(message(Entry::ipc_server_ack_send, 0, FEW, 0));
    for (client, server, wait, expected) in [
        (
            (send, MANY),
            (FEW, None),
            (false, Entry::ipc_client_send),
            Status::SendDisconnected,
        ),
        (
            (rpc, FEW),
            (MANY, None),
            (false, Entry::ipc_client_over_receive),
            Status::OverDisconnected,
        ),
        (
            (rpc, FEW),
            (MANY, answer()),
            (false, Entry::ipc_client_receive),
            Status::RecvDisconnected,
        ),
        (
            (send, FEW),
            (MANY, None),
            (true, Entry::ipc_server_receive),
            Status::RecvDisconnected,
        ),
        (
            (send, FEW),
            (FEW, answer()),
            (true, Entry::ipc_server_ack_send),
            Status::AckDisconnected,
        ),
    ] {
        partner(checks, client, server, wait, expected)?;
    }
    // The server of an idempotent call: another gets the call.
    let (pset, _, reference) = service()?;
    let lost = Caller::new(serve(pset, FEW, None))?;
    let call = message(Entry::ipc_call, reference.handle() as u64, FEW, FEW);
    let client = Caller::new([call].into())?;
    let done = End::Status(Status::Success);
    checks.check("ipc_call, taken", lost.end(), done);
    checks.asleep("ipc_call, taken", client.asleep());
    lost.destroy();
    let reply = message(Entry::ipc_reply, 0, FEW, 0);
    Caller::new(serve(pset, FEW, Some(reply)))?;
    checks.check("ipc_call, by another server", client.end(), done);
    Ok(())
}

fn donors(checks: &mut Checks) -> Result<(), Status> {
    static SPUN: AtomicU64 = AtomicU64::new(0);
    for unmake_port in [false, true] {
        let (_, scheduler, reference) = service()?;
        let spinner = thread::spawn(|| {
            loop {
                SPUN.fetch_add(1, Relaxed);
            }
        })?;
        let target = spinner.thread();
        target.set_scheduler(reference, 0);
        let port = Port::alloc()?;
        let call = plain(
            Entry::thread_schedule,
            &[
                target.handle() as u64,
                port.handle() as u64,
                Wakeup::OnSwitch as u64,
            ],
        );
        let donor = Caller::new([call].into())?;
        let asleep = donor.asleep();
        let before = SPUN.load(Relaxed);
        let gives_time = eventually(|| SPUN.load(Relaxed) != before);
        checks.asleep("thread_schedule", asleep && gives_time);
        let expected = if unmake_port {
            port.destroy();
            End::Insanity(Insanity::NoObject)
        } else {
            target.stop_and_destroy();
            End::Status(Status::TimeUnused)
        };
        checks.check("thread_schedule", donor.end(), expected);
        donor.destroy();
        if unmake_port {
            target.stop_and_destroy();
        }
        scheduler.destroy();
    }
    Ok(())
}

fn memory(checks: &mut Checks) -> Result<(), Status> {
    let (_, keeper, reference) = service()?;
    let empty = Export::alloc(EMPTY, PAGE_SIZE, READ_WRITE, Some(reference))?;
    let space = &startup().space;
    let view = empty.map(EMPTY, PAGE_SIZE, READ_WRITE, space, VIEW)?;
    let fault = End::Exception(Exception::PageFault);
    let call = || [plain(Entry::mutex_lock, &[VIEW])].into();

    let caller = Caller::new(call())?;
    checks.asleep("a fault", caller.asleep());
    keeper.destroy();
    checks.check("a fault without a keeper", caller.end(), fault);
    caller.destroy();

    keeper.create()?;
    keeper.point(reference);
    empty
        .region()
        .set(EMPTY, PAGE_SIZE, READ_WRITE, space, Some(reference));
    let caller = Caller::new(call())?;
    checks.asleep("a fault", caller.asleep());
    empty.unmake();
    view.destroy();
    keeper.destroy();
    checks.check("a fault without a region", caller.end(), fault);
    caller.destroy();
    Ok(())
}

/// A thread whose space goes away: its state stays.
fn space(checks: &mut Checks) -> Result<(), Status> {
    let task = Task::alloc()?;
    let sleeper = Thread::alloc()?;
    let mut state = sleeper.state(None);
    (state.registers.rip, state.registers.rax) = (GATE, Entry::thread_sleep as u64);
    state.registers.rdi = u64::MAX;
    state.flags &= !ThreadFlags::STOPPED.bits();
    // SAFETY: the gate page is in every space, and the call does not return.
    unsafe { sleeper.set_state(Some(&state), Some(Ref::to(task)?), None, None) };
    thread::sleep(NAP_NS);
    task.destroy();
    let mut after = sleeper.state(None);
    // SAFETY: there is nowhere to run: the thread takes a fault that nobody handles.
    unsafe {
        after.flags &= !ThreadFlags::STOPPED.bits();
        sleeper.set_state(Some(&after), None, None, None);
    }
    thread::sleep(NAP_NS);
    let last = sleeper.state(None);
    let same = after.registers.rax == Entry::thread_sleep as u64 && last.registers.rip == GATE;
    checks.asleep("a thread without a space", same);
    sleeper.destroy();
    Ok(())
}

/// A reference that a call is to fill goes away, time and again, while the call waits for a thread to leave
/// its CPU: it is filled, or missing.
fn parameters(checks: &mut Checks) -> Result<(), Status> {
    static LINK: Ref = Ref::new();
    static DONE: AtomicU64 = AtomicU64::new(0);
    let spinner = thread::spawn(|| {
        while DONE.load(Relaxed) == 0 {
            core::hint::spin_loop();
        }
    })?;
    LINK.create()?;
    let unmaker = thread::spawn(|| {
        while DONE.load(Relaxed) == 0 {
            LINK.destroy();
            if LINK.create().is_err() {
                return;
            }
        }
    })?;
    let mut wrong = 0;
    for _ in 0..ROUNDS {
        let target = spinner.thread();
        let mut parameters = [0; 9];
        (parameters[0], parameters[2]) = (target.handle() as u64, LINK.handle() as u64);
        // SAFETY: what the kernel writes to is an object, or the call fails.
        let result = unsafe { handler::call(Entry::thread_get_state as u64, parameters) };
        let end = End::of(result);
        let ends = [
            End::Status(Status::Success),
            End::Insanity(Insanity::NoObject),
        ];
        wrong += u64::from(!ends.contains(&end));
        target.go_on();
    }
    DONE.store(1, Relaxed);
    for handle in [spinner, unmaker] {
        handle.join();
    }
    LINK.destroy();
    checks.check("thread_get_state", End::Other(wrong), End::Other(0));
    Ok(())
}

/// The program.
pub fn main() -> u64 {
    handler::install();
    let mut checks = Checks::default();
    let parts = [mutexes, ports, partners, donors, memory, space, parameters];
    for part in parts {
        if let Err(status) = part(&mut checks) {
            println!("unmake: cannot make what is to be unmade: {status:?}");
            return crate::FAILED;
        }
    }
    println!("unmake: {} checks, {} failed", checks.done, checks.failed);
    if checks.failed == 0 { 0 } else { crate::FAILED }
}
