//! Child spaces, made of the program's own memory.
//!
//! There is no call to allocate memory. A program hands memory on by exporting ranges of its own
//! space ([`Export`]) and mapping parts of them into others, so every child hangs below its parent
//! in the hierarchy that the kernel walks to resolve a page fault.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicPtr, Ordering};

use fluke_abi::boot::MODULE_NAME_BYTES;
use fluke_abi::code::Status;
use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::object::Type;
use fluke_abi::state::Prot;

use crate::elf::Program;
use crate::heap;
use crate::object::{self, Mapping, Ref, Region, Target, Task, Thread};
use crate::startup::{self, File, Startup};

/// Reading and writing.
pub const READ_WRITE: Prot = Prot::READ.union(Prot::WRITE);
/// Reading and executing.
pub const READ_EXECUTE: Prot = Prot::READ.union(Prot::EXECUTE);

/// Why a child could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The kernel's pool is empty, or the program's own memory is.
    NoMemory,
    /// The program image cannot be loaded.
    BadImage(&'static str),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMemory => write!(f, "out of memory"),
            Self::BadImage(why) => write!(f, "bad program image: {why}"),
        }
    }
}

impl From<Status> for Error {
    fn from(_: Status) -> Self {
        // The only error of the `create` calls, which are all that this module makes.
        Self::NoMemory
    }
}

/// A range of the program's own space, ready to be mapped elsewhere.
#[derive(Debug)]
pub struct Export {
    region: Region,
    reference: Ref,
    start: u64,
    size: u64,
}

impl Export {
    /// Exports `size` bytes from `start`, whole pages, for good. Faults on memory that is not
    /// there go to the port behind `keeper`.
    pub fn alloc(
        start: u64,
        size: u64,
        prot: Prot,
        keeper: Option<&Ref>,
    ) -> Result<&'static Self, Status> {
        let size = size.next_multiple_of(PAGE_SIZE);
        let export: &'static Self = Box::leak(Box::new(Self {
            region: Region::new(),
            reference: Ref::new(),
            start,
            size,
        }));
        export.region.create()?;
        export.reference.create()?;
        export
            .region
            .set(start, size, prot, &startup::startup().space, keeper);
        export.region.point(&export.reference);
        Ok(export)
    }

    /// The objects in `size` bytes of the memory from `start`: type and address.
    pub fn objects(&self, start: u64, size: u64) -> Vec<(Type, u64)> {
        self.region.objects(start - self.start, size)
    }

    /// Unmakes all objects in ranges of the memory, given by address and bytes; says how many there were.
    /// Threads come first, since they may be making others.
    pub fn destroy_objects(&self, ranges: &[(u64, u64)]) -> usize {
        let objects = || {
            ranges
                .iter()
                .flat_map(|(start, size)| self.objects(*start, *size))
        };
        let unmake = |(kind, at)| {
            // SAFETY: the kernel says that there is an object of that type. Whoever used it is gone, or
            // learns that it is.
            unsafe { object::destroy(kind, at) };
        };
        let mut count = 0;
        loop {
            let (threads, others): (Vec<_>, Vec<_>) =
                objects().partition(|(kind, _)| *kind == Type::Thread);
            count += threads.len();
            if threads.is_empty() {
                count += others.len();
                others.into_iter().for_each(unmake);
                return count;
            }
            threads.into_iter().for_each(unmake);
        }
    }

    /// Withholds the memory from all to whom it was given: they fault, and the port behind `keeper` is told.
    /// The program's own use of it goes on.
    pub fn withhold(&self, keeper: &Ref) {
        let space = &startup::startup().space;
        self.region
            .set(self.start, self.size, Prot::empty(), space, Some(keeper));
    }

    /// Gives back what was withheld, with these permissions.
    pub fn give_back(&self, prot: Prot) {
        let space = &startup::startup().space;
        self.region.set(self.start, self.size, prot, space, None);
    }

    /// Ends the export. What was mapped from it is there no longer.
    pub fn unmake(&self) {
        self.reference.destroy();
        self.region.destroy();
    }

    /// The region.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// A link to the region: the right to map its memory.
    pub fn reference(&self) -> &Ref {
        &self.reference
    }

    /// Maps `size` bytes from the program's own address `from` at `at` of the space behind
    /// `space`, for good.
    pub fn map(
        &self,
        from: u64,
        size: u64,
        prot: Prot,
        space: &Ref,
        at: u64,
    ) -> Result<&'static Mapping, Status> {
        let mapping = Mapping::alloc()?;
        self.map_with(mapping, from, size, prot, space, at);
        Ok(mapping)
    }

    /// As [`map`](Self::map), through a mapping that exists already.
    pub fn map_with(
        &self,
        mapping: &Mapping,
        from: u64,
        size: u64,
        prot: Prot,
        space: &Ref,
        at: u64,
    ) {
        let size = size.next_multiple_of(PAGE_SIZE);
        assert!(
            self.start <= from && from + size <= self.start + self.size,
            "{size:#x} bytes at {from:#x} are not exported"
        );
        mapping.set(&self.reference, from - self.start, size, prot, space, at);
    }
}

