//! The root program.
//!
//! All user memory is the root's. It starts the program to run in a space of its own, whose code
//! is mapped from the boot module, and serves it as parent, keeper and memory manager: the
//! program's heap is a window in the root's space that is empty at first. A fault there that the
//! kernel cannot resolve (a *hard* fault) arrives as a message; the root maps memory of its own
//! into the window and answers, and the kernel finds it when the thread tries again.

use alloc::vec;
use alloc::vec::Vec;

use fluke_abi::boot::{Module, ModuleKind, RootInfo};
use fluke_abi::code::{Exception, Status};
use fluke_abi::ipc::ExceptionMessage;
use fluke_abi::layout::{PAGE_SIZE, ROOT_INFO};
use libfluke::exception::{self, Describe};
use libfluke::object::{Mapping, Port, Pset, Ref};
use libfluke::parent::{EXIT, STATUS_EXCEPTION, STATUS_NO_MEMORY};
use libfluke::rpc::Server;
use libfluke::space::{
    Child, ChildFile, ChildHeap, Export, READ_EXECUTE, READ_WRITE, Spec, own_heap,
};
use libfluke::startup::{startup, text};
use libfluke::{exit, heap, println};

/// Where the program's heap appears in the root's space.
const WINDOW: u64 = 0x20_0000_0000;
/// The program's heap is this many times larger than memory, since allocators use addresses more
/// freely than memory: running out is for the root program to notice, and say.
const HEAP_FACTOR: u64 = 4;
/// Least and greatest size of the program's heap.
const HEAP_LIMITS: (u64, u64) = (16 << 20, 64 << 30);
/// Memory given out at once: little at first, so that small programs stay small, then more, so
/// that big ones do not fault for every page. Falls back to less when memory gets short.
const CLUSTERS: [(u64, u64); 3] = [(4 << 20, 1 << 20), (0, 64 << 10), (0, PAGE_SIZE)];

/// Alias of the port that is parent and keeper of the program.
const PARENT: u64 = 1;
/// Alias of the port that is keeper of its heap.
const HEAP: u64 = 2;

/// The program's heap.
struct Window {
    size: u64,
    /// One bit for each page that has memory.
    present: Vec<u64>,
}

impl Window {
    fn new(size: u64) -> Self {
        Self {
            size,
            present: vec![0; (size / PAGE_SIZE).div_ceil(64) as usize],
        }
    }

    fn is_present(&self, page: u64) -> bool {
        self.present[(page / 64) as usize] & 1 << (page % 64) != 0
    }

    fn is_vacant(&self, start: u64, size: u64) -> bool {
        start + size <= self.size
            && (start / PAGE_SIZE..(start + size) / PAGE_SIZE).all(|page| !self.is_present(page))
    }

    /// Puts memory where the fault at `offset` was.
    fn fill(&mut self, offset: u64) -> Result<(), Status> {
        // A keeper may hear of the same fault twice: messages of the kernel are idempotent.
        if offset >= self.size || self.is_present(offset / PAGE_SIZE) {
            return Ok(());
        }
        for (from, size) in CLUSTERS {
            let start = offset & !(size - 1);
            if offset < from || !self.is_vacant(start, size) {
                continue;
            }
            let Some(memory) = heap::pages(size) else {
                continue;
            };
            let mapping = Mapping::alloc()?;
            own_heap()?.map_with(
                mapping,
                memory,
                size,
                READ_WRITE,
                &startup().space,
                WINDOW + start,
            );
            for page in start / PAGE_SIZE..(start + size) / PAGE_SIZE {
                self.present[(page / 64) as usize] |= 1 << (page % 64);
            }
            return Ok(());
        }
        Err(Status::NoMemory)
    }
}

/// What the host says.
fn info() -> &'static RootInfo {
    // SAFETY: the host has filled in the page, and nobody can write to it.
    unsafe { &*(ROOT_INFO as *const RootInfo) }
}

fn contents(module: &Module) -> &'static [u8] {
    // SAFETY: the host has mapped the module there for good, read-only.
    unsafe { core::slice::from_raw_parts(module.va as *const u8, module.size as usize) }
}

/// The program.
pub fn main() -> u64 {
    let info = info();
    let modules = &info.modules[..info.modules.len().min(info.module_count as usize)];
    let name = match modules.first() {
        Some(module) if module.kind == ModuleKind::Program as u64 => text(&module.name),
        _ => {
            println!("root: there is no program to run");
            return crate::USAGE;
        }
    };
    let heap_size = (HEAP_FACTOR * info.memory_size).next_multiple_of(1 << 20);
    let mut window = Window::new(heap_size.clamp(HEAP_LIMITS.0, HEAP_LIMITS.1));
    let pset = match start(info, modules, window.size) {
        Ok(pset) => pset,
        Err(error) => {
            println!("root: cannot start {name}: {error}");
            return match error {
                libfluke::space::Error::NoMemory => STATUS_NO_MEMORY,
                libfluke::space::Error::BadImage(_) => STATUS_EXCEPTION,
            };
        }
    };

    let mut buffer = [0; ExceptionMessage::WORDS + 1];
    let mut server = Server::new(pset, &mut buffer, &[]);
    loop {
        let alias = server.wait().alias;
        let raised = exception::parse(server.words());
        match (alias, raised, server.words()) {
            (HEAP, Some(fault), _) => {
                let filled = window.fill(fault.region_offset);
                if filled.is_err() {
                    println!(
                        "root: out of memory: {name} wants more than the {} KiB there are",
                        info.memory_size >> 10
                    );
                    return STATUS_NO_MEMORY;
                }
            }
            (PARENT, Some(raised), _) => {
                println!("{name}: {}", Describe(&raised));
                let no_memory = raised.code == Exception::NoMemory as u64;
                return if no_memory {
                    STATUS_NO_MEMORY
                } else {
                    STATUS_EXCEPTION
                };
            }
            (PARENT, None, &[EXIT, status, ..]) => exit(status),
            // Whatever else it is gets an empty answer.
            _ => {}
        }
    }
}

/// Starts the program in the first module.
fn start(
    info: &RootInfo,
    modules: &[Module],
    heap_size: u64,
) -> Result<&'static Pset, libfluke::space::Error> {
    let pset = Pset::alloc()?;
    let parent = Ref::to(Port::in_set(pset, PARENT)?)?;
    let keeper = Ref::to(Port::in_set(pset, HEAP)?)?;
    let window = Export::alloc(WINDOW, heap_size, READ_WRITE, Some(keeper))?;

    let program = contents(&modules[0]);
    let image_export = Export::alloc(modules[0].va, modules[0].size, READ_EXECUTE, None)?;
    let mut files = Vec::new();
    for module in modules.iter().filter(|m| m.kind == ModuleKind::File as u64) {
        files.push(ChildFile {
            name: text(&module.name),
            address: module.va,
            size: module.size,
            export: Export::alloc(
                module.va,
                module.size.max(1),
                fluke_abi::state::Prot::READ,
                None,
            )?,
        });
    }
    let child = Child::new(&Spec {
        image: program,
        image_export,
        args: &info.args[..info.args.len().min(info.args_size as usize)],
        files: &files,
        heap: ChildHeap::Window {
            export: window,
            start: WINDOW,
            size: heap_size,
        },
        parent,
    })?;
    child.start();
    // It lives until the machine ends.
    core::mem::forget(child);
    Ok(pset)
}
