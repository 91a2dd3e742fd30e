//! What a program is given when it starts: one page that its parent fills in.
//!
//! The page belongs to the parent's memory too, so the parent makes the objects in it: what it
//! creates at its own address of the page is what the child finds at [`STARTUP`].
//! `tools/c/startup.h` is the same structure in C.

use core::ffi::CStr;
use core::mem::offset_of;
use core::sync::atomic::{AtomicPtr, Ordering};

use fluke_abi::boot::{ARGS_BYTES, MODULE_NAME_BYTES};
use fluke_abi::layout::PAGE_SIZE;

use crate::object::{Ref, Thread};

/// Address of the [`Startup`] block; also in `rdi` at the program's entry.
pub const STARTUP: u64 = 0x0800_0000;
/// Top of the first thread's stack, exclusive.
pub const STACK_TOP: u64 = 0x0a00_0000;
/// Bytes of the first thread's stack.
pub const STACK_BYTES: u64 = 256 << 10;
/// Start of the heap.
pub const HEAP: u64 = 0x1_0000_0000;
/// Where files are mapped, read-only.
pub const FILES: u64 = 0x40_0000_0000;
/// Where the program's own ELF image is mapped, for programs that start copies of themselves.
pub const IMAGE: u64 = 0x60_0000_0000;

/// [`Startup::magic`].
pub const STARTUP_MAGIC: u64 = u64::from_le_bytes(*b"FLUKEUSR");
/// Most files that a program can be given.
pub const FILES_MAX: usize = 14;
/// End of the addresses at which a program's segments may lie.
pub const PROGRAM_END: u64 = HEAP;

/// A file in the program's memory.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct File {
    /// Name, NUL-padded UTF-8.
    pub name: [u8; MODULE_NAME_BYTES],
    /// Address, page-aligned.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

impl File {
    /// No file.
    pub const NONE: Self = Self {
        name: [0; MODULE_NAME_BYTES],
        address: 0,
        size: 0,
    };

    /// The file's name.
    pub fn name(&self) -> &str {
        text(&self.name)
    }

    /// The file's contents.
    pub fn bytes(&self) -> &'static [u8] {
        // SAFETY: whoever filled in the table mapped the file there for good, read-only.
        unsafe { core::slice::from_raw_parts(self.address as *const u8, self.size as usize) }
    }
}

/// NUL-padded text.
pub fn text(bytes: &[u8]) -> &str {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    core::str::from_utf8(&bytes[..end]).unwrap_or("?")
}

/// The startup block.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Startup {
    /// [`STARTUP_MAGIC`].
    pub magic: u64,
    /// [`fluke_abi::ABI_VERSION`].
    pub abi_version: u32,
    /// CPUs of the machine.
    pub cpus: u32,
    /// Frequency of the time-stamp counter, kHz.
    pub tsc_khz: u64,
    /// Address of the heap: zeroed memory, readable and writable.
    pub heap_start: u64,
    /// Bytes of the heap.
    pub heap_size: u64,
    /// Address of the program's own ELF image.
    pub image_start: u64,
    /// Bytes of the image; 0 if it was not passed on.
    pub image_size: u64,
    /// Entries used in `files`.
    pub file_count: u64,
    /// Bytes used in `args`.
    pub args_size: u64,
    /// 1 in the root program, which ends the machine itself; 0 otherwise.
    pub is_root: u64,
    /// Room, zero.
    pub reserved: [u64; 2],
    /// The first thread.
    pub thread: Thread,
    /// Link to the program's own space.
    pub space: Ref,
    /// Link to the parent's port, see [`crate::parent`].
    pub parent: Ref,
    /// Link to the console's port, see [`crate::console`].
    pub console: Ref,
    /// Link to the port of the file on the host, null for who has none, see [`fluke_abi::store`].
    pub store: Ref,
    /// Files.
    pub files: [File; FILES_MAX],
    /// The program's name and arguments, each ended by a NUL.
    pub args: [u8; ARGS_BYTES],
}

// What tools/c/startup.h counts on.
const _: () = assert!(size_of::<Startup>() == PAGE_SIZE as usize);
const _: () = assert!(offset_of!(Startup, thread) == 96);
const _: () = assert!(offset_of!(Startup, space) == 128);
const _: () = assert!(offset_of!(Startup, parent) == 160);
const _: () = assert!(offset_of!(Startup, console) == 192);
const _: () = assert!(offset_of!(Startup, files) == 256);

impl Startup {
    /// A block with nothing in it: all zero, so that it takes no room in an image.
    pub const fn empty() -> Self {
        Self {
            magic: 0,
            abi_version: 0,
            cpus: 0,
            tsc_khz: 0,
            heap_start: 0,
            heap_size: 0,
            image_start: 0,
            image_size: 0,
            file_count: 0,
            args_size: 0,
            is_root: 0,
            reserved: [0; 2],
            thread: Thread::new(),
            space: Ref::new(),
            parent: Ref::new(),
            console: Ref::new(),
            store: Ref::new(),
            files: [File::NONE; FILES_MAX],
            args: [0; ARGS_BYTES],
        }
    }
}

static CURRENT: AtomicPtr<Startup> = AtomicPtr::new(core::ptr::null_mut());

/// Makes `startup` the block that [`startup`] returns.
pub fn set(startup: &'static Startup) {
    CURRENT.store(core::ptr::from_ref(startup).cast_mut(), Ordering::Release);
}

/// The program's startup block, or none before [`set`].
pub fn try_startup() -> Option<&'static Startup> {
    // SAFETY: the pointer is null or comes from a static reference.
    unsafe { CURRENT.load(Ordering::Acquire).as_ref() }
}

/// The program's startup block.
///
/// # Panics
/// Before the start code has run.
pub fn startup() -> &'static Startup {
    try_startup().expect("no startup block")
}

/// The files that the program was given.
pub fn files() -> &'static [File] {
    let startup = startup();
    &startup.files[..FILES_MAX.min(startup.file_count as usize)]
}

/// The program's name and arguments.
pub fn args() -> impl Iterator<Item = &'static str> {
    let startup = startup();
    let mut rest = &startup.args[..ARGS_BYTES.min(startup.args_size as usize)];
    core::iter::from_fn(move || {
        let arg = CStr::from_bytes_until_nul(rest).ok()?;
        rest = &rest[arg.count_bytes() + 1..];
        Some(arg.to_str().unwrap_or("?"))
    })
}

/// The program's own ELF image; empty if it was not passed on.
pub fn image() -> &'static [u8] {
    let startup = startup();
    if startup.image_size == 0 {
        return &[];
    }
    // SAFETY: whoever filled in the block mapped the image there for good, read-only.
    unsafe {
        core::slice::from_raw_parts(
            startup.image_start as *const u8,
            startup.image_size as usize,
        )
    }
}

/// CPUs of the machine.
pub fn cpus() -> usize {
    startup().cpus as usize
}

/// Nanoseconds since boot.
pub fn now() -> u64 {
    // SAFETY: the call has no parameters.
    unsafe { crate::sys::clock_read() }
}