fn once(
    slot: &AtomicPtr<Export>,
    make: impl FnOnce() -> Result<&'static Export, Status>,
) -> Result<&'static Export, Status> {
    // SAFETY: the slot holds null or a leaked export.
    if let Some(export) = unsafe { slot.load(Ordering::Acquire).as_ref() } {
        return Ok(export);
    }
    // Two threads at once would make two exports of the same range, which is harmless.
    let export = make()?;
    slot.store(core::ptr::from_ref(export).cast_mut(), Ordering::Release);
    Ok(export)
}

/// The program's own heap, exported.
pub fn own_heap() -> Result<&'static Export, Status> {
    static SLOT: AtomicPtr<Export> = AtomicPtr::new(core::ptr::null_mut());
    once(&SLOT, || {
        let startup = startup::startup();
        Export::alloc(startup.heap_start, startup.heap_size, READ_WRITE, None)
    })
}

/// The program's own ELF image, exported.
pub fn own_image() -> Result<&'static Export, Status> {
    static SLOT: AtomicPtr<Export> = AtomicPtr::new(core::ptr::null_mut());
    once(&SLOT, || {
        let startup = startup::startup();
        Export::alloc(startup.image_start, startup.image_size, READ_EXECUTE, None)
    })
}

/// A child's heap.
#[derive(Clone, Copy, Debug)]
pub enum ChildHeap<'a> {
    /// So many bytes of the parent's heap.
    Own(u64),
    /// A range that its keeper fills in when it is used.
    Window {
        /// The range, all of it exported.
        export: &'a Export,
        /// Its start in the parent's space.
        start: u64,
        /// Its bytes.
        size: u64,
    },
}

/// A file for a child.
#[derive(Clone, Copy, Debug)]
pub struct ChildFile<'a> {
    /// Name.
    pub name: &'a str,
    /// Address in the parent's space, page-aligned.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// The memory it lies in.
    pub export: &'a Export,
}

/// What to make a child of.
#[derive(Clone, Copy, Debug)]
pub struct Spec<'a> {
    /// The program: an ELF file in the parent's space, on pages of its own.
    pub image: &'a [u8],
    /// The memory that `image` lies in, executable.
    pub image_export: &'a Export,
    /// Name and arguments, each ended by a NUL.
    pub args: &'a [u8],
    /// Files.
    pub files: &'a [ChildFile<'a>],
    /// Heap.
    pub heap: ChildHeap<'a>,
    /// The port that serves the child as parent and keeper.
    pub parent: &'a Ref,
    /// The store, for who is to write to it.
    pub store: Option<&'a Ref>,
}

impl<'a> Spec<'a> {
    /// Another copy of the running program.
    pub fn own_program(args: &'a [u8], parent: &'a Ref) -> Result<Self, Status> {
        Ok(Self {
            image: startup::image(),
            image_export: own_image()?,
            args,
            files: &[],
            heap: ChildHeap::Own(1 << 20),
            parent,
            store: None,
        })
    }
}

/// A range of a child's addresses, and the parent's memory behind it.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// The mapping that makes it.
    pub mapping: &'static Mapping,
    /// First address in the parent's space.
    pub from: u64,
    /// Bytes.
    pub size: u64,
    /// Permissions.
    pub prot: Prot,
    /// First address in the child's space.
    pub at: u64,
}

