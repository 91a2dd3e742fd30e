//! Entering the kernel for nothing, mutexes, condition variables, switches.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use fluke_abi::code::Status;
use fluke_abi::state::PRIORITY_DEFAULT;
use libfluke::object::{Cond, Mutex};
use libfluke::{sys, thread};

use crate::meter::Meter;

static MUTEX: Mutex = Mutex::new();
static COND: Cond = Cond::new();
/// Whose turn it is: 0 is whoever measures.
static TURN: AtomicU64 = AtomicU64::new(0);
static END: AtomicBool = AtomicBool::new(false);

/// Measures all.
pub fn all(meter: &mut Meter) -> Result<(), Status> {
    // SAFETY: neither call has pointers.
    meter.measure("null", 64, || unsafe {
        sys::thread_self();
    });
    // SAFETY: as above.
    meter.measure("clock_read", 32, || unsafe {
        sys::clock_read();
    });
    MUTEX.create()?;
    COND.create()?;
    meter.measure("mutex_trylock_unlock", 32, || {
        MUTEX.try_lock();
        MUTEX.unlock();
    });
    meter.measure("mutex_lock_unlock", 32, || {
        MUTEX.lock();
        MUTEX.unlock();
    });
    meter.measure("cond_signal", 32, || COND.signal());
    meter.measure("cond_broadcast", 32, || COND.broadcast());
    if meter.wants("cond_ping_pong") {
        ping_pong(meter)?;
    }
    if meter.wants("mutex_contended") {
        contended(meter)?;
    }
    Ok(())
}

/// Two threads hand the turn to and fro: two signals, two waits, two switches.
fn ping_pong(meter: &mut Meter) -> Result<(), Status> {
    TURN.store(0, Relaxed);
    END.store(false, Relaxed);
    let other = thread::spawn(|| {
        MUTEX.lock();
        loop {
            while TURN.load(Relaxed) == 0 {
                COND.wait(&MUTEX);
            }
            if END.load(Relaxed) {
                break;
            }
            TURN.store(0, Relaxed);
            COND.signal();
        }
        MUTEX.unlock();
    })?;
    other.set_priority(PRIORITY_DEFAULT + 1);
    MUTEX.lock();
    meter.measure("cond_ping_pong", 8, || {
        TURN.store(1, Relaxed);
        COND.signal();
        while TURN.load(Relaxed) == 1 {
            COND.wait(&MUTEX);
        }
    });
    END.store(true, Relaxed);
    TURN.store(1, Relaxed);
    COND.signal();
    MUTEX.unlock();
    other.join();
    Ok(())
}

/// A more important thread is woken while the mutex is held, waits for it, has it, and goes to sleep again.
fn contended(meter: &mut Meter) -> Result<(), Status> {
    static GO: Mutex = Mutex::new();
    static WAKE: Cond = Cond::new();
    GO.create()?;
    WAKE.create()?;
    TURN.store(0, Relaxed);
    END.store(false, Relaxed);
    let other = thread::spawn(|| {
        GO.lock();
        loop {
            while TURN.load(Relaxed) == 0 {
                WAKE.wait(&GO);
            }
            TURN.store(0, Relaxed);
            if END.load(Relaxed) {
                break;
            }
            MUTEX.lock();
            MUTEX.unlock();
        }
        GO.unlock();
    })?;
    other.set_priority(PRIORITY_DEFAULT + 1);
    meter.measure("mutex_contended", 8, || {
        MUTEX.lock();
        TURN.store(1, Relaxed);
        WAKE.signal();
        MUTEX.unlock();
    });
    END.store(true, Relaxed);
    TURN.store(1, Relaxed);
    WAKE.signal();
    other.join();
    Ok(())
}
