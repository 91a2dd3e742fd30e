//! The owner's word under loom, which runs every order of the threads' steps, and every value that the
//! memory orderings let a load have.
//!
//! The word is the kernel's own text, with loom's atomics. What surrounds it is a model: the core lock with
//! the queue in it, threads that sleep by a condition variable, and a cell for all of the kernel's state.

use std::collections::VecDeque;

use loom::cell::UnsafeCell;
use loom::model::Builder;
use loom::sync::atomic::{self, AtomicU32};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

#[allow(clippy::duplicate_mod, reason = "the same text with other atomics")]
#[path = "owner.rs"]
mod owner;

use owner::Owner;

/// How a thread gives the mutex up.
#[derive(Clone, Copy)]
enum Release {
    /// `release_kernel`: at the end of a call.
    End,
    /// `release_kernel_in`: it waits for something else.
    Wait,
}

struct Machine {
    owner: Owner,
    /// The core lock: who waits for the mutex, in order.
    waiting: Mutex<VecDeque<u32>>,
    /// Wakes each thread.
    wake: Vec<Condvar>,
    /// The kernel: how often it was used.
    kernel: UnsafeCell<u32>,
}

// SAFETY: the kernel is reached by the owner only; loom would see it otherwise.
unsafe impl Sync for Machine {}

impl Machine {
    fn new(threads: u32) -> Arc<Self> {
        Arc::new(Self {
            owner: Owner(AtomicU32::new(0)),
            waiting: Mutex::new(VecDeque::new()),
            wake: (0..threads).map(|_| Condvar::new()).collect(),
            kernel: UnsafeCell::new(0),
        })
    }

    /// As `take_kernel`. False: the thread was taken out of the queue, and has not got the mutex.
    fn take(&self, id: u32) -> bool {
        assert!(!self.owner.is(id));
        if self.owner.try_take(id) {
            return true;
        }
        let mut waiting = self.waiting.lock().unwrap();
        if let Some(owner) = self.owner.contend(id) {
            assert!(owner != id && (owner as usize) < self.wake.len());
            waiting.push_back(id);
            while waiting.contains(&id) {
                waiting = self.wake[id as usize].wait(waiting).unwrap();
            }
        }
        self.owner.is(id)
    }

    /// Loom sees it if two threads do this at the same time, or one does not see what another did.
    fn use_kernel(&self, id: u32) {
        assert!(self.owner.is(id));
        // SAFETY: the caller is the owner.
        self.kernel.with_mut(|kernel| unsafe { *kernel += 1 });
    }

    fn release(&self, id: u32, how: Release) {
        let released = match how {
            Release::End => self.owner.try_release(id),
            Release::Wait => false,
        };
        if !released {
            let mut waiting = self.waiting.lock().unwrap();
            self.owner.pass_on(id, || {
                let next = waiting.pop_front();
                if let Some(next) = next {
                    self.wake[next as usize].notify_one();
                }
                (next, !waiting.is_empty())
            });
        }
    }

    /// A thread is to wait no more, without the mutex.
    fn take_out(&self, id: u32) {
        let mut waiting = self.waiting.lock().unwrap();
        waiting.retain(|&other| other != id);
        self.wake[id as usize].notify_one();
    }

    /// Everybody has gone: nobody waits or owns, and the kernel was used so often.
    fn check(&self, uses: u32) {
        assert!(self.waiting.lock().unwrap().is_empty());
        assert!(!self.owner.is_contended());
        assert!(self.take(0), "the mutex is free in the end");
        // SAFETY: the caller is the owner.
        assert_eq!(self.kernel.with(|kernel| unsafe { *kernel }), uses);
    }
}

/// Runs all orders with at most so many preemptions. Loom panics at one in which somebody sleeps for ever.
fn model(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(test);
}

/// Threads that each use the kernel, and give it up in all of these ways in turn.
fn contest(threads: u32, preemptions: usize, ways: &'static [Release]) {
    model(preemptions, move || {
        let machine = Machine::new(threads);
        let uses = {
            let machine = machine.clone();
            move |id| {
                for &way in ways {
                    assert!(machine.take(id), "a thread woke without the mutex");
                    machine.use_kernel(id);
                    machine.release(id, way);
                }
            }
        };
        let others: Vec<_> = (1..threads)
            .map(|id| {
                let uses = uses.clone();
                thread::spawn(move || uses(id))
            })
            .collect();
        uses(0);
        for other in others {
            other.join().unwrap();
        }
        machine.check(threads * ways.len() as u32);
    });
}

#[test]
fn two_threads_have_the_mutex_in_turn() {
    contest(2, 3, &[Release::End, Release::End]);
    contest(2, 3, &[Release::Wait, Release::End]);
}

#[test]
fn three_threads_all_get_the_mutex() {
    contest(3, 2, &[Release::End]);
    contest(3, 2, &[Release::Wait]);
}

#[test]
fn who_is_taken_out_leaves_the_mutex_to_others() {
    model(3, || {
        let machine = Machine::new(2);
        assert!(machine.take(0));
        let other = thread::spawn({
            let machine = machine.clone();
            move || {
                while !machine.take(1) {}
                machine.use_kernel(1);
                machine.release(1, Release::End);
            }
        });
        machine.take_out(1);
        machine.use_kernel(0);
        machine.release(0, Release::End);
        other.join().unwrap();
        machine.check(2);
    });
}
