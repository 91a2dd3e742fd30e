//! Pages that can be taken away and come back.
//!
//! The memory is the program's own, at addresses where it is always there. It is mapped, page by page,
//! into a store, from which two regions carry it into two views: one whose keeper, a thread of the
//! program, puts a missing page back, and one whose keeper is dead.

use alloc::boxed::Box;
use core::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

use fluke_abi::code::{Exception, Status};
use fluke_abi::ipc::ExceptionMessage;
use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::state::Prot;
use libfluke::exception;
use libfluke::object::{Mapping, Port, Pset, Ref};
use libfluke::rpc::Server;
use libfluke::space::{Export, READ_WRITE, own_heap};
use libfluke::startup::startup;
use libfluke::{heap, sys, thread};

/// How many.
pub const PAGES: usize = 48;
const BYTES: u64 = PAGES as u64 * PAGE_SIZE;
/// Where nobody ever touches them. All addresses fit the result of a call that raises an exception.
const STORE: u64 = 0x7000_0000;
/// The views.
const VIEWS: [u64; 2] = [0x6000_0000, 0x6800_0000];

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is there, but in no page table.
    Soft,
    /// Its keeper has to provide it.
    Hard,
    /// Its keeper is dead: the thread has to help itself.
    Orphan,
}

impl Fault {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Soft, Self::Hard, Self::Orphan];

    const fn view(self) -> u64 {
        VIEWS[matches!(self, Self::Orphan) as usize]
    }
}

/// What has been heard of a page: faults, and the accesses and offset of the last one.
struct Heard {
    faults: AtomicU64,
    access: AtomicU64,
    offset: AtomicU64,
}

