//! The tour's own server thread: parent and keeper of its children, and manager of the memory of
//! the section on paging.

use alloc::boxed::Box;
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

use fluke_abi::ipc::ExceptionMessage;
use fluke_abi::layout::PAGE_SIZE;
use libfluke::exception::{self, Describe};
use libfluke::object::{Mapping, Port, Pset, Ref};
use libfluke::parent::{EXIT, REGISTER};
use libfluke::rpc::Server;
use libfluke::space::{Export, READ_WRITE, own_heap};
use libfluke::{exit, heap, println, startup, thread};

use super::Trouble;

/// Alias of the port that children know as their parent's.
const PARENT: u64 = 1;
/// Alias of the port that keeps the demand-paged region.
const DEMAND: u64 = 2;

/// Pages of the demand-paged region.
pub const PAGES: u64 = 64;
/// Where the region lies in this program's space. Only the server thread puts memory there, and
/// nobody ever touches it at these addresses.
const WINDOW: u64 = 0x30_0000_0000;

/// Messages about pages that were not there.
pub static HARD_FAULTS: AtomicU64 = AtomicU64::new(0);
/// Pages provided.
pub static PROVIDED: AtomicU64 = AtomicU64::new(0);

/// The child's port, once it has registered.
static CHILD_PORT: Ref = Ref::new();
static REGISTERED: AtomicU64 = AtomicU64::new(0);

/// What others need to know of the server.
#[derive(Clone, Copy)]
pub struct Handle {
    /// The port for children.
    pub parent: &'static Ref,
    /// The demand-paged region.
    pub demand: &'static Export,
}

/// Address of the demand-paged region, for [`Export::map`].
pub const fn demand_start() -> u64 {
    WINDOW
}

/// Starts the thread.
pub fn start() -> Result<Handle, Trouble> {
    let pset = Pset::alloc()?;
    let parent = Ref::to(Port::in_set(pset, PARENT)?)?;
    let keeper = Ref::to(Port::in_set(pset, DEMAND)?)?;
    let demand = Export::alloc(WINDOW, PAGES * PAGE_SIZE, READ_WRITE, Some(keeper))?;
    CHILD_PORT.create()?;
    let slot = Ref::alloc()?;
    thread::spawn(move || serve(pset, slot))?;
    Ok(Handle { parent, demand })
}

/// The child's port; waits for it to register.
pub fn child_port() -> &'static Ref {
    while REGISTERED.load(Acquire) == 0 {
        thread::pause();
    }
    &CHILD_PORT
}

fn serve(pset: &'static Pset, slot: &'static Ref) {
    let mut provided = Box::new([false; PAGES as usize]);
    let mut buffer = [0; ExceptionMessage::WORDS + 1];
    let slots = [slot];
    let mut server = Server::new(pset, &mut buffer, &slots);
    loop {
        let request = server.wait();
        let raised = exception::parse(server.words());
        match (request.alias, raised, server.words()) {
            (DEMAND, Some(fault), _) => {
                HARD_FAULTS.fetch_add(1, Relaxed);
                let page = fault.region_offset / PAGE_SIZE;
                if !provided[page as usize] {
                    provided[page as usize] = true;
                    if provide(page).is_err() {
                        println!("tour: no memory for page {page}");
                        exit(crate::FAILED);
                    }
                }
            }
            (PARENT, Some(raised), _) => {
                println!("  FAILED  tour: child: {}", Describe(&raised));
                exit(crate::FAILED);
            }
            (PARENT, None, &[REGISTER, ..]) if request.refs == 1 => {
                CHILD_PORT.copy_from(slot);
                REGISTERED.store(1, Release);
            }
            (PARENT, None, &[EXIT, status, ..]) => {
                println!("  FAILED  tour: child ended with status {status}");
                exit(crate::FAILED);
            }
            _ => {}
        }
    }
}

/// Puts a fresh page into the window.
fn provide(page: u64) -> Result<(), Trouble> {
    let memory = heap::pages(PAGE_SIZE).ok_or(Trouble::NoMemory)?;
    let mapping = Mapping::alloc()?;
    let at = WINDOW + page * PAGE_SIZE;
    own_heap()?.map_with(
        mapping,
        memory,
        PAGE_SIZE,
        READ_WRITE,
        &startup::startup().space,
        at,
    );
    PROVIDED.fetch_add(1, Relaxed);
    Ok(())
}
