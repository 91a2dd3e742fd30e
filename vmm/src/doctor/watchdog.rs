//! Work that ends: a thread with a time limit, which is kicked out of `KVM_RUN` by a signal.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Once};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

use super::machine::Broken;

/// How long a probe may take before it counts as not working.
const LIMIT: Duration = Duration::from_secs(2);
/// How long a probe that was told to stop is kicked before it is left behind.
const GRACE: Duration = Duration::from_secs(1);
const KICK_INTERVAL: Duration = Duration::from_millis(5);

extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The signal that kicks a probe: not the one that kicks the vCPUs of a real machine.
fn kick_signal() -> libc::c_int {
    SIGRTMIN() + 1
}

/// Whether the probe has been told to stop.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Whether to stop now.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn request(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A probe on a thread of its own.
#[derive(Debug)]
pub struct Bounded<T> {
    thread: JoinHandle<()>,
    result: Receiver<Result<T, Broken>>,
    stop: Stop,
    started: Instant,
}

impl<T: Send + 'static> Bounded<T> {
    /// Starts `work`. It must look at its [`Stop`] whenever `KVM_RUN` was interrupted.
    pub fn start(
        work: impl FnOnce(&Stop) -> Result<T, Broken> + Send + 'static,
    ) -> Result<Self, Broken> {
        static HANDLER: Once = Once::new();
        // If this fails, so does the kick, and a probe that hangs is left behind.
        HANDLER.call_once(|| {
            let _ = register_signal_handler(kick_signal(), ignore);
        });
        let (sender, result) = mpsc::channel();
        let stop = Stop::default();
        let its_stop = stop.clone();
        let thread = thread::Builder::new()
            .name("doctor".into())
            .spawn(move || {
                let _ = unblock_signal(kick_signal());
                // Nobody listens to a probe that came too late.
                let _ = sender.send(work(&its_stop));
            })
            .map_err(|e| Broken::Host(format!("starting a thread: {e}")))?;
        Ok(Self {
            thread,
            result,
            stop,
            started: Instant::now(),
        })
    }

    /// Waits for the result, or until the usual time has passed since the start.
    pub fn wait(self) -> Result<T, Broken> {
        self.wait_for(LIMIT)
    }

    /// The same with another limit.
    pub fn wait_for(self, limit: Duration) -> Result<T, Broken> {
        let left = limit.saturating_sub(self.started.elapsed());
        match self.result.recv_timeout(left) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Broken::Host("the probe failed within flukevm".into()));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        self.stop.request();
        // A kick that comes just before KVM_RUN is lost, so there are many.
        let end = Instant::now() + GRACE;
        while Instant::now() < end && !self.thread.is_finished() {
            if self.thread.kill(kick_signal()).is_err() {
                break;
            }
            thread::sleep(KICK_INTERVAL);
        }
        Err(Broken::Timeout(limit))
    }
}

/// Runs `work` within the usual time.
pub fn bounded<T: Send + 'static>(
    work: impl FnOnce(&Stop) -> Result<T, Broken> + Send + 'static,
) -> Result<T, Broken> {
    Bounded::start(work)?.wait()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_hangs_is_told_to_stop() {
        let result = bounded(|stop| {
            while !stop.requested() {
                thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        });
        assert!(matches!(result, Err(Broken::Timeout(_))), "{result:?}");
    }

    #[test]
    fn work_that_panics_is_a_failure() {
        let result = bounded::<()>(|_| panic!("as it should"));
        assert!(matches!(result, Err(Broken::Host(_))), "{result:?}");
    }
}
