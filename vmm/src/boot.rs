//! Lays out a machine's memory before its first instruction, as `fluke_abi::boot` and
//! `fluke_abi::layout` promise the kernel.
//!
//! ```text
//! 0                 1 MiB that stays unused: where machines of other VMMs have firmware (`crate::pvh`)
//! TRAMPOLINE        pages for the trampoline of an image
//! then              page tables, boot information, small things
//! KERNEL_PHYSICAL   kernel image; the rest of its last 2 MiB page holds kernel stacks, which
//!                   like the image's text have no place in the direct map
//! next 2 MiB        programs, modules, pool; all that remains is the root program's memory
//! ```

use std::io::Cursor;

use fluke_abi::ABI_VERSION;
use fluke_abi::boot::{
    ARGS_BYTES, BOOT_MAGIC, BootInfo, Extent, Gate, ImageInfo, MODULE_NAME_BYTES, MODULES_MAX,
    Module, ModuleKind, RootInfo, SEGMENTS_MAX, Segment,
};
use fluke_abi::layout::{
    DIRECT_MAP, GATE, KERNEL_IMAGE, KERNEL_PHYSICAL, KERNEL_STACKS, PAGE_SIZE, ROOT_INFO,
    ROOT_MEMORY, ROOT_MODULES, ROOT_OBJECTS, ROOT_STACK_TOP,
};
use fluke_abi::mutant::Mutant;
use fluke_abi::state::Prot;
use fluke_abi::stats::CpuStats;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::Elf as KernelElf;
use zerocopy::FromZeros;

use crate::config::{GuestFile, MIB, Size};
use crate::error::Error;
use crate::image::{self, Elf, LoadSegment};
use crate::memory::{Frames, Memory};
use crate::paging::{Entry, LARGE_PAGE, PageTables};

/// Physical address of a flat guest and its entry point.
pub const FLAT_BASE: u64 = 0x10_0000;
/// Physical address of what [`crate::pvh`] adds to a machine: a page of code, and its page tables. Nothing that
/// the kernel uses lies below.
pub const TRAMPOLINE: u64 = 0x10_0000;
/// Pages there.
pub const TRAMPOLINE_PAGES: u64 = 5;
/// Bytes of stack of each vCPU in a flat guest; the stacks end at the end of memory.
const FLAT_STACK: u64 = 0x1000;

/// Bytes of the root program's stack.
const ROOT_STACK_BYTES: u64 = 64 << 10;
const POOL_MIN: u64 = 2 * MIB;
const POOL_MAX: u64 = 64 * MIB;
/// Pool bytes to a thread, where every thread has a kernel stack.
const POOL_PER_THREAD: u64 = 16 << 10;
const THREADS_MAX: u64 = 4096;

/// How every vCPU starts.
#[derive(Clone, Debug)]
pub struct Entrance {
    /// First instruction.
    pub rip: u64,
    /// Physical address of the top-level page table.
    pub page_table: u64,
    /// Second argument of the entry point; the first is the number of the vCPU.
    pub rsi: u64,
    /// Stack pointer of vCPU 0.
    pub stack: u64,
    /// Distance from a vCPU's stack pointer to the next one's, bytes.
    pub stack_step: u64,
    /// Where the kernel counts, if it does.
    pub stats: Option<Extent>,
}

/// What the kernel is told of the machine besides its memory.
#[derive(Clone, Copy, Debug)]
pub struct MachineInfo {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Trap instruction for the gate page.
    pub gate: Gate,
    /// Frequency of the time-stamp counter, kHz.
    pub tsc_khz: u64,
    /// Frequency of the APIC timer, kHz.
    pub apic_timer_khz: u64,
    /// Whether the kernel is to have preemption points.
    pub preemption_points: bool,
    /// What the clock shows at first, nanoseconds.
    pub clock: u64,
    /// Whether there is a store.
    pub store: bool,
}

/// What a Fluke machine runs.
#[derive(Clone, Copy, Debug)]
pub struct FlukeGuest<'a> {
    /// Kernel image.
    pub kernel: &'a [u8],
    /// Root program.
    pub root: &'a [u8],
    /// The program that it runs.
    pub program: &'a GuestFile,
    /// The program's arguments.
    pub args: &'a [String],
    /// Files.
    pub files: &'a [GuestFile],
    /// The bug that the kernel is to have, if it knows any.
    pub mutant: Mutant,
}

