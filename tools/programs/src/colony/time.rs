//! Who sleeps by the clock, gives time away, uses it, or has been stopped.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::{Status, Wakeup};
use fluke_abi::entry::Entry;
use fluke_abi::state::ThreadFlags;
use libfluke::object::Port;
use libfluke::{startup, thread};

use super::{Colony, NAP_NS, PENDING, RELEASED, service};

/// How long somebody sleeps: longer than the colony takes to settle.
const SLEEP_NS: u64 = 3_000_000_000;

/// Adds them.
pub fn settle(colony: &mut Colony) -> Result<(), Status> {
    let deadline = startup::now() + SLEEP_NS;
    colony.settle("thread_sleep", Entry::thread_sleep, 1, move || {
        thread::sleep(deadline.saturating_sub(startup::now()));
        u64::from(startup::now() >= deadline)
    })?;

    // In registers that only the FPU has.
    colony.settle("floating point", None, sum(), || {
        let mut last = sum();
        while RELEASED.load(Relaxed) == 0 {
            last = sum();
        }
        last
    })?;

    let (_, scheduler) = service()?;
    let spinner = thread::spawn(|| {
        while RELEASED.load(Relaxed) == 0 {
            core::hint::spin_loop();
        }
    })?;
    let target = spinner.thread();
    target.set_scheduler(scheduler, 0);
    let port = Port::alloc()?;
    colony.settle(
        "thread_schedule",
        Entry::thread_schedule,
        Status::TimeUnused as u64,
        move || target.schedule(port, Wakeup::OnBlock) as u64,
    )
}

/// The bits of a sum.
fn sum() -> u64 {
    let terms = (1..200_000).map(|n| 1.0 / f64::from(n));
    terms.sum::<f64>().to_bits()
}

/// A thread that its program has stopped.
pub struct Stopped {
    handle: thread::Handle,
    counted: u64,
}

static COUNT: AtomicU64 = AtomicU64::new(0);

/// Adds it.
pub fn settle_stopped() -> Result<Stopped, Status> {
    let handle = thread::spawn(|| {
        while RELEASED.load(Relaxed) < 2 {
            COUNT.fetch_add(1, Relaxed);
        }
    })?;
    while COUNT.load(Relaxed) == 0 {
        thread::sleep(NAP_NS);
    }
    handle.thread().state(None);
    let counted = COUNT.load(Relaxed);
    Ok(Stopped { handle, counted })
}

impl Stopped {
    /// It must still be stopped, and run when it is let.
    pub fn check(self, colony: &mut Colony) {
        let stood_still = self.counted == COUNT.load(Relaxed);
        colony.check("a stopped thread", 1, stood_still.into());
        RELEASED.store(2, Relaxed);
        let thread = self.handle.thread();
        let flags = ThreadFlags::from_bits_retain(thread.state(None).flags);
        colony.check(
            "that it is stopped",
            1,
            flags.contains(ThreadFlags::STOPPED).into(),
        );
        thread.go_on();
        self.handle.join();
        let went_on = COUNT.load(Relaxed) != PENDING;
        colony.check("the same, let go on", 1, went_on.into());
    }
}
