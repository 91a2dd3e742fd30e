//! CPU inheritance: threads that run on time donated by other threads (fluke-api 3.6; Ford and
//! Susarla, OSDI '96).
//!
//! The kernel's own scheduler, by priority, is the root of a tree. A thread without a scheduler
//! port is scheduled by it. Any other runs only while a thread asleep in `thread_schedule` donates
//! to it, at what the donor is entitled to; when it could run and nobody donates, it asks its
//! scheduler port for time. Donors may be scheduled by others in turn.
//!
//! A donation is nothing but the donor's wait: it ends when the donor leaves it, for whatever reason.

use fluke_abi::code::{Status, Wakeup};
use fluke_abi::ipc::{TIME_MAGIC, TimeRequest};

use crate::arena::Id;
use crate::ipc::Port;
use crate::kernel::Kernel;
use crate::lock::scheduler;
use crate::object::Object;
use crate::thread::{Run, Thread, Wait};

/// Most levels of schedulers above a thread that runs.
const LEVELS_MAX: usize = 16;

impl Kernel {
    /// The port that a thread asks for time; `None` if the kernel schedules it.
    fn scheduler_of(&self, id: Id<Thread>) -> Option<Id<Port>> {
        let port = self.threads[id].scheduler?;
        self.ports.get(port).map(|_| port)
    }

    /// The thread that donates to `id` at this moment.
    pub fn donor_of(&self, id: Id<Thread>) -> Option<Id<Thread>> {
        let donor = self.threads[id].donor?;
        let wait = self.threads.get(donor)?.wait()?;
        matches!(wait, Wait::Schedule { target, .. } if target == id).then_some(donor)
    }

    /// The priority at which a thread may run: its own, or that of the donor at the root of its
    /// time. `None`: it may not.
    #[inline]
    pub fn entitlement(&self, id: Id<Thread>) -> Option<u8> {
        let thread = &self.threads[id];
        if thread.scheduler.is_none() {
            return Some(thread.priority);
        }
        self.entitlement_by_donation(id)
    }

    #[inline(never)]
    fn entitlement_by_donation(&self, mut id: Id<Thread>) -> Option<u8> {
        for _ in 0..=LEVELS_MAX {
            if self.scheduler_of(id).is_none() {
                return Some(self.threads[id].priority);
            }
            id = self.donor_of(id)?;
        }
        None
    }

    /// The thread that runs on time donated to `id`: itself, or the last of those that it donates
    /// to. Nobody runs at the end of a chain that is too long.
    fn beneficiary(&self, id: Id<Thread>) -> Option<Id<Thread>> {
        let mut id = id;
        for _ in 0..LEVELS_MAX {
            match self.threads.get(id)?.wait() {
                Some(Wait::Schedule { target, .. }) => id = target,
                _ => return Some(id),
            }
        }
        None
    }

    /// The thread that a donation to `id` would let run.
    pub fn wants_time(&self, id: Id<Thread>) -> Option<Id<Thread>> {
        self.beneficiary(id)
            .filter(|&end| match self.threads[end].run {
                Run::Waiting(wait) => matches!(wait, Wait::Ask(_) | Wait::Time(_)),
                // One whose time was taken away, and which has not yet made way.
                Run::Scheduled => !self.is_asleep(end) && self.entitlement(end).is_none(),
                Run::Stopped => false,
            })
    }

    /// A thread could run but is not entitled to: it asks its scheduler.
    pub fn ask_for_time(&mut self, id: Id<Thread>) {
        let Some(port) = self.scheduler_of(id) else {
            return;
        };
        // A donor that sleeps on the port and whose own target sleeps too may have said that it
        // need not hear of that: its time goes to the next that asks.
        let idle = self.ports[port]
            .donors
            .first(&self.threads)
            .and_then(|donor| {
                let wait = self.threads[donor].wait()?;
                let on_conflict = self.sensitivity(donor) == Some(Wakeup::OnConflict);
                (on_conflict && self.wastes_time(wait)).then_some((donor, wait))
            });
        self.sleep(id, Wait::Ask(port));
        match idle {
            Some((donor, wait)) => {
                self.unqueue(donor, wait);
                let port = port.into();
                self.sleep(donor, Wait::Schedule { target: id, port });
            }
            None => self.announce(port),
        }
    }

