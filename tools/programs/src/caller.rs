//! Threads that make calls for tests, which look where they sleep and how their calls end.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::code::{Exception, Insanity, Status};
use fluke_abi::entry::Entry;
use fluke_abi::ipc::CallWord;
use fluke_abi::layout::GATE;
use fluke_abi::state::{Registers, ThreadFlags};
use libfluke::object::{Mutex, Thread};
use libfluke::startup;
use libfluke::thread::{self, Handle};

use crate::handler;

/// How long to wait, nanoseconds, before looking for the second time.
const NAP_MIN_NS: u64 = 500_000;
/// How long to wait at most, nanoseconds, before looking again.
pub const NAP_NS: u64 = 10_000_000;
/// What has not come true after this time does not.
const PATIENCE_NS: u64 = 10_000_000_000;
/// Result of a call that is not done.
const PENDING: u64 = u64::MAX;

/// A call: the word, and parameter registers.
pub type Call = (CallWord, [u64; 9]);

/// How a call ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    /// With a status.
    Status(Status),
    /// As misuse.
    Insanity(Insanity),
    /// With another exception.
    Exception(Exception),
    /// It does not.
    Hangs,
    /// In a way that no call ends.
    Other(u64),
}

impl End {
    /// What a result of a call says.
    pub fn of(result: u64) -> Self {
        match handler::raised(result) {
            _ if result == PENDING => Self::Hangs,
            Some((code, subcode)) if code == Exception::Insanity as u64 => {
                Insanity::from_number(subcode).map_or(Self::Other(result), Self::Insanity)
            }
            Some((code, _)) => {
                Exception::from_number(code).map_or(Self::Other(result), Self::Exception)
            }
            None => CallWord(result)
                .status()
                .map_or(Self::Other(result), Self::Status),
        }
    }
}

/// A thread that makes calls, the last of which is looked at.
pub struct Caller {
    handle: Handle,
    progress: &'static Progress,
    last: Entry,
}

/// What a caller shares with whoever looks after it.
struct Progress {
    /// Calls that it has begun.
    begun: AtomicU64,
    result: AtomicU64,
}

/// Waits for something to come true.
pub fn eventually(mut what: impl FnMut() -> bool) -> bool {
    let end = startup::now() + PATIENCE_NS;
    let mut nap = NAP_MIN_NS;
    loop {
        if what() {
            return true;
        }
        if startup::now() > end {
            return false;
        }
        thread::sleep(nap);
        nap = (2 * nap).min(NAP_NS);
    }
}

/// Parameters of a call without messages.
pub fn plain(entry: Entry, parameters: &[u64]) -> Call {
    let mut registers = [0; 9];
    registers[..parameters.len()].copy_from_slice(parameters);
    (CallWord(entry as u64), registers)
}

impl Caller {
    /// Starts a thread that makes these calls; one that raises an exception returns.
    pub fn new(calls: Vec<Call>) -> Result<Self, Status> {
        Self::with(handler::install, calls)
    }

    /// As [`new`](Self::new), with handlers that `install` installs.
    pub fn with(install: fn(), calls: Vec<Call>) -> Result<Self, Status> {
        let progress: &'static Progress = Box::leak(Box::new(Progress {
            begun: AtomicU64::new(0),
            result: AtomicU64::new(PENDING),
        }));
        let last = calls.last().and_then(|(word, _)| entry_of(*word));
        let handle = thread::spawn(move || {
            install();
            let mut end = PENDING;
            for (word, registers) in calls {
                progress.begun.fetch_add(1, Relaxed);
                // SAFETY: what the kernel writes lands in memory that is there for good.
                end = unsafe { handler::call(word.0, registers) };
            }
            progress.result.store(end, Relaxed);
        })?;
        Ok(Self {
            handle,
            progress,
            last: last.unwrap_or(Entry::thread_self),
        })
    }

    /// The thread.
    pub fn thread(&self) -> &'static Thread {
        self.handle.thread()
    }

    /// Stops it for a moment; its registers.
    pub fn registers(&self) -> Registers {
        let mut state = self.thread().state(None);
        state.flags &= !ThreadFlags::STOPPED.bits();
        // SAFETY: the state is the thread's own.
        unsafe { self.thread().set_state(Some(&state), None, None, None) };
        state.registers
    }

    /// Waits until it sleeps in its last call, or what that turns into: stops it each time, and lets it go
    /// on.
    pub fn asleep_in(&self, now: Entry) -> bool {
        let asleep = eventually(|| {
            let registers = self.registers();
            registers.rip == GATE && entry_of(CallWord(registers.rax)) == Some(now)
        });
        thread::sleep(NAP_MIN_NS);
        asleep
    }

    /// Waits until it sleeps in its last call.
    pub fn asleep(&self) -> bool {
        self.asleep_in(self.last)
    }

    /// Waits until it has let go of a mutex, which it locks in its first call, to sleep in `cond_wait`. To
    /// stop it would end that.
    pub fn asleep_without(&self, mutex: &Mutex) -> bool {
        let begun = eventually(|| self.begun() > 1);
        mutex.lock();
        mutex.unlock();
        begun
    }

    /// Calls that it has begun.
    pub fn begun(&self) -> u64 {
        self.progress.begun.load(Relaxed)
    }

    /// How its last call has ended by now.
    pub fn end_now(&self) -> End {
        End::of(self.progress.result.load(Relaxed))
    }

    /// How its last call ends.
    pub fn end(&self) -> End {
        eventually(|| self.end_now() != End::Hangs);
        self.end_now()
    }

    /// Stops and unmakes the thread, wherever it is.
    pub fn destroy(self) {
        if self.end_now() == End::Hangs {
            self.handle.destroy();
        } else {
            self.handle.join();
        }
    }
}

/// The entry point that a call word names.
fn entry_of(word: CallWord) -> Option<Entry> {
    Entry::from_number(word.number())
}
