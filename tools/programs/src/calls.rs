//! Short calls, many times each, for `flukevm run --count`. RPC between spaces is the tour's.

use libfluke::object::Mutex;
use libfluke::{println, sys};

/// Times each call is made.
const TIMES: usize = 64;

static MUTEX: Mutex = Mutex::new();

/// The program.
pub fn main() -> u64 {
    if MUTEX.create().is_err() {
        return crate::FAILED;
    }
    for _ in 0..TIMES {
        // SAFETY: it only returns an address.
        unsafe { sys::thread_self() };
        MUTEX.with(|| ());
    }
    println!("calls: done");
    0
}