/// The pages.
pub struct Pages {
    memory: u64,
    store: &'static Export,
    mappings: [&'static Mapping; PAGES],
    heard: [Heard; PAGES],
    /// Faults that make no sense.
    odd: AtomicU64,
    /// The keeper is to hold back what it has, and holds something back.
    hold: AtomicBool,
    holds: AtomicBool,
}

/// For the handlers of page faults.
static ALL: AtomicPtr<Pages> = AtomicPtr::new(core::ptr::null_mut());

impl Pages {
    /// Pages that are there, and their keeper.
    pub fn new() -> Result<&'static Self, Status> {
        let memory = heap::pages(BYTES).ok_or(Status::NoMemory)?;
        let pset = Pset::alloc()?;
        let keepers = [Port::in_set(pset, 0)?, Port::in_set(pset, 1)?];
        let mut mappings = [None; PAGES];
        for mapping in &mut mappings {
            *mapping = Some(Mapping::alloc()?);
        }
        let pages: &'static Self = Box::leak(Box::new(Self {
            memory,
            store: own_heap()?,
            mappings: mappings.map(Option::unwrap),
            heard: [const {
                Heard {
                    faults: AtomicU64::new(0),
                    access: AtomicU64::new(0),
                    offset: AtomicU64::new(0),
                }
            }; PAGES],
            odd: AtomicU64::new(0),
            hold: AtomicBool::new(false),
            holds: AtomicBool::new(false),
        }));
        for page in 0..PAGES {
            // SAFETY: the memory is ours. It must be there: nobody else handles faults.
            unsafe { (pages.alias(page) as *mut u64).write_volatile(0) };
            pages.provide(page);
        }
        for (keeper, view) in keepers.into_iter().zip(VIEWS) {
            let region = Export::alloc(STORE, BYTES, READ_WRITE, Some(Ref::to(keeper)?))?;
            region.map(STORE, BYTES, READ_WRITE, &startup().space, view)?;
        }
        keepers[1].destroy();
        ALL.store(core::ptr::from_ref(pages).cast_mut(), Release);
        thread::spawn(move || pages.keep(pset))?;
        Ok(pages)
    }

    /// The address at which a page is always there.
    pub const fn alias(&self, page: usize) -> u64 {
        self.memory + page as u64 * PAGE_SIZE
    }

    /// The address of a page that may have such a fault.
    pub const fn address(&self, page: usize, fault: Fault) -> u64 {
        fault.view() + page as u64 * PAGE_SIZE
    }

    /// The page's words, where they are always there.
    pub fn words(&self, page: usize) -> &'static [AtomicU64] {
        let at = self.alias(page) as *const AtomicU64;
        // SAFETY: the memory is there for good, and all that anybody does with it is done to words.
        unsafe { core::slice::from_raw_parts(at, (BYTES - page as u64 * PAGE_SIZE) as usize / 8) }
    }

    /// Puts a page into the store.
    fn provide(&self, page: usize) {
        let at = STORE + page as u64 * PAGE_SIZE;
        let space = &startup().space;
        let mapping = self.mappings[page];
        self.store
            .map_with(mapping, self.alias(page), PAGE_SIZE, READ_WRITE, space, at);
    }

    /// Makes sure that the next access to a page with a living keeper does not fault.
    pub fn touch(&self, page: usize) {
        let at = self.address(page, Fault::Hard) as *const u64;
        // SAFETY: the page is there.
        unsafe { at.read_volatile() };
    }

    /// Makes the next access to a page fault.
    pub fn spoil(&self, page: usize, fault: Fault) {
        let heard = &self.heard[page];
        heard.faults.store(0, Relaxed);
        heard.access.store(0, Relaxed);
        let mapping = self.mappings[page];
        if fault == Fault::Soft {
            // SAFETY: permissions stay what they are; but what derives from the mapping is dropped.
            unsafe { sys::mapping_protect(mapping.handle(), READ_WRITE.bits()) };
        } else {
            let (region, space) = (self.store.reference(), &startup().space);
            mapping.set(region, 0, 0, READ_WRITE, space, STORE);
        }
    }

    /// Whether there has been just one fault on a spoilt page, or none if it was soft: for such an access,
    /// between these bytes of it. The page is there again in any case.
    pub fn was_mended(
        &self,
        page: usize,
        fault: Fault,
        access: Prot,
        bytes: core::ops::Range<u64>,
    ) -> bool {
        let heard = &self.heard[page];
        let faults = heard.faults.load(Relaxed);
        if fault == Fault::Soft {
            return faults == 0;
        }
        if faults == 0 {
            self.provide(page);
        }
        let offset = heard.offset.load(Relaxed);
        // The exception does not say which access it was.
        let access_fits = fault == Fault::Orphan || heard.access.load(Relaxed) == access.bits();
        faults == 1 && access_fits && bytes.contains(&offset)
    }

    /// How often a page has been missed since it was spoilt.
    pub fn faults(&self, page: usize) -> u64 {
        self.heard[page].faults.load(Relaxed)
    }

    /// Faults that made no sense, so far.
    pub fn odd(&self) -> u64 {
        self.odd.load(Relaxed)
    }

    /// Tells the keeper to hold back what it is asked for next, or to go on.
    pub fn hold(&self, hold: bool) {
        self.hold.store(hold, Release);
    }

    /// Whether the keeper holds a page back.
    pub fn holds(&self) -> bool {
        self.holds.load(Acquire)
    }

    /// There was a fault at this offset: puts the page back.
    fn mend(&self, offset: u64, access: u64) {
        let page = (offset / PAGE_SIZE) as usize;
        let Some(heard) = self.heard.get(page) else {
            self.odd.fetch_add(1, Relaxed);
            return;
        };
        heard.offset.store(offset % PAGE_SIZE, Relaxed);
        heard.access.store(access, Relaxed);
        heard.faults.fetch_add(1, Relaxed);
        self.provide(page);
    }

    fn keep(&self, pset: &'static Pset) {
        let mut buffer = [0; ExceptionMessage::WORDS + 1];
        let mut server = Server::new(pset, &mut buffer, &[]);
        loop {
            server.wait();
            let fault = exception::parse(server.words()).filter(|fault| {
                fault.code == Exception::PageFault as u64
                    && fault.subcode.wrapping_sub(Fault::Hard.view()) == fault.region_offset
            });
            let Some(fault) = fault else {
                self.odd.fetch_add(1, Relaxed);
                continue;
            };
            while self.hold.load(Acquire) {
                self.holds.store(true, Release);
                thread::pause();
            }
            self.holds.store(false, Release);
            self.mend(fault.region_offset, fault.access);
        }
    }
}

/// Puts the page at an address back, if it is one whose keeper is dead. For handlers.
pub fn mend(address: u64) -> bool {
    let offset = address.wrapping_sub(Fault::Orphan.view());
    // SAFETY: null, or pages that are there for good.
    match unsafe { ALL.load(Acquire).as_ref() } {
        Some(pages) if offset < BYTES => {
            pages.mend(offset, 0);
            true
        }
        _ => false,
    }
}