/// A child space with its first thread.
#[derive(Debug)]
pub struct Child {
    task: &'static Task,
    space: &'static Ref,
    entry: u64,
    views: Vec<View>,
    memory: Vec<(u64, u64)>,
}

impl Child {
    /// Makes an empty space, whose exceptions go to the port behind `parent`. The first memory it is given
    /// is to be its startup block.
    pub fn empty(parent: &Ref) -> Result<Self, Error> {
        let task = Task::alloc()?;
        task.set_keeper(parent);
        Ok(Self {
            task,
            space: Ref::to(task)?,
            entry: 0,
            views: Vec::new(),
            memory: Vec::new(),
        })
    }

    /// Makes a space and fills it, without starting it.
    pub fn new(spec: &Spec<'_>) -> Result<Self, Error> {
        let mut child = Self::empty(spec.parent)?;
        child.fill(spec)?;
        Ok(child)
    }

    /// Puts a program into an empty space.
    pub fn fill(&mut self, spec: &Spec<'_>) -> Result<(), Error> {
        let program = Program::parse(spec.image).map_err(Error::BadImage)?;
        let mut block = Startup::empty();
        describe(&mut block, spec)?;
        self.entry = program.entry;
        let page = self.give(PAGE_SIZE, startup::STARTUP)? as *mut Startup;
        // SAFETY: the page is ours, and large enough; from here on it is only read, or an
        // object's memory.
        let startup = unsafe {
            page.write(block);
            &*page
        };
        startup.thread.create()?;
        startup.space.create()?;
        startup.parent.create()?;
        startup.console.create()?;
        startup.store.create()?;
        startup.space.copy_from(self.space);
        startup.parent.copy_from(spec.parent);
        startup.console.copy_from(&startup::startup().console);
        if let Some(store) = spec.store {
            startup.store.copy_from(store);
        }

        self.load(&program, spec)?;
        let stack_base = startup::STACK_TOP - startup::STACK_BYTES;
        self.give(startup::STACK_BYTES, stack_base)?;
        match spec.heap {
            ChildHeap::Own(size) => {
                self.give(size, startup::HEAP)?;
            }
            ChildHeap::Window {
                export,
                start,
                size,
            } => {
                self.map(export, start, size, READ_WRITE, startup::HEAP)?;
            }
        }
        self.map(
            spec.image_export,
            spec.image.as_ptr() as u64,
            spec.image.len() as u64,
            READ_EXECUTE,
            startup::IMAGE,
        )?;
        for (file, placed) in spec.files.iter().zip(&startup.files) {
            if file.size > 0 {
                self.map(
                    file.export,
                    file.address,
                    file.size,
                    READ_EXECUTE,
                    placed.address,
                )?;
            }
        }
        Ok(())
    }

    /// Maps what is read-only from the image itself, and copies the rest into fresh memory.
    fn load(&mut self, program: &Program<'_>, spec: &Spec<'_>) -> Result<(), Error> {
        for segment in program.segments() {
            let segment = segment.map_err(Error::BadImage)?;
            let (page, size) = (segment.page(), segment.page_end() - segment.page());
            let lead = segment.address - page;
            let in_place = segment.offset % PAGE_SIZE == lead
                && segment.file_size == segment.memory_size
                && !segment.prot.contains(Prot::WRITE);
            if in_place {
                let from = spec.image.as_ptr() as u64 + segment.offset - lead;
                self.map(spec.image_export, from, size, segment.prot, page)?;
                continue;
            }
            if segment.prot.contains(Prot::EXECUTE) {
                // Memory that can be written cannot be executed, so code cannot be copied.
                return Err(Error::BadImage("code is not aligned to pages"));
            }
            let memory = self.give_with(size, page, segment.prot)?;
            let contents = program.contents(&segment);
            // SAFETY: the fresh memory is at least as large as the segment.
            unsafe {
                ((memory + lead) as *mut u8)
                    .copy_from_nonoverlapping(contents.as_ptr(), contents.len());
            }
        }
        Ok(())
    }

    /// Gives the child fresh memory of the parent's own at `at`; returns the parent's address.
    pub fn give(&mut self, size: u64, at: u64) -> Result<u64, Error> {
        self.give_with(size, at, READ_WRITE)
    }

