//! Who waits for memory, and who has it.

use fluke_abi::code::Status;
use fluke_abi::entry::Entry;
use fluke_abi::layout::PAGE_SIZE;
use libfluke::exception;
use libfluke::heap;
use libfluke::object::{Mapping, Mutex};
use libfluke::rpc::Server;
use libfluke::space::{Export, READ_WRITE, own_heap};
use libfluke::startup::startup;

use super::{Colony, hold, service, stand_by};

/// Addresses that nothing else uses: exported, and empty at first.
const EMPTY: u64 = 0x31_0000_0000;
/// Where they are mapped.
const VIEW: u64 = 0x32_0000_0000;
/// Pages of them.
const PAGES: u64 = 2;
/// What is in the memory.
const CONTENTS: u64 = 0x1234;

/// Adds them: a manager that has been told of faults and has not yet done anything, a thread that reads
/// from the memory, and one that makes a call with it.
pub fn settle(colony: &mut Colony) -> Result<(), Status> {
    let (pset, keeper) = service()?;
    let size = PAGES * PAGE_SIZE;
    let empty = Export::alloc(EMPTY, size, READ_WRITE, Some(keeper))?;
    empty.map(EMPTY, size, READ_WRITE, &startup().space, VIEW)?;
    colony.settle("a memory manager", Entry::mutex_lock, PAGES, move || {
        let mut buffer = [0; fluke_abi::ipc::ExceptionMessage::WORDS + 1];
        let mut server = Server::new(pset, &mut buffer, &[]);
        let mut provided = [false; PAGES as usize];
        while provided.contains(&false) {
            server.wait();
            let fault = exception::parse(server.words());
            let page = fault.map_or(0, |fault| fault.region_offset / PAGE_SIZE);
            hold();
            // It may hear of the same fault twice.
            if !core::mem::replace(&mut provided[page as usize], true) && provide(page).is_err() {
                return 0;
            }
        }
        server.reply(&[]);
        if stand_by(pset).is_err() {
            return 0;
        }
        PAGES
    })?;
    colony.settle("a page fault", None, CONTENTS, || {
        // SAFETY: the manager provides the memory.
        unsafe { (VIEW as *const u64).read_volatile() }
    })?;
    colony.settle(
        "a fault in a call",
        Entry::mutex_create,
        Status::Success as u64,
        || {
            let mutex = (VIEW + PAGE_SIZE) as *const Mutex;
            // SAFETY: the manager provides the memory, which is for the mutex alone.
            unsafe { (*mutex).create() }.map_or_else(|status| status, |()| Status::Success) as u64
        },
    )
}

/// Puts memory where a page was missing.
fn provide(page: u64) -> Result<(), Status> {
    let memory = heap::pages(PAGE_SIZE).ok_or(Status::NoMemory)?;
    // SAFETY: the page is ours.
    unsafe { (memory as *mut u64).write(CONTENTS) };
    let at = EMPTY + page * PAGE_SIZE;
    own_heap()?.map_with(
        Mapping::alloc()?,
        memory,
        PAGE_SIZE,
        READ_WRITE,
        &startup().space,
        at,
    );
    Ok(())
}
