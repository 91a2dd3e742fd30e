//! The root program.
//!
//! All user memory is the root's. It starts the program to run in a space of its own, whose code
//! is mapped from the boot module, and supervises it until it ends, and with it the machine.

use alloc::vec::Vec;

use fluke_abi::boot::{Module, ModuleKind, RootInfo};
use fluke_abi::layout::ROOT_INFO;
use libfluke::exception::Describe;
use libfluke::parent::{STATUS_EXCEPTION, STATUS_NO_MEMORY};
use libfluke::space::{ChildFile, Error, Export, READ_EXECUTE};
use libfluke::startup::{startup, text};
use libfluke::supervisor::{End, Job, Supervisor};
use libfluke::{exit, println};

/// The program's heap is this many times larger than memory, since allocators use addresses more
/// freely than memory: running out is for the root program to notice, and say.
const HEAP_FACTOR: u64 = 4;
/// Least and greatest size of the program's heap.
const HEAP_LIMITS: (u64, u64) = (16 << 20, 64 << 30);
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
    let mut supervisor = match start(info, modules) {
        Ok(supervisor) => supervisor,
        Err(error) => {
            println!("root: cannot start {name}: {error}");
            return match error {
                Error::NoMemory => STATUS_NO_MEMORY,
                Error::BadImage(_) => STATUS_EXCEPTION,
            };
        }
    };
    match supervisor.serve() {
        End::Exited(status) => exit(status),
        End::Raised(raised) => {
            println!("{name}: {}", Describe(&raised));
            STATUS_EXCEPTION
        }
        End::OutOfMemory => {
            println!(
                "root: out of memory: {name} wants more than the {} KiB there are",
                info.memory_size >> 10
            );
            STATUS_NO_MEMORY
        }
    }
}

/// Starts the program in the first module.
fn start(info: &RootInfo, modules: &[Module]) -> Result<Supervisor, Error> {
    let mut files = Vec::new();
    for module in modules.iter().filter(|m| m.kind == ModuleKind::File as u64) {
        files.push(ChildFile {
            name: text(&module.name),
            address: module.va,
            size: module.size,
            // A file may be a program.
            export: Export::alloc(module.va, module.size.max(1), READ_EXECUTE, None)?,
        });
    }
    let program = &modules[0];
    let heap = (HEAP_FACTOR * info.memory_size).next_multiple_of(1 << 20);
    Supervisor::start(&Job {
        image: contents(program),
        image_export: Export::alloc(program.va, program.size, READ_EXECUTE, None)?,
        args: &info.args[..info.args.len().min(info.args_size as usize)],
        files: &files,
        heap: heap.clamp(HEAP_LIMITS.0, HEAP_LIMITS.1),
        limit: u64::MAX,
        store: Some(&startup().store),
    })
}