    fn give_with(&mut self, size: u64, at: u64, prot: Prot) -> Result<u64, Error> {
        let memory = self.provide(size)?;
        self.map(own_heap()?, memory, size, prot, at)?;
        Ok(memory)
    }

    /// Sets fresh memory of the parent's own aside for the child; returns its address.
    pub fn provide(&mut self, size: u64) -> Result<u64, Error> {
        let memory = heap::pages(size).ok_or(Error::NoMemory)?;
        self.memory.push((memory, size.next_multiple_of(PAGE_SIZE)));
        Ok(memory)
    }

    /// Maps memory of the parent's into the child.
    pub fn map(
        &mut self,
        export: &Export,
        from: u64,
        size: u64,
        prot: Prot,
        at: u64,
    ) -> Result<(), Status> {
        let size = size.next_multiple_of(PAGE_SIZE);
        let mapping = export.map(from, size, prot, self.space, at)?;
        self.views.push(View {
            mapping,
            from,
            size,
            prot,
            at,
        });
        Ok(())
    }

    /// A link to the space.
    pub fn space(&self) -> &'static Ref {
        self.space
    }

    /// What the space consists of.
    pub fn views(&self) -> &[View] {
        &self.views
    }

    /// The parent's own memory that the child has, by address and bytes: its startup block first.
    pub fn memory(&self) -> &[(u64, u64)] {
        &self.memory
    }

    /// The startup block.
    fn startup(&self) -> &'static Startup {
        // SAFETY: the first memory given; it stays until `destroy`.
        unsafe { &*(self.memory[0].0 as *const Startup) }
    }

    /// The first thread.
    pub fn thread(&self) -> &'static Thread {
        &self.startup().thread
    }

    /// Lets the first thread run.
    pub fn start(&self) {
        let thread_va = startup::STARTUP + core::mem::offset_of!(Startup, thread) as u64;
        // SAFETY: the child's space holds the program, its stack and its startup block.
        unsafe {
            self.thread().start(
                self.space,
                thread_va,
                self.entry,
                startup::STACK_TOP,
                startup::STARTUP,
            );
        }
    }

    /// Stops and unmakes the child, with all that it has made in memory that was its parent's, and
    /// takes the memory back.
    pub fn destroy(self) {
        if let Ok(own) = own_heap() {
            own.destroy_objects(&self.memory);
        }
        self.task.destroy();
        for view in self.views {
            view.mapping.destroy();
        }
        self.space.destroy();
        for (memory, size) in self.memory {
            // SAFETY: no mapping of the memory is left.
            unsafe { heap::free_pages(memory, size) };
        }
    }
}

/// Fills in the parts of a startup block that say what the child has.
fn describe(block: &mut Startup, spec: &Spec<'_>) -> Result<(), Error> {
    let own = startup::startup();
    block.magic = startup::STARTUP_MAGIC;
    block.abi_version = fluke_abi::ABI_VERSION;
    block.cpus = own.cpus;
    block.tsc_khz = own.tsc_khz;
    block.heap_start = startup::HEAP;
    block.heap_size = match spec.heap {
        ChildHeap::Own(size) | ChildHeap::Window { size, .. } => size,
    };
    block.image_start = startup::IMAGE;
    block.image_size = spec.image.len() as u64;
    let args = block.args.get_mut(..spec.args.len());
    args.ok_or(Error::BadImage("too many arguments"))?
        .copy_from_slice(spec.args);
    block.args_size = spec.args.len() as u64;
    if spec.files.len() > block.files.len() {
        return Err(Error::BadImage("too many files"));
    }
    block.file_count = spec.files.len() as u64;
    let mut address = startup::FILES;
    for (entry, file) in block.files.iter_mut().zip(spec.files) {
        *entry = File {
            name: [0; MODULE_NAME_BYTES],
            address,
            size: file.size,
        };
        let name = &file.name.as_bytes()[..file.name.len().min(MODULE_NAME_BYTES)];
        entry.name[..name.len()].copy_from_slice(name);
        // A page is left out between files, so that reading past the end of one is noticed.
        address += file.size.next_multiple_of(PAGE_SIZE) + PAGE_SIZE;
    }
    Ok(())
}
