//! TLB shootdown under loom: a page is given to somebody else while another CPU runs user code that has it
//! mapped.
//!
//! [`InUser`] is the kernel's own text, with loom's atomics. The rest is a model of `sched.rs` and of the
//! hardware: a CPU remembers the page's entry until it flushes, and its user code is at most a few accesses,
//! so that no kick is needed to end it.

use loom::cell::UnsafeCell;
use loom::model::Builder;
use loom::sync::atomic::{self, AtomicBool, AtomicU32, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;

#[allow(clippy::duplicate_mod, reason = "the same text with other atomics")]
#[path = "in_user.rs"]
mod in_user;

use in_user::InUser;

struct Machine {
    /// The spin lock, and in it the `flush` of the CPU that runs user code.
    flush: Mutex<bool>,
    in_user: InUser,
    /// The entry of the page table: whether the page is mapped.
    mapped: AtomicBool,
    page: UnsafeCell<u32>,
}

// SAFETY: who uses the page is what is tested; loom would see two at a time.
unsafe impl Sync for Machine {}

impl Machine {
    /// The CPU: `prepare_user`, user code, and the entry stub, each time.
    fn run_user(&self, times: usize) {
        let mut remembered = Some(true);
        for _ in 0..times {
            let mut flush = self.flush.lock().unwrap();
            if core::mem::take(&mut *flush) {
                remembered = None;
            }
            self.in_user.set();
            drop(flush);
            if *remembered.get_or_insert_with(|| self.mapped.load(Ordering::Relaxed)) {
                // SAFETY: only reads; whether anybody writes is what is tested.
                assert_eq!(self.page.with(|page| unsafe { *page }), 0);
            }
            // A `mov` of x86.
            self.in_user.0.store(0, Ordering::Release);
        }
    }

    /// The other CPU: removes the entry, `shoot_down`, and uses the page. `keeps_lock`: at levels *none* and
    /// *partial* it has the spin lock all the time.
    fn reuse(&self, keeps_lock: bool) {
        let kept = keeps_lock.then(|| self.flush.lock().unwrap());
        self.mapped.store(false, Ordering::Relaxed);
        match kept {
            Some(mut flush) => {
                *flush = true;
                while self.in_user.is_set() {
                    thread::yield_now();
                }
                self.write();
            }
            None => {
                *self.flush.lock().unwrap() = true;
                while self.uses_stale() {
                    thread::yield_now();
                }
                self.write();
            }
        }
    }

    fn uses_stale(&self) -> bool {
        let flush = self.flush.lock().unwrap();
        *flush && self.in_user.is_set()
    }

    fn write(&self) {
        // SAFETY: as above.
        self.page.with_mut(|page| unsafe { *page = 1 });
    }
}

fn no_cpu_goes_on_using_a_page(keeps_lock: bool) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(4);
    builder.check(move || {
        let machine = Arc::new(Machine {
            flush: Mutex::new(false),
            in_user: InUser(AtomicU32::new(0)),
            mapped: AtomicBool::new(true),
            page: UnsafeCell::new(0),
        });
        let other = machine.clone();
        let user = thread::spawn(move || other.run_user(2));
        machine.reuse(keeps_lock);
        user.join().unwrap();
    });
}

#[test]
fn no_cpu_goes_on_using_a_page_that_was_taken_away() {
    no_cpu_goes_on_using_a_page(true);
}

#[test]
fn no_cpu_goes_on_using_a_page_at_level_full() {
    no_cpu_goes_on_using_a_page(false);
}