    /// Tells the server of a port of a request. If that must itself ask for time, its scheduler is
    /// told next: in a loop, since a row of schedulers can be longer than the stack is deep.
    fn announce(&mut self, port: Id<Port>) {
        if self.ports[port].announced.is_none() {
            let last = self.announcements.unwrap_or(port);
            self.ports[port].announced = Some(last);
            self.announcements = Some(port);
        }
        if self.announcing {
            return;
        }
        self.announcing = true;
        while let Some(port) = self.announcements {
            let next = self.ports[port].announced.take();
            self.announcements = next.filter(|&next| next != port);
            self.wake_server(port);
        }
        self.announcing = false;
    }

    /// What a scheduler receives from a thread that asks.
    pub fn time_request(&mut self, id: Id<Thread>) -> TimeRequest {
        let thread = &mut self.threads[id];
        TimeRequest {
            magic: TIME_MAGIC,
            sched_val: thread.sched_val,
            thread_hash: thread.header().hash,
        }
    }

    /// Whether a donor's wait is for a thread that has no use for the time.
    fn wastes_time(&self, wait: Wait) -> bool {
        let Wait::Schedule { target, .. } = wait else {
            return false;
        };
        self.beneficiary(target)
            .is_none_or(|end| match self.threads[end].run {
                Run::Waiting(wait) => !matches!(wait, Wait::Ask(_) | Wait::Time(_)),
                Run::Scheduled => self.is_asleep(end),
                Run::Stopped => true,
            })
    }

    /// When a donor wants to be woken: a parameter of the call that it sleeps in.
    fn sensitivity(&self, donor: Id<Thread>) -> Option<Wakeup> {
        Wakeup::from_number(self.threads[donor].frame.rdx)
    }

    /// A donation begins: whoever it is for may run.
    pub fn begin_donation(&mut self, donor: Id<Thread>, target: Id<Thread>) {
        self.threads[target].donor = Some(donor);
        if let Some(end) = self.wants_time(target) {
            self.wake(end);
        }
    }

    /// A donation has ended, its donor being no longer asleep in `thread_schedule`: whoever runs on
    /// it makes way, as soon as it has seen that.
    pub fn end_donation(&mut self, target: Id<Thread>) {
        if let Some(end) = self.beneficiary(target)
            && self.threads[end].run == Run::Scheduled
        {
            scheduler().call_attention(self.threads[end].entity);
        }
    }

    /// The caller's time was taken away: it waits for more, and asks for it if its
    /// scheduler does not know that it could run.
    pub fn wait_for_time(&mut self, id: Id<Thread>) {
        match self.scheduler_of(id) {
            Some(port) if self.threads[id].asked => self.sleep(id, Wait::Time(port)),
            Some(_) => self.ask_for_time(id),
            None => {}
        }
    }

    /// Whether a thread sleeps by the clock, or is about to.
    pub fn is_asleep(&self, id: Id<Thread>) -> bool {
        scheduler().is_asleep(self.threads[id].entity)
    }

    /// A thread has no more use for time. Its donor learns of it, if it wanted to.
    pub fn time_unused(&mut self, id: Id<Thread>) {
        if let Some(donor) = self.donor_of(id)
            && self.sensitivity(donor) == Some(Wakeup::OnBlock)
        {
            self.return_time(donor, Status::TimeUnused);
        }
    }

    /// Ends the `thread_schedule` of a donor.
    pub fn return_time(&mut self, donor: Id<Thread>, status: Status) {
        self.threads[donor].complete(status as u64);
        self.wake(donor);
    }
}
