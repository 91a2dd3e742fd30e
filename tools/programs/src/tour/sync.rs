//! Ping-pong with a mutex and a condition variable.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use libfluke::object::{Cond, Mutex};
use libfluke::thread;

use super::{Checks, Trouble};

const ROUNDS: u64 = 50;

static MUTEX: Mutex = Mutex::new();
static COND: Cond = Cond::new();
/// Whose turn it is is its lowest bit.
static PASSED: AtomicU64 = AtomicU64::new(0);

fn play(side: u64) {
    for _ in 0..ROUNDS {
        MUTEX.lock();
        while PASSED.load(Relaxed) % 2 != side {
            COND.wait(&MUTEX);
        }
        PASSED.store(PASSED.load(Relaxed) + 1, Relaxed);
        COND.signal();
        MUTEX.unlock();
    }
}

pub fn tour(checks: &mut Checks) -> Result<(), Trouble> {
    MUTEX.create()?;
    COND.create()?;
    let ping = thread::spawn(|| play(0))?;
    let pong = thread::spawn(|| play(1))?;
    ping.join();
    pong.join();
    checks.equal(
        format_args!("times the token was passed"),
        &(2 * ROUNDS),
        &PASSED.load(Relaxed),
    );
    MUTEX.lock();
    checks.equal(
        format_args!("a held mutex refuses trylock"),
        &false,
        &MUTEX.try_lock(),
    );
    MUTEX.unlock();
    let free = MUTEX.try_lock();
    checks.equal(format_args!("a free mutex does not"), &true, &free);
    MUTEX.unlock();
    COND.destroy();
    MUTEX.destroy();
    Ok(())
}
