//! Memory that is touched one byte at a time, in order, by a program in a space of its own whose memory manager,
//! in user mode in another, provides it page by page when it is touched.
//!
//! Options: `count[=N]`, `batches=N` passes, `bytes=N` of memory ([`crate::meter`]).

use alloc::vec::Vec;
use core::cell::Cell;

use fluke_abi::ipc::ExceptionMessage;
use fluke_abi::layout::PAGE_SIZE;
use libfluke::exception;
use libfluke::object::{Mapping, Port, Pset, Ref};
use libfluke::rpc::{self, Server};
use libfluke::space::{ChildHeap, Error, Export, READ_WRITE, own_heap};
use libfluke::{exit, heap, println, startup, thread};

use crate::meter::{Meter, Options, cycles};
use crate::neighbour;

/// As in OSDI '99.
const BYTES: u64 = 16 << 20;
/// Where the memory appears in the manager's space, page by page.
const WINDOW: u64 = 0x34_0000_0000;
/// Where the other space sees it.
const VIEW: u64 = 0x35_0000_0000;

/// The program.
pub fn main() -> u64 {
    if startup::args().nth(1) == Some("toucher") {
        return toucher();
    }
    let options = match Options::of_program() {
        Ok(options) => options,
        Err(word) => {
            println!("memtest: `{word}`; options are count[=N], batches=N, bytes=N");
            return crate::USAGE;
        }
    };
    match run(options) {
        Ok(()) => 0,
        Err(error) => {
            println!("memtest: {error}");
            crate::FAILED
        }
    }
}

/// The other space: touches so many bytes, and says how many cycles that took.
fn toucher() -> u64 {
    let Ok(pset) = neighbour::register() else {
        return crate::FAILED;
    };
    let mut buffer = [0; 2];
    let mut server = Server::new(pset, &mut buffer, &[]);
    let mut reply = [0];
    loop {
        server.reply_and_wait(&reply);
        let start = cycles();
        for byte in 0..server.words()[0] {
            // SAFETY: the parent has mapped that many bytes there, and nobody else uses them.
            unsafe { ((VIEW + byte) as *mut u8).write_volatile(byte as u8) };
        }
        reply = [cycles() - start];
    }
}

/// Provides pages as faults ask for them.
struct Manager {
    memory: u64,
    given: Vec<Cell<Option<&'static Mapping>>>,
    /// Mappings that are not in use.
    spare: Vec<&'static Mapping>,
    faults: u64,
}

impl Manager {
    fn new(bytes: u64) -> Result<Self, Error> {
        let pages = bytes / PAGE_SIZE;
        let memory = heap::pages(bytes).ok_or(Error::NoMemory)?;
        for page in 0..pages {
            // So that it comes from this program, and not from whoever manages this one's memory.
            // SAFETY: the memory was just allocated.
            unsafe { ((memory + page * PAGE_SIZE) as *mut u64).write_volatile(0) };
        }
        Ok(Self {
            memory,
            given: (0..pages).map(|_| Cell::new(None)).collect(),
            spare: Vec::new(),
            faults: 0,
        })
    }

    fn provide(&mut self, offset: u64) -> Result<(), Error> {
        let page = offset / PAGE_SIZE;
        let Some(given) = self.given.get(page as usize) else {
            return Err(Error::NoMemory);
        };
        // A keeper may hear of the same fault twice.
        if given.get().is_some() {
            return Ok(());
        }
        let mapping = match self.spare.pop() {
            Some(mapping) => {
                mapping.create()?;
                mapping
            }
            None => Mapping::alloc()?,
        };
        let at = page * PAGE_SIZE;
        let here = &startup::startup().space;
        own_heap()?.map_with(
            mapping,
            self.memory + at,
            PAGE_SIZE,
            READ_WRITE,
            here,
            WINDOW + at,
        );
        given.set(Some(mapping));
        self.faults += 1;
        Ok(())
    }

    /// Takes all back.
    fn reclaim(&mut self) {
        for given in &self.given {
            if let Some(mapping) = given.take() {
                mapping.destroy();
                self.spare.push(mapping);
            }
        }
    }
}

/// `[RECLAIM, 0]` to the manager's own port: takes all back, and answers with the faults so far.
const RECLAIM: u64 = 0x200;

fn manage(pset: &Pset, bytes: u64) -> Result<(), Error> {
    let mut manager = Manager::new(bytes)?;
    let mut buffer = [0; ExceptionMessage::WORDS + 1];
    let mut server = Server::new(pset, &mut buffer, &[]);
    let mut reply = [0];
    loop {
        server.reply_and_wait(&reply);
        match (exception::parse(server.words()), server.words()) {
            (Some(fault), _) => manager.provide(fault.region_offset)?,
            (None, &[RECLAIM, ..]) => {
                manager.reclaim();
                reply = [manager.faults];
            }
            _ => {}
        }
    }
}

fn run(options: Options) -> Result<(), Error> {
    let mut meter = Meter::new(options);
    meter.measure("nothing", 1, || ());
    let bytes = match options.bytes {
        0 => BYTES,
        bytes => bytes.next_multiple_of(PAGE_SIZE),
    };
    let pset = Pset::alloc()?;
    let keeper = Ref::to(Port::in_set(pset, 0)?)?;
    let window = Export::alloc(WINDOW, bytes, READ_WRITE, Some(keeper))?;
    thread::spawn(move || {
        if let Err(error) = manage(pset, bytes) {
            println!("memtest: the manager: {error}");
            exit(crate::FAILED);
        }
    })?;
    let views = [(window, WINDOW, bytes, VIEW)];
    let views = views.map(|(export, from, size, at)| (export as &Export, from, size, at));
    let toucher =
        neighbour::start_with(b"memtest\0toucher\0", ChildHeap::Own(1 << 16), &views, &[])?;

    let pages = bytes / PAGE_SIZE;
    let mut samples = Vec::new();
    let mut faults = 0;
    // The first pass also makes page tables.
    for pass in 0..=options.batches {
        let mut seen = [0];
        let _ = rpc::call(keeper, &[RECLAIM, 0], &mut seen);
        faults = seen[0] - faults;
        let counted = options.count && pass > 0;
        if counted {
            meter.tell(fluke_abi::bench::News::Begin, pages, "page");
        }
        let mut took = [0];
        let _ = rpc::rpc(toucher, &[bytes, 0], &[], &mut took);
        if counted {
            meter.tell(fluke_abi::bench::News::End, pages, "page");
        }
        if pass > 0 {
            samples.push(took[0]);
        }
    }
    if !options.count {
        meter.report("page", pages, &samples);
        println!("figure faults {faults}");
    }
    meter.done();
    Ok(())
}
