//! Running a program in a child space: as its parent, keeper and memory manager.
//!
//! The child's heap is a *window* in this program's space that is empty at first. A fault there that
//! the kernel cannot resolve (a *hard* fault) arrives as a message; the supervisor maps memory of its own
//! into the window and answers, and the kernel finds it when the thread tries again. Of the child's
//! calls it sees none: only faults, exceptions nobody handles, and the end.

use alloc::vec;
use alloc::vec::Vec;

use fluke_abi::code::{Exception, Status};
use fluke_abi::ipc::ExceptionMessage;
use fluke_abi::layout::PAGE_SIZE;

use crate::exception;
use crate::heap;
use crate::object::{Mapping, Port, Pset, Ref};
use crate::parent::{CHECKPOINT, EXIT};
use crate::rpc::{Request, Server};
use crate::space::{Child, ChildFile, ChildHeap, Error, Export, READ_WRITE, Spec, own_heap};
use crate::startup::startup;

/// Where the child's heap appears in this program's space.
const WINDOW: u64 = 0x20_0000_0000;
/// Memory given out at once: little at first, so that small programs stay small, then more, so
/// that big ones do not fault for every page. Falls back to less when memory gets short.
const CLUSTERS: [(u64, u64); 3] = [(4 << 20, 1 << 20), (0, 64 << 10), (0, PAGE_SIZE)];

/// Alias of the port that is parent and keeper of the child.
const PARENT: u64 = 1;
/// Alias of the port that is keeper of its heap.
const HEAP: u64 = 2;
/// Alias of the port of the supervisor's own.
const OWN: u64 = 3;

/// Memory in a window.
#[derive(Clone, Copy, Debug)]
pub struct Chunk {
    /// Offset in the window.
    pub start: u64,
    /// Address of the memory.
    pub memory: u64,
    /// Bytes.
    pub size: u64,
    mapping: &'static Mapping,
}

/// A range of addresses that gets memory where it is used.
struct Window {
    size: u64,
    /// One bit for each page that has memory.
    present: Vec<u64>,
    chunks: Vec<Chunk>,
    /// Bytes of memory that it may still get.
    left: u64,
}

impl Window {
    fn new(size: u64, limit: u64) -> Self {
        Self {
            size,
            present: vec![0; (size / PAGE_SIZE).div_ceil(64) as usize],
            chunks: Vec::new(),
            left: limit,
        }
    }

    fn is_present(&self, page: u64) -> bool {
        self.present[(page / 64) as usize] & 1 << (page % 64) != 0
    }

    fn is_vacant(&self, start: u64, size: u64) -> bool {
        start + size <= self.size
            && (start / PAGE_SIZE..(start + size) / PAGE_SIZE).all(|page| !self.is_present(page))
    }

    /// Puts `size` bytes of memory at an offset, both whole pages. Fails if there is no memory.
    fn place(&mut self, start: u64, size: u64) -> Result<(), Status> {
        let memory = heap::pages(size).ok_or(Status::NoMemory)?;
        // SAFETY: nobody has been given the pages yet.
        let mapping =
            Mapping::alloc().inspect_err(|_| unsafe { heap::free_pages(memory, size) })?;
        let space = &startup().space;
        own_heap()?.map_with(mapping, memory, size, READ_WRITE, space, WINDOW + start);
        self.chunks.push(Chunk {
            start,
            memory,
            size,
            mapping,
        });
        for page in start / PAGE_SIZE..(start + size) / PAGE_SIZE {
            self.present[(page / 64) as usize] |= 1 << (page % 64);
        }
        Ok(())
    }

    /// Puts memory where the fault at `offset` was.
    fn fill(&mut self, offset: u64) -> Result<(), Status> {
        // A keeper may hear of the same fault twice: messages of the kernel are idempotent.
        if offset >= self.size || self.is_present(offset / PAGE_SIZE) {
            return Ok(());
        }
        for (from, size) in CLUSTERS {
            let start = offset & !(size - 1);
            if offset < from || size > self.left || !self.is_vacant(start, size) {
                continue;
            }
            // With less memory left than that, a smaller cluster may do.
            if self.place(start, size).is_ok() {
                self.left -= size;
                return Ok(());
            }
        }
        Err(Status::NoMemory)
    }
}

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// The program: an ELF file in this program's space, on pages of its own.
    pub image: &'a [u8],
    /// The memory that `image` lies in, executable.
    pub image_export: &'a Export,
    /// Name and arguments, each ended by a NUL.
    pub args: &'a [u8],
    /// Files.
    pub files: &'a [ChildFile<'a>],
    /// Bytes of addresses for its heap.
    pub heap: u64,
    /// Most bytes of memory for its heap.
    pub limit: u64,
    /// The store, if it is to write to it.
    pub store: Option<&'a Ref>,
}

/// How a child ended.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// With that status.
    Exited(u64),
    /// By an exception that nobody handles.
    Raised(ExceptionMessage),
    /// It wants more memory than there is.
    OutOfMemory,
}

/// What a supervisor is told.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// The child has ended.
    Ended(End),
    /// The child asks to be written to a file, for the time with that number.
    Checkpoint(u64),
    /// A message has come to the port of the supervisor's own.
    Message,
}

