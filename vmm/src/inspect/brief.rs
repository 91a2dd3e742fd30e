//! What pause conditions ask of a machine, in numbers: its threads, and which of them runs where.

use fluke_abi::entry::Entry;
use fluke_abi::ipc::CallWord;
use fluke_abi::layout::GATE;
use fluke_abi::probe;

use super::kernel::Kernel;
use super::value::{Guest, physical};
use super::{Error, Machine, Result, layouts};

/// A thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Its number.
    pub number: u64,
    /// Where the kernel has it.
    pub address: u64,
    /// Its hash.
    pub hash: u64,
    /// Number of its space.
    pub space: Option<u64>,
    /// The call that its registers name.
    pub call: Option<Entry>,
    /// Whether the kernel is making that call.
    pub in_call: bool,
}

/// What was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Brief {
    /// The threads.
    pub threads: Vec<Thread>,
    /// The number of the thread that runs on each CPU.
    pub running: Vec<Option<u64>>,
    /// Physical address of the page table of each space, by number.
    pub page_tables: Vec<(u64, u64)>,
}

impl Brief {
    /// The thread that runs on a CPU.
    pub fn on(&self, cpu: u32) -> Option<&Thread> {
        let number = (*self.running.get(cpu as usize)?)?;
        self.threads.iter().find(|thread| thread.number == number)
    }
}

/// The call that registers name: of the call word and the instruction pointer.
pub fn named(word: u64, rip: u64) -> Option<Entry> {
    Entry::from_number(CallWord(word).number()).filter(|_| rip == GATE)
}

/// Looks at a machine. One whose kernel has not set itself up has no threads.
///
/// # Errors
/// If the image cannot be read, or the kernel's state is broken.
pub fn brief(machine: &Machine<'_>) -> Result<Brief> {
    let types = layouts(machine.image)?;
    let guest = Guest {
        types: &*types,
        memory: machine.memory,
    };
    let kernel = match Kernel::new(&guest) {
        Ok(kernel) => kernel,
        Err(Error::Early) => return Ok(Brief::default()),
        Err(error) => return Err(error),
    };
    let mut seen = Brief::default();
    for object in kernel.objects("thread")? {
        let thread = object.value;
        let register = |name| thread.field("frame")?.field(name)?.int();
        let (word, rip) = (CallWord(register("rax")?), register("rip")?);
        let space = kernel.name_in(thread.field("space")?)?;
        seen.threads.push(Thread {
            number: object.name.index,
            address: thread.address,
            hash: thread.field("header")?.field("hash")?.int()?,
            space: space.map(|space| space.index),
            call: named(word.0, rip),
            in_call: thread.field("in_call")?.bool()?,
        });
    }
    for object in kernel.objects("space")? {
        let table = object.value.field("page_table")?.int()?;
        seen.page_tables.push((object.name.index, table));
    }
    let (first, count) = kernel.scheduler.field("cpus")?.elements()?;
    for number in 0..count {
        let running = kernel.name_in(first.nth(number)?.field("current")?)?;
        seen.running.push(running.map(|thread| thread.index));
    }
    Ok(seen)
}

/// Physical address of the bytes that arm probe points.
///
/// # Errors
/// If the image has none.
pub fn armed(machine: &Machine<'_>) -> Result<u64> {
    let types = layouts(machine.image)?;
    let guest = Guest {
        types: &*types,
        memory: machine.memory,
    };
    let address = guest.find_static(probe::ARMED)?.address;
    physical(address).ok_or(Error::Unreadable(address))
}

/// Physical address of a register of a thread, as the kernel has it.
///
/// # Errors
/// If there is no such thread or register.
pub fn register(machine: &Machine<'_>, thread: u64, name: &str) -> Result<u64> {
    let types = layouts(machine.image)?;
    let guest = Guest {
        types: &*types,
        memory: machine.memory,
    };
    let kernel = Kernel::new(&guest)?;
    let frame = kernel.object("thread", thread)?.value.field("frame")?;
    let fields = frame.fields()?;
    let found = fields.iter().find(|(field, _)| field == name);
    let none = || Error::Misuse(format!("there is no register `{name}` of threads"));
    let (_, value) = found.ok_or_else(none)?;
    physical(value.address).ok_or(Error::Unreadable(value.address))
}