/// Lays out a flat guest.
///
/// # Errors
/// If it does not fit.
pub fn flat(memory: &Memory, code: &[u8]) -> Result<Entrance, Error> {
    if FLAT_BASE + code.len() as u64 > memory.size() {
        return Err(too_small("the flat guest", memory));
    }
    let mut frames = Frames::new(&[(PAGE_SIZE, FLAT_BASE)]);
    let mut tables = PageTables::new(memory, &mut frames)?;
    let everything = Entry::CODE | Entry::DATA.difference(Entry::NO_EXECUTE);
    for pa in (0..memory.size()).step_by(LARGE_PAGE as usize) {
        tables.map_large(pa, pa, everything)?;
    }
    memory.write(FLAT_BASE, code)?;
    Ok(Entrance {
        rip: FLAT_BASE,
        page_table: tables.root(),
        rsi: 0,
        stack: memory.size(),
        stack_step: FLAT_STACK.wrapping_neg(),
        stats: None,
    })
}

/// Lays out a Fluke machine.
///
/// # Errors
/// If an image is bad or something does not fit.
pub fn fluke(
    memory: &Memory,
    machine: &MachineInfo,
    guest: &FlukeGuest<'_>,
) -> Result<Entrance, Error> {
    let (kernel, image) = image::check_kernel("kernel", guest.kernel)?;
    let root = image::check_program("root", guest.root)?;
    image::check_program(&guest.program.name, &guest.program.data)?;

    let image_end = kernel.segments.iter().map(|s| s.pa + s.size).max();
    let image_end = image_end
        .unwrap_or(KERNEL_PHYSICAL)
        .next_multiple_of(PAGE_SIZE);
    let hole_end = image_end.next_multiple_of(LARGE_PAGE);
    if hole_end + POOL_MIN > memory.size() {
        return Err(too_small("the kernel", memory));
    }
    KernelElf::load(memory.map(), None, &mut Cursor::new(guest.kernel), None)
        .map_err(|e| Error::Memory(format!("loading the kernel: {e}")))?;

    let mut plan = Plan {
        memory,
        small: Frames::new(&[(TRAMPOLINE + TRAMPOLINE_PAGES * PAGE_SIZE, KERNEL_PHYSICAL)]),
        unmapped: Frames::new(&[(image_end, hole_end)]),
        large: Frames::new(&[(hole_end, memory.size())]),
        segments: Vec::new(),
    };

    let pool_size = (memory.size() / 8).clamp(POOL_MIN, POOL_MAX) & !(PAGE_SIZE - 1);
    let pool = Extent {
        start: plan.large(pool_size, "the kernel's pool")?,
        size: pool_size,
    };
    let threads = match image.stack_per_thread {
        0 => 0,
        _ => (pool_size / POOL_PER_THREAD).min(THREADS_MAX),
    };
    let stacks = u64::from(machine.cpus) + threads;
    let stats_size = u64::from(machine.cpus) * size_of::<CpuStats>() as u64;
    let stats = Extent {
        start: plan.small(stats_size)?,
        size: stats_size.next_multiple_of(PAGE_SIZE),
    };
    let gate_page = plan.gate_page(machine.gate)?;
    let (page_table, own_page_table) =
        plan.kernel_space(&kernel, &image, stacks, hole_end, gate_page)?;

    let root_entry = root.entry;
    plan.root_program(guest.root, &root)?;
    let modules = plan.modules(guest.program, guest.files)?;
    plan.root_space(machine, guest, &modules)?;

    let mut info = BootInfo::new_zeroed();
    info.magic = BOOT_MAGIC;
    info.abi_version = ABI_VERSION;
    info.cpus = machine.cpus;
    info.gate = machine.gate as u32;
    info.stacks = stacks as u32;
    info.preemption_points = machine.preemption_points.into();
    info.store = machine.store.into();
    info.mutant = guest.mutant as u64;
    info.clock = machine.clock;
    info.tsc_khz = machine.tsc_khz;
    info.apic_timer_khz = machine.apic_timer_khz;
    info.memory_size = memory.size();
    info.page_table = page_table;
    info.own_page_table = own_page_table;
    info.pool = pool;
    info.stats = stats;
    info.gate_page = gate_page;
    info.root_entry = root_entry;
    // As after a call: the System V ABI wants the stack 8 below a multiple of 16 at a function.
    info.root_stack = ROOT_STACK_TOP - 8;
    info.segment_count = plan.segments.len() as u64;
    info.segments
        .get_mut(..plan.segments.len())
        .ok_or_else(|| Error::Config(format!("more than {SEGMENTS_MAX} root segments")))?
        .copy_from_slice(&plan.segments);
    let boot_info = plan.small(PAGE_SIZE)?;
    memory.put(boot_info, &info)?;
    Ok(Entrance {
        rip: kernel.entry,
        page_table,
        rsi: DIRECT_MAP + boot_info,
        stack: KERNEL_STACKS + 2 * image.stack_bytes,
        stack_step: 2 * image.stack_bytes,
        stats: Some(stats),
    })
}

