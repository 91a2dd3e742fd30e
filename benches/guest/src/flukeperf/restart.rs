//! A reliable request in which a page is missing, of the client's message or of the server's buffer: one that the
//! kernel finds further up (*soft*), or one that a memory manager in user mode provides (*hard*).

use alloc::format;

use fluke_abi::code::Status;
use fluke_abi::ipc::{ExceptionMessage, WORD_SIZE};
use fluke_abi::layout::PAGE_SIZE;
use libfluke::object::{Mapping, Port, Pset, Ref};
use libfluke::rpc::{self, Server};
use libfluke::space::{Error, Export, READ_WRITE, own_heap};
use libfluke::{heap, startup, thread};

use crate::meter::Meter;

/// Words of the message.
const WORDS: usize = 64;
/// Where a page is mapped that is never there by itself: the window, and the view of it.
const WINDOW: u64 = 0x36_0000_0000;
const VIEW: u64 = 0x37_0000_0000;

/// A page that can be taken away.
struct Page {
    memory: u64,
    /// Window in which a keeper puts the page; none for soft faults.
    window: Option<(&'static Export, &'static Mapping)>,
    view: &'static Mapping,
}

impl Page {
    fn new(keeper: Option<&Ref>) -> Result<Self, Error> {
        let memory = heap::pages(PAGE_SIZE).ok_or(Error::NoMemory)?;
        // SAFETY: the memory was just allocated.
        unsafe { (memory as *mut u64).write_volatile(0) };
        let window = match keeper {
            Some(_) => Some((
                Export::alloc(WINDOW, PAGE_SIZE, READ_WRITE, keeper)?,
                Mapping::alloc()?,
            )),
            None => None,
        };
        Ok(Self {
            memory,
            window,
            view: Mapping::alloc()?,
        })
    }

    /// Nobody has a translation of it any more; nor the window the page, if there is one.
    fn take_away(&self) {
        self.view.destroy();
        let _ = self.view.create();
        let here = &startup::startup().space;
        match self.window {
            Some((window, inner)) => {
                inner.destroy();
                let _ = inner.create();
                window.map_with(self.view, WINDOW, PAGE_SIZE, READ_WRITE, here, VIEW);
            }
            None => {
                if let Ok(heap) = own_heap() {
                    heap.map_with(self.view, self.memory, PAGE_SIZE, READ_WRITE, here, VIEW);
                }
            }
        }
    }
}

/// Measures all.
pub fn all(meter: &mut Meter) -> Result<(), Error> {
    let only = meter.options().only;
    if !only.starts_with("restart-") && !"restart-".starts_with(only) {
        return Ok(());
    }
    // The memory manager: puts the page into the window when it is asked.
    let keepers = Pset::alloc()?;
    let keeper = Ref::to(Port::in_set(keepers, 0)?)?;
    let soft = Page::new(None)?;
    let hard = Page::new(Some(keeper))?;
    let (memory, inner) = (hard.memory, hard.window.map(|(_, inner)| inner));
    thread::spawn(move || {
        let mut buffer = [0; ExceptionMessage::WORDS + 1];
        let mut server = Server::new(keepers, &mut buffer, &[]);
        loop {
            server.wait();
            if let (Ok(heap), Some(inner)) = (own_heap(), inner) {
                let here = &startup::startup().space;
                heap.map_with(inner, memory, PAGE_SIZE, READ_WRITE, here, WINDOW);
            }
        }
    })?;
    let present = heap::pages(PAGE_SIZE).ok_or(Error::NoMemory)?;
    let here = heap::pages(PAGE_SIZE).ok_or(Error::NoMemory)?;
    for page in [present, here] {
        // SAFETY: the memory was just allocated.
        unsafe { (page as *mut u64).write_volatile(0) };
    }
    case(meter, "none", present, here, || {})?;
    for (kind, page) in [("soft", &soft), ("hard", &hard)] {
        case(meter, &format!("client-{kind}"), VIEW, here, || {
            page.take_away();
        })?;
        case(meter, &format!("server-{kind}"), present, VIEW, || {
            page.take_away();
        })?;
        page.view.destroy();
        let _ = page.view.create();
    }
    Ok(())
}

/// The client's message lies at one address, the server's buffer at another.
fn case(
    meter: &mut Meter,
    name: &str,
    message: u64,
    buffer: u64,
    prepare: impl FnMut(),
) -> Result<(), Status> {
    let pset = Pset::alloc()?;
    let port = Ref::to(Port::in_set(pset, 0)?)?;
    // SAFETY: the page is there, or its keeper provides it, and only messages use it.
    let words = |at: u64| unsafe {
        core::slice::from_raw_parts_mut(at as *mut u64, PAGE_SIZE as usize / WORD_SIZE as usize)
    };
    let buffer = words(buffer);
    let server = thread::spawn(move || {
        let mut server = Server::new(pset, buffer, &[]);
        loop {
            server.reply_and_wait(&[1]);
        }
    })?;
    let message = &words(message)[..WORDS];
    meter.prepared(&format!("restart-{name}"), 1, prepare, || {
        let _ = rpc::rpc(port, message, &[], &mut [0]);
    });
    server.destroy();
    Ok(())
}
