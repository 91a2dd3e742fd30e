//! Every CPU runs user code.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use libfluke::{startup, thread};

use super::{Checks, Trouble};

/// Longest wait for a CPU to run a thread; generous, since CPUs may share one core of the host.
const PATIENCE_NS: u64 = 20_000_000_000;
/// Stack of a thread that does nearly nothing.
const STACK_BYTES: u64 = 16 << 10;

pub fn tour(checks: &mut Checks) -> Result<(), Trouble> {
    let cpus = startup::cpus();
    let seen: Arc<Vec<AtomicBool>> = Arc::new((0..cpus).map(|_| AtomicBool::new(false)).collect());
    let strangers = Arc::new(AtomicU64::new(0));
    let deadline = startup::now() + PATIENCE_NS;
    let mut threads = Vec::new();
    for _ in 0..cpus {
        let (seen, strangers) = (seen.clone(), strangers.clone());
        threads.push(thread::spawn_with_stack(STACK_BYTES, move || {
            // Running, not sleeping, so that a thread that waits must go to another CPU.
            while seen.iter().any(|seen| !seen.load(Relaxed)) && startup::now() < deadline {
                match seen.get(thread::cpu() as usize) {
                    Some(seen) => seen.store(true, Relaxed),
                    None => {
                        strangers.fetch_add(1, Relaxed);
                    }
                }
            }
        })?);
    }
    threads.into_iter().for_each(thread::Handle::join);
    let count = seen.iter().filter(|seen| seen.load(Relaxed)).count();
    checks.equal(format_args!("CPUs that ran a thread"), &cpus, &count);
    checks.equal(
        format_args!("threads on CPUs that do not exist"),
        &0,
        &strangers.load(Relaxed),
    );
    Ok(())
}