fn too_small(what: &str, memory: &Memory) -> Error {
    Error::Config(format!(
        "{} of memory is too little for {what}; give more with --mem",
        Size(memory.size())
    ))
}

/// Memory being laid out.
struct Plan<'a> {
    memory: &'a Memory,
    /// Frames below the kernel.
    small: Frames,
    /// Frames that the direct map leaves out.
    unmapped: Frames,
    /// Frames above the kernel.
    large: Frames,
    /// Memory of the root space.
    segments: Vec<Segment>,
}

impl Plan<'_> {
    /// Frames for something large, named in the error.
    fn large(&mut self, size: u64, what: &str) -> Result<u64, Error> {
        self.large
            .take(size)
            .ok_or_else(|| too_small(what, self.memory))
    }

    /// Frames for something small.
    fn small(&mut self, size: u64) -> Result<u64, Error> {
        match self.small.take(size) {
            Some(start) => Ok(start),
            None => self.large(size, "the machine's tables"),
        }
    }

    /// Builds the page tables that every CPU starts with, and those of the kernel's own space.
    fn kernel_space(
        &mut self,
        kernel: &Elf,
        image: &ImageInfo,
        stacks: u64,
        hole_end: u64,
        gate_page: u64,
    ) -> Result<(u64, u64), Error> {
        // Stacks need so many frames that the tables may not fit below the kernel: one for each
        // 512 pages mapped, and the direct map one for each GiB.
        let table_bytes = (stacks * 2 * image.stack_bytes / LARGE_PAGE + 40) * PAGE_SIZE;
        let mut frames = match self.small.take(table_bytes) {
            Some(start) => Frames::new(&[(start, start + table_bytes)]),
            None => {
                let start = self.large(table_bytes, "page tables")?;
                Frames::new(&[(start, start + table_bytes)])
            }
        };
        let memory = self.memory;
        let mut tables = PageTables::new(memory, &mut frames)?;
        let whole = memory.size() & !(LARGE_PAGE - 1);
        for pa in (0..whole).step_by(LARGE_PAGE as usize) {
            if !(KERNEL_PHYSICAL..hole_end).contains(&pa) {
                tables.map_large(DIRECT_MAP + pa, pa, Entry::DATA)?;
            }
        }
        tables.map(
            DIRECT_MAP + whole,
            whole,
            memory.size() - whole,
            Entry::DATA,
        )?;
        for segment in &kernel.segments {
            map_image(&mut tables, KERNEL_IMAGE, segment, Entry::empty())?;
            // Where messages of the kernel's own threads are copied.
            if !segment.supervisor && !segment.prot.contains(Prot::EXECUTE) {
                map_image(&mut tables, DIRECT_MAP, segment, Entry::empty())?;
            }
        }
        for slot in 0..stacks {
            let size = image.stack_bytes;
            let start = match self.unmapped.take(size) {
                Some(start) => start,
                None => self
                    .large
                    .take(size)
                    .ok_or_else(|| too_small("the kernel stacks", memory))?,
            };
            tables.map(
                KERNEL_STACKS + (2 * slot + 1) * size,
                start,
                size,
                Entry::DATA,
            )?;
        }
        let root = tables.root();

        let mut own = PageTables::new(memory, &mut frames)?;
        for va in [DIRECT_MAP, KERNEL_STACKS] {
            own.share(root, va)?;
        }
        own.map(GATE, gate_page, PAGE_SIZE, Entry::CODE | Entry::USER)?;
        for segment in &kernel.segments {
            let user = if segment.supervisor {
                Entry::empty()
            } else {
                Entry::USER
            };
            map_image(&mut own, KERNEL_IMAGE, segment, user)?;
        }
        Ok((root, own.root()))
    }

    fn gate_page(&mut self, gate: Gate) -> Result<u64, Error> {
        let page = self.small(PAGE_SIZE)?;
        // Whoever jumps past the stub meets `int3`, in every byte of the page.
        let mut code = [0xcc; PAGE_SIZE as usize];
        code[..3].copy_from_slice(match gate {
            Gate::Ud2 => &[0x0f, 0x0b, 0xc3],
            Gate::Syscall => &[0x0f, 0x05, 0xc3],
        });
        self.memory.write(page, &code)?;
        Ok(page)
    }

    fn segment(&mut self, va: u64, start: u64, size: u64, prot: Prot) {
        self.segments.push(Segment {
            va,
            start,
            size: size.next_multiple_of(PAGE_SIZE),
            prot: prot.bits(),
        });
    }

    fn root_program(&mut self, data: &[u8], root: &Elf) -> Result<(), Error> {
        for s in &root.segments {
            let (va, size) = s.pages();
            let start = self.large(size, "the root program")?;
            self.memory
                .write(start + (s.va - va), &data[s.file.clone()])?;
            self.segment(va, start, size, s.prot);
        }
        Ok(())
    }

    fn modules(&mut self, program: &GuestFile, files: &[GuestFile]) -> Result<Vec<Module>, Error> {
        if files.len() >= MODULES_MAX {
            return Err(Error::Config(format!(
                "{} files are too many; give at most {}",
                files.len(),
                MODULES_MAX - 1
            )));
        }
        let mut modules = Vec::new();
        let mut va = ROOT_MODULES;
        for (i, file) in [program].into_iter().chain(files).enumerate() {
            let mut module = Module::new_zeroed();
            // One byte less than there is room for, so that a NUL always ends it.
            if file.name.len() >= MODULE_NAME_BYTES {
                return Err(Error::Config(format!(
                    "the name `{}` is too long for the guest; give one of at most {} bytes",
                    file.name,
                    MODULE_NAME_BYTES - 1
                )));
            }
            module.name[..file.name.len()].copy_from_slice(file.name.as_bytes());
            module.kind = if i == 0 {
                ModuleKind::Program
            } else {
                ModuleKind::File
            } as u64;
            module.va = va;
            module.size = file.data.len() as u64;
            if module.size > 0 {
                let what = format!("`{}` of {} bytes", file.name, file.data.len());
                let start = self.large(module.size, &what)?;
                self.memory.write(start, &file.data)?;
                self.segment(va, start, module.size, Prot::READ);
            }
            // A page between modules stays unmapped.
            va += module.size.next_multiple_of(PAGE_SIZE) + PAGE_SIZE;
            modules.push(module);
        }
        Ok(modules)
    }

    /// The rest of the root space: objects, stack, information, and all memory that is left.
    fn root_space(
        &mut self,
        machine: &MachineInfo,
        guest: &FlukeGuest<'_>,
        modules: &[Module],
    ) -> Result<(), Error> {
        let rw = Prot::READ | Prot::WRITE;
        let objects = self.small(PAGE_SIZE)?;
        self.segment(ROOT_OBJECTS, objects, PAGE_SIZE, rw);
        let stack = self.small(ROOT_STACK_BYTES)?;
        self.segment(
            ROOT_STACK_TOP - ROOT_STACK_BYTES,
            stack,
            ROOT_STACK_BYTES,
            rw,
        );
        let info_page = self.small(PAGE_SIZE)?;
        self.segment(ROOT_INFO, info_page, PAGE_SIZE, Prot::READ);
        let (start, size) = self
            .large
            .take_largest()
            .ok_or_else(|| too_small("programs to run", self.memory))?;
        self.segment(ROOT_MEMORY, start, size, rw);

        let mut info = RootInfo::new_zeroed();
        info.magic = BOOT_MAGIC;
        info.abi_version = ABI_VERSION;
        info.cpus = machine.cpus;
        info.tsc_khz = machine.tsc_khz;
        info.memory_size = size;
        info.module_count = modules.len() as u64;
        info.modules[..modules.len()].copy_from_slice(modules);
        let args = arguments(&guest.program.name, guest.args)?;
        info.args_size = args.len() as u64;
        info.args[..args.len()].copy_from_slice(&args);
        self.memory.put(info_page, &info)
    }
}

/// Maps a segment of the kernel image at its physical address plus `base`, with the bits that are set in `user` besides its own.
fn map_image(
    tables: &mut PageTables<'_>,
    base: u64,
    segment: &LoadSegment,
    user: Entry,
) -> Result<(), Error> {
    let flags = if segment.prot.contains(Prot::WRITE) {
        Entry::DATA
    } else if segment.prot.contains(Prot::EXECUTE) {
        Entry::CODE
    } else {
        Entry::CONSTANT
    };
    let (va, size) = segment.pages();
    // It differs from page table to page table.
    let flags = flags.difference(Entry::GLOBAL) | user;
    let pa = va - KERNEL_IMAGE;
    tables.map(base + pa, pa, size, flags)
}

/// The program's name and arguments, each ended by a NUL.
fn arguments(name: &str, args: &[String]) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    for arg in std::iter::once(name).chain(args.iter().map(String::as_str)) {
        bytes.extend_from_slice(arg.as_bytes());
        bytes.push(0);
    }
    if bytes.len() > ARGS_BYTES {
        return Err(Error::Config(format!(
            "the arguments take {} bytes; shorten them to {ARGS_BYTES}",
            bytes.len()
        )));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
