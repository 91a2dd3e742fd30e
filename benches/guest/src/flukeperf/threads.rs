//! Many threads asleep: what the kernel holds for each of them, the host sees.

use fluke_abi::bench::News;
use fluke_abi::code::Status;
use fluke_abi::layout::PAGE_SIZE;
use libfluke::object::{Mutex, Pset, Thread};
use libfluke::rpc::Server;
use libfluke::{heap, startup, thread};

use crate::meter::Meter;

static HELD: Mutex = Mutex::new();
static IDLE: Pset = Pset::new();

/// How long all of them take to fall asleep at most, nanoseconds.
const SETTLE_NS: u64 = 300_000_000;

/// First function of a thread that waits for a mutex.
unsafe extern "C" fn waits_for_mutex() -> ! {
    HELD.lock();
    thread::sleep_forever()
}

/// First function of a thread that waits for messages.
unsafe extern "C" fn waits_for_message() -> ! {
    let mut buffer = [0; 4];
    Server::new(&IDLE, &mut buffer, &[]).wait();
    thread::sleep_forever()
}

/// Puts so many threads to sleep in each of two ways. The host is told before and after.
pub fn sleep(meter: &Meter, threads: u64) -> Result<(), Status> {
    HELD.create()?;
    IDLE.create()?;
    HELD.lock();
    let kinds: [(&str, unsafe extern "C" fn() -> !); 2] = [
        ("mutex_lock", waits_for_mutex),
        ("ipc_wait_receive", waits_for_message),
    ];
    for (name, main) in kinds {
        let stacks = heap::pages(threads * PAGE_SIZE).ok_or(Status::NoMemory)?;
        let objects = heap::pages(threads * size_of::<Thread>() as u64).ok_or(Status::NoMemory)?;
        for page in 0..threads {
            // All that is the program's own is there before.
            // SAFETY: the memory was just allocated.
            unsafe { ((stacks + page * PAGE_SIZE) as *mut u64).write_volatile(0) };
        }
        // SAFETY: as above.
        unsafe { (objects as *mut u8).write_bytes(0, threads as usize * size_of::<Thread>()) };
        meter.tell(News::Begin, threads, name);
        for number in 0..threads {
            let at = objects + number * size_of::<Thread>() as u64;
            // SAFETY: memory for an object, used for nothing else.
            let thread = unsafe { Thread::at(at) };
            thread.create()?;
            let top = stacks + (number + 1) * PAGE_SIZE - 8;
            // SAFETY: the stack is its own, and the function takes nothing.
            unsafe {
                thread.start(
                    &startup::startup().space,
                    at,
                    main as *const () as u64,
                    top,
                    0,
                );
            }
        }
        thread::sleep(SETTLE_NS);
        meter.tell(News::End, threads, name);
    }
    meter.tell(News::Done, 0, "");
    Ok(())
}