/// A child and what it takes to serve it. A program can have one at a time.
pub struct Supervisor {
    child: Child,
    window: Window,
    export: &'static Export,
    pset: &'static Pset,
    ports: [&'static Port; 3],
    parent: &'static Ref,
    own: &'static Ref,
    /// The message to be answered.
    last: Option<Request>,
    /// Faults served so far.
    pub faults: u64,
}

impl Supervisor {
    /// A supervisor of an empty space, with so many bytes of addresses for a heap, that may get so many
    /// bytes of memory.
    pub fn new(heap: u64, limit: u64) -> Result<Self, Error> {
        let pset = Pset::alloc()?;
        let ports = [
            Port::in_set(pset, PARENT)?,
            Port::in_set(pset, HEAP)?,
            Port::in_set(pset, OWN)?,
        ];
        let [parent, keeper, own] = [Ref::to(ports[0])?, Ref::to(ports[1])?, Ref::to(ports[2])?];
        let export = Export::alloc(WINDOW, heap, READ_WRITE, Some(keeper))?;
        keeper.destroy();
        Ok(Self {
            child: Child::empty(parent)?,
            window: Window::new(heap, limit),
            export,
            pset,
            ports,
            parent,
            own,
            last: None,
            faults: 0,
        })
    }

    /// Starts a program.
    pub fn start(job: &Job<'_>) -> Result<Self, Error> {
        let mut supervisor = Self::new(job.heap, job.limit)?;
        supervisor.child.fill(&Spec {
            image: job.image,
            image_export: job.image_export,
            args: job.args,
            files: job.files,
            heap: ChildHeap::Window {
                export: supervisor.export,
                start: WINDOW,
                size: job.heap,
            },
            parent: supervisor.parent,
            store: job.store,
        })?;
        supervisor.child.start();
        Ok(supervisor)
    }

    /// Serves the child until it ends.
    pub fn serve(&mut self) -> End {
        loop {
            if let Event::Ended(end) = self.next(&[]) {
                return end;
            }
        }
    }

    /// Answers what was told last, and serves the child until there is something else to tell.
    pub fn next(&mut self, answer: &[u64]) -> Event {
        let mut buffer = [0; ExceptionMessage::WORDS + 1];
        let mut server = Server::new(self.pset, &mut buffer, &[]).after(self.last);
        let mut answer = answer;
        loop {
            let request = server.reply_and_wait(answer);
            answer = &[];
            self.last = Some(request);
            let raised = exception::parse(server.words());
            match (request.alias, raised, server.words()) {
                (HEAP, Some(fault), _) => {
                    self.faults += 1;
                    if self.window.fill(fault.region_offset).is_err() {
                        return Event::Ended(End::OutOfMemory);
                    }
                }
                (PARENT, Some(raised), _) => {
                    let no_memory = raised.code == Exception::NoMemory as u64;
                    return Event::Ended(if no_memory {
                        End::OutOfMemory
                    } else {
                        End::Raised(raised)
                    });
                }
                (PARENT, None, &[EXIT, status, ..]) => return Event::Ended(End::Exited(status)),
                (PARENT, None, &[CHECKPOINT, number, ..]) => return Event::Checkpoint(number),
                (OWN, None, _) => return Event::Message,
                // Whatever else it is gets an empty answer.
                _ => {}
            }
        }
    }

    /// The child.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// A link to the port that the child knows as its parent.
    pub fn parent(&self) -> &'static Ref {
        self.parent
    }

    /// A link to a port of the supervisor's own, which the child knows nothing of.
    pub fn own(&self) -> &'static Ref {
        self.own
    }

    /// The addresses of the child's heap.
    pub fn heap(&self) -> (&'static Export, u64) {
        (self.export, WINDOW)
    }

    /// Bytes of memory that the child's heap may still get.
    pub fn left(&self) -> u64 {
        self.window.left
    }

    /// The memory of the child's heap.
    pub fn chunks(&self) -> &[Chunk] {
        &self.window.chunks
    }

    /// Puts memory into the child's heap, whatever the limit: offset and bytes, whole pages, none of which
    /// has any. Returns its address.
    pub fn place(&mut self, start: u64, size: u64) -> Result<u64, Error> {
        self.window.place(start, size)?;
        self.window
            .chunks
            .last()
            .map(|chunk| chunk.memory)
            .ok_or(Error::NoMemory)
    }

    /// Bytes of memory that the child's heap has.
    pub fn memory(&self) -> u64 {
        self.window.chunks.iter().map(|chunk| chunk.size).sum()
    }

    /// Unmakes the child with all that it and its own children have made, and takes the memory back.
    pub fn destroy(self) {
        let heap: Vec<_> = self
            .window
            .chunks
            .iter()
            .map(|chunk| (WINDOW + chunk.start, chunk.size))
            .collect();
        self.export.destroy_objects(&heap);
        self.child.destroy();
        for chunk in self.window.chunks {
            chunk.mapping.destroy();
            // SAFETY: no mapping of the memory is left, and no object in it.
            unsafe { heap::free_pages(chunk.memory, chunk.size) };
        }
        self.export.unmake();
        for reference in [self.parent, self.own] {
            reference.destroy();
        }
        for port in self.ports {
            port.destroy();
        }
        self.pset.destroy();
    }
}
