//! A thread more important than all others, which is to wake at regular times, and notes how late it is.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use fluke_abi::code::Status;
use fluke_abi::state::PRIORITY_MAX;
use libfluke::thread::{self, Handle};
use libfluke::{println, startup, sys};

use crate::meter::cycles;

/// Bins for each doubling of the lateness.
const PARTS: u64 = 8;
/// Bins: of lateness up to 2^40 ns.
const BINS: usize = (40 * PARTS) as usize;
/// Times that the clock is looked at to set the counter by it.
const LOOKS: u32 = 8;

static STOP: AtomicBool = AtomicBool::new(false);
static NOTES: [AtomicU64; BINS] = [const { AtomicU64::new(0) }; BINS];
static RUNS: AtomicU64 = AtomicU64::new(0);
static MISSES: AtomicU64 = AtomicU64::new(0);
static SUM: AtomicU64 = AtomicU64::new(0);
static MOST: AtomicU64 = AtomicU64::new(0);

/// The bin of a lateness, nanoseconds.
fn bin(late: u64) -> usize {
    let late = late.max(1);
    let doublings = u64::from(late.ilog2());
    let part = match doublings.checked_sub(3) {
        Some(shift) => (late >> shift) & (PARTS - 1),
        None => (late << (3 - doublings)) & (PARTS - 1),
    };
    ((doublings * PARTS + part) as usize).min(BINS - 1)
}

/// The least lateness of a bin, nanoseconds.
fn least(bin: usize) -> u64 {
    let (doublings, part) = (bin as u64 / PARTS, bin as u64 % PARTS);
    ((PARTS + part) << doublings) / PARTS
}

/// The time by the time-stamp counter, which costs no call.
#[derive(Clone, Copy)]
struct Clock {
    khz: u64,
    /// What the clock showed at a value of the counter.
    at: (u64, u64),
    /// How wrong that may be, nanoseconds.
    doubt: u64,
}

impl Clock {
    /// Set by the kernel's clock.
    fn new() -> Self {
        let khz = startup::startup().tsc_khz;
        let mut best = Self {
            khz,
            at: (0, 0),
            doubt: u64::MAX,
        };
        for _ in 0..LOOKS {
            let before = cycles();
            // SAFETY: the call has no pointers.
            let now = unsafe { sys::clock_read() };
            let after = cycles();
            let doubt = (after - before) / 2 * 1_000_000 / khz;
            if doubt < best.doubt {
                best.at = (now, before + (after - before) / 2);
                best.doubt = doubt;
            }
        }
        best
    }

    fn now(&self) -> u64 {
        let ticks = u128::from(cycles() - self.at.1);
        self.at.0 + (ticks * 1_000_000 / u128::from(self.khz)) as u64
    }
}

/// The thread.
pub struct Watch {
    handle: Handle,
    period: u64,
    doubt: u64,
}

impl Watch {
    /// Starts it, to wake every so many nanoseconds.
    pub fn start(period: u64) -> Result<Self, Status> {
        let clock = Clock::new();
        let handle = thread::spawn(move || keep(clock, period))?;
        handle.set_priority(PRIORITY_MAX);
        Ok(Self {
            handle,
            period,
            doubt: clock.doubt,
        })
    }

    /// Ends it, and prints its notes: `latency NAME VALUE` in nanoseconds, and how many there are
    /// in each bin: `late LEAST COUNT`.
    pub fn stop(self) {
        STOP.store(true, Relaxed);
        self.handle.join();
        for (name, value) in [
            ("period", self.period),
            ("doubt", self.doubt),
            ("runs", RUNS.load(Relaxed)),
            ("misses", MISSES.load(Relaxed)),
            ("sum", SUM.load(Relaxed)),
            ("max", MOST.load(Relaxed)),
        ] {
            println!("latency {name} {value}");
        }
        for (bin, count) in NOTES.iter().enumerate() {
            match count.load(Relaxed) {
                0 => {}
                count => println!("late {} {count}", least(bin)),
            }
        }
    }
}

fn keep(clock: Clock, period: u64) {
    let mut due = clock.now() + period;
    while !STOP.load(Relaxed) {
        // SAFETY: the call has no pointers.
        unsafe { sys::thread_sleep(due) };
        let now = clock.now();
        let late = now.saturating_sub(due);
        NOTES[bin(late)].fetch_add(1, Relaxed);
        RUNS.fetch_add(1, Relaxed);
        SUM.fetch_add(late, Relaxed);
        MOST.fetch_max(late, Relaxed);
        due += period;
        while due <= now {
            MISSES.fetch_add(1, Relaxed);
            due += period;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_ascend_and_hold_their_least() {
        for late in [1, 2, 3, 7, 8, 9, 1000, 123_456, 1 << 39] {
            let bin = bin(late);
            assert!(
                least(bin) <= late && late < least(bin + 1).max(late + 1),
                "{late}"
            );
        }
        assert!((16..200).all(|n| least(n) < least(n + 1) || n < 24));
    }
}
