//! What it costs to take the state of a thread, by what it is doing.

use alloc::format;

use fluke_abi::code::Status;
use libfluke::object::{Cond, Mutex, Port, Pset, Ref, ThreadLinks};
use libfluke::rpc::{self, Server};
use libfluke::thread::{self, Handle};

use crate::meter::Meter;

static HELD: Mutex = Mutex::new();
static OWN: Mutex = Mutex::new();
static COND: Cond = Cond::new();

/// How long a thread has to come to where it sleeps again, nanoseconds.
const SETTLE_NS: u64 = 20_000_000;

/// Measures all.
pub fn all(meter: &mut Meter) -> Result<(), Status> {
    if !"extract-".starts_with(meter.options().only) && !meter.wants("extract-") {
        return Ok(());
    }
    for object in [&HELD, &OWN] {
        object.create()?;
    }
    COND.create()?;
    HELD.lock();
    let (idle, unserved, silent) = (Pset::alloc()?, Pset::alloc()?, Pset::alloc()?);
    let nobody = Ref::to(Port::in_set(unserved, 0)?)?;
    let mute = Ref::to(Port::in_set(silent, 0)?)?;
    let server = thread::spawn(move || {
        let mut buffer = [0; 4];
        Server::new(silent, &mut buffer, &[]).wait();
        thread::sleep_forever()
    })?;
    extract(meter, "mutex_lock", thread::spawn(|| HELD.lock())?)?;
    extract(
        meter,
        "cond_wait",
        thread::spawn(|| {
            OWN.lock();
            loop {
                COND.wait(&OWN);
            }
        })?,
    )?;
    extract(
        meter,
        "thread_sleep",
        thread::spawn(|| thread::sleep_forever())?,
    )?;
    extract(
        meter,
        "ipc_wait_receive",
        thread::spawn(move || {
            let mut buffer = [0; 4];
            Server::new(idle, &mut buffer, &[]).wait();
        })?,
    )?;
    extract(
        meter,
        "ipc_connect",
        thread::spawn(move || {
            let _ = rpc::rpc(nobody, &[1, 2], &[], &mut [0]);
        })?,
    )?;
    extract(
        meter,
        "ipc_receive",
        thread::spawn(move || {
            let _ = rpc::rpc(mute, &[1, 2], &[], &mut [0]);
        })?,
    )?;
    let running = thread::spawn(|| {
        loop {
            core::hint::spin_loop();
        }
    })?;
    running.set_priority(0);
    extract(meter, "running", running)?;
    server.destroy();
    Ok(())
}

/// Takes the state of a thread, with all links, that has come to where it sleeps; and destroys it in the end.
fn extract(meter: &mut Meter, what: &str, target: Handle) -> Result<(), Status> {
    let links = ThreadLinks::alloc()?;
    let thread = target.thread();
    let settle = || {
        thread.go_on();
        thread::sleep(SETTLE_NS);
    };
    meter.prepared(&format!("extract-{what}"), 1, settle, || {
        thread.state(Some(links));
    });
    target.destroy();
    Ok(())
}
