//! Sleeping and waking: what threads wait for, other than their turn on a CPU.

use fluke_abi::probe::{Probe, WAIT_OTHER};

use crate::arena::Id;
use crate::kernel::Kernel;
use crate::lock::scheduler;
use crate::mutant::mutant;
use crate::probe::probe;
use crate::thread::{Run, Thread, Wait};

impl Kernel {
    /// Lets a thread that waits for nothing run: hands it to the scheduler, or to whoever schedules it.
    pub fn make_ready(&mut self, id: Id<Thread>) {
        let thread = &self.threads[id];
        let entity = thread.entity;
        if thread.run == Run::Scheduled {
            return;
        }
        let Some(priority) = self.entitlement(id) else {
            return self.ask_for_time(id);
        };
        self.threads[id].run = Run::Scheduled;
        scheduler().make_ready(entity, priority);
    }

    /// Puts a thread to sleep, which is in no queue: one that is off, or the caller, which is to make
    /// way.
    #[inline(always)]
    pub fn sleep(&mut self, id: Id<Thread>, wait: Wait) {
        self.fall_asleep(id, wait);
        probe::<{ Probe::Wait as usize }>(|| {
            let thread = &self.threads[id];
            let other = thread.exception.is_some()
                || matches!(wait, Wait::Ask(_) | Wait::Time(_) | Wait::Forever);
            (thread, if other { WAIT_OTHER } else { 0 })
        });
    }

    // What it waits for is known where it is called, most often.
    #[inline(always)]
    fn fall_asleep(&mut self, id: Id<Thread>, wait: Wait) {
        let threads = &mut self.threads;
        let thread = &mut threads[id];
        thread.run = Run::Waiting(wait);
        let donated = thread.donor.is_some();
        match wait {
            Wait::Mutex(on) => self.mutexes[on].waiters.push(threads, id),
            Wait::Cond(on) => self.conds[on].waiters.push(threads, id),
            Wait::Port(on) => self.ports[on].clients.push(threads, id),
            Wait::Pset(on) => self.psets[on].servers.push(threads, id),
            Wait::Stop(on) => {
                let mut stoppers = core::mem::take(&mut threads[on].stoppers);
                stoppers.push(threads, id);
                threads[on].stoppers = stoppers;
            }
            Wait::Schedule { target, port } => {
                self.ports[port].donors.push(threads, id);
                return self.begin_donation(id, target);
            }
            Wait::Ask(on) => return self.ports[on].clients.push(threads, id),
            Wait::Time(on) => return self.ports[on].wanting.push(threads, id),
            Wait::Reply(_)
            | Wait::Send(_)
            | Wait::Receive(_)
            | Wait::Over(_)
            | Wait::Ack(_)
            | Wait::Forever => {}
        }
        if donated {
            self.rest(id);
        }
    }

    /// A sleeping thread waits for something else.
    pub fn wait_instead(&mut self, id: Id<Thread>, wait: Wait) {
        if let Some(old) = self.threads[id].wait() {
            self.unqueue(id, old);
        }
        self.sleep(id, wait);
    }

    /// A thread begins to sleep: it does not want time now.
    pub fn rest(&mut self, id: Id<Thread>) {
        if self.threads[id].donor.is_some() {
            self.threads[id].asked = false;
            self.time_unused(id);
        }
    }

    /// Takes a thread out of the queue of what it waits for.
    pub fn unqueue(&mut self, id: Id<Thread>, wait: Wait) {
        let threads = &mut self.threads;
        match wait {
            Wait::Mutex(on) => self.mutexes[on].waiters.remove(threads, id),
            Wait::Cond(on) => self.conds[on].waiters.remove(threads, id),
            Wait::Port(on) => self.ports[on].clients.remove(threads, id),
            Wait::Pset(on) => self.psets[on].servers.remove(threads, id),
            Wait::Stop(on) => {
                let mut stoppers = core::mem::take(&mut threads[on].stoppers);
                stoppers.remove(threads, id);
                threads[on].stoppers = stoppers;
            }
            Wait::Schedule { target, port } => {
                self.ports[port].donors.remove(threads, id);
                self.end_donation(target);
            }
            Wait::Ask(on) => self.ports[on].clients.remove(threads, id),
            Wait::Time(on) => self.ports[on].wanting.remove(threads, id),
            Wait::Reply(_)
            | Wait::Send(_)
            | Wait::Receive(_)
            | Wait::Over(_)
            | Wait::Ack(_)
            | Wait::Forever => {}
        }
    }

    /// Wakes a sleeping thread: it looks at its registers again.
    pub fn wake(&mut self, id: Id<Thread>) {
        if let Run::Waiting(wait) = self.threads[id].run {
            self.unqueue(id, wait);
            self.make_ready(id);
        }
    }

    /// Takes a thread out of whatever it waits for, at a stage boundary: its registers already name the
    /// call that does the rest. It is then in no queue, unless it is on a CPU; the caller says what
    /// comes next.
    pub fn interrupt_wait(&mut self, id: Id<Thread>) {
        let thread = &mut self.threads[id];
        thread.exception = None;
        let off = scheduler().take_out(thread.entity);
        match thread.run {
            Run::Waiting(wait) => {
                if !(mutant!(waiter_left) && matches!(wait, Wait::Port(_))) {
                    self.unqueue(id, wait);
                }
                self.threads[id].run = Run::Stopped;
            }
            Run::Scheduled if off => thread.run = Run::Stopped,
            Run::Scheduled | Run::Stopped => {}
        }
        if let Some(pset) = self.threads[id].notified.take() {
            self.notify_pset(pset);
        }
    }

    /// Stops a thread if it is not on a CPU. Otherwise asks it to stop itself, and says `false`.
    pub fn stop(&mut self, id: Id<Thread>) -> bool {
        self.interrupt_wait(id);
        let thread = &mut self.threads[id];
        if thread.run == Run::Scheduled {
            thread.stop_requested = true;
            // By now it may sleep by the clock, for which it does not need the kernel's state.
            scheduler().rouse(thread.entity);
            return false;
        }
        self.time_unused(id);
        true
    }

    /// The caller looks at what others want of it: to stop, to make do without its time, to take an
    /// exception.
    pub fn attend(&mut self, id: Id<Thread>) {
        let thread = &mut self.threads[id];
        let entity = thread.entity;
        if thread.stop_requested {
            self.interrupt_wait(id);
            self.threads[id].run = Run::Stopped;
            self.time_unused(id);
            return self.stopped(id);
        }
        if thread.run == Run::Scheduled && !self.is_asleep(id) {
            match self.entitlement(id) {
                Some(priority) => scheduler().set_priority(entity, priority),
                None => self.wait_for_time(id),
            }
        }
        self.deliver_pending(id);
    }

    /// A thread that was asked to stop has done so, or is gone.
    pub fn stopped(&mut self, id: Id<Thread>) {
        self.threads[id].stop_requested = false;
        while let Some(stopper) = self.threads[id].stoppers.first(&self.threads) {
            self.wake(stopper);
        }
    }
}
