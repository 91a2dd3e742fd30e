//! Looking into a machine that does not run: every kernel object in its own terms.
//!
//! The kernel image says itself where everything lies ([`types`]), so a kernel with other layouts is
//! read right, and one that lacks what is looked for is refused. [`look`] gives a [`View`] of a
//! [`Machine`]: one that is paused, or one that only exists as its memory and registers.

pub mod brief;
pub mod code;
mod cpus;
mod frames;
mod kernel;
pub(crate) mod marked;
mod objects;
mod queues;
mod spaces;
mod table;
mod threads;
pub mod types;
pub mod value;

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::rc::Rc;

use clap::Subcommand;
use serde::{Deserialize, Serialize};

use crate::crash::Symbols;
use crate::error::{STATUS_FAILURE, STATUS_MISUSE};
use crate::image::{build_id, kernel_of_build};
use crate::paging::Physical;
use crate::vcpu::Registers;

use kernel::Kernel;
use types::{Layouts, Types};
use value::Guest;

/// Why something cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image is not one that can be read.
    #[error("the kernel image {0}")]
    Image(String),
    /// The kernel's state does not make sense.
    #[error("broken kernel state: {0}")]
    Corrupt(String),
    /// A pointer leads nowhere.
    #[error("broken kernel state: nothing at {0:#x}")]
    Unreadable(u64),
    /// The kernel has not set itself up.
    #[error("the kernel has not set itself up yet; look again when a program runs")]
    Early,
    /// The machine has no kernel that could be looked into.
    #[error("the machine runs no Fluke kernel, or one of another flukevm")]
    NoKernel,
    /// What was asked for does not exist.
    #[error("{0}")]
    Misuse(String),
}

impl Error {
    /// Exit status of a command that ends with this error.
    pub fn status(&self) -> u8 {
        match self {
            Self::Misuse(_) => STATUS_MISUSE,
            _ => STATUS_FAILURE,
        }
    }
}

/// Result of looking.
pub type Result<T> = std::result::Result<T, Error>;

/// What to look at.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum View {
    /// CPUs: what runs on each, and where it is.
    Cpus,
    /// Threads: whether they run, the calls that their registers name, what they wait for.
    Threads,
    /// One thread: all its state.
    Thread {
        /// Its number.
        id: u64,
    },
    /// Spaces: what they import, from where in the end, and what they export.
    Spaces {
        /// The number of one of them; all, if left out.
        id: Option<u64>,
    },
    /// Regions: memory that spaces export.
    Regions,
    /// Ports: who waits at them.
    Ports,
    /// Port sets: their ports, and the threads that serve them.
    Psets,
    /// Mutexes: who has them, who waits.
    Mutexes,
    /// Condition variables: who waits.
    Conds,
    /// References: what they link to.
    Refs,
    /// The object table: which object lies where in physical memory.
    Objects,
    /// Run queues of the CPUs, threads that sleep by the clock, and those that want the kernel.
    Queues,
    /// The kernel's pool: room for objects, pages for page tables, stacks.
    Frames,
    /// The kernel's stack on a CPU, innermost function first.
    Stack {
        /// Number of the CPU.
        #[arg(default_value_t = 0)]
        cpu: u32,
    },
    /// Instructions with their source lines.
    Code {
        /// Address, in hexadecimal with `0x`, or number of a CPU, for where that is.
        #[arg(default_value = "0", value_parser = place)]
        at: Place,
    },
}

/// Where code is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// Where that CPU is.
    Cpu(u32),
    /// At that address.
    Address(u64),
}

fn place(text: &str) -> std::result::Result<Place, String> {
    let place = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(&digits.replace('_', ""), 16).map(Place::Address),
        None => text.parse().map(Place::Cpu),
    };
    place.map_err(|_| {
        format!("`{text}` is neither an address such as 0xffffffff80200000 nor the number of a CPU")
    })
}

/// A machine that does not run.
pub struct Machine<'a> {
    /// Its memory.
    pub memory: &'a dyn Physical,
    /// Registers of its vCPUs; none of one that has ended.
    pub vcpus: Vec<Option<Registers>>,
    /// The kernel image that it booted.
    pub image: &'a [u8],
}

/// What was seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// For people.
    pub text: String,
    /// For programs.
    pub json: serde_json::Value,
}

/// Looks at a machine.
///
/// # Errors
/// If the image cannot be read, the kernel's state is broken where the view begins, or there is no such
/// thing. What is broken further in is reported where it is.
pub fn look(machine: &Machine<'_>, view: &View) -> Result<Report> {
    match view {
        View::Stack { cpu } => return code::stack(machine, *cpu),
        View::Code { at } => return code::listing(machine, *at),
        _ => {}
    }
    let types = layouts(machine.image)?;
    let guest = Guest {
        types: &*types,
        memory: machine.memory,
    };
    let kernel = Kernel::new(&guest)?;
    match view {
        View::Cpus => cpus::view(&kernel, machine),
        View::Threads => threads::all(&kernel, machine),
        View::Thread { id } => threads::one(&kernel, machine, *id),
        View::Spaces { id } => spaces::spaces(&kernel, *id),
        View::Regions => spaces::regions(&kernel),
        View::Ports => objects::ports(&kernel),
        View::Psets => objects::psets(&kernel),
        View::Mutexes => objects::mutexes(&kernel),
        View::Conds => objects::conds(&kernel),
        View::Refs => objects::refs(&kernel),
        View::Objects => objects::table(&kernel),
        View::Queues => queues::view(&kernel),
        View::Frames => frames::view(&kernel),
        View::Stack { .. } | View::Code { .. } => Err(Error::NoKernel),
    }
}

/// What a CPU is at, in a few words: its thread, and the call that this one's registers name.
///
/// # Errors
/// As [`look`].
pub fn on_cpu(machine: &Machine<'_>, number: u32) -> Result<String> {
    let types = layouts(machine.image)?;
    let guest = Guest {
        types: &*types,
        memory: machine.memory,
    };
    threads::on_cpu(&Kernel::new(&guest)?, machine, number)
}

/// What the types of a kernel are. Those of the kernels that are built in are read once in each thread.
fn layouts(image: &[u8]) -> Result<Rc<dyn Layouts + '_>> {
    thread_local! {
        static READ: RefCell<HashMap<*const u8, Rc<Types<'static>>>> = RefCell::default();
    }
    let built_in = build_id(image).and_then(|id| kernel_of_build(&id));
    // Somebody may have changed it, and kept its id.
    let built_in = built_in.filter(|&built_in| built_in == image);
    let Some(built_in) = built_in else {
        return Ok(Rc::new(Types::new(image)?));
    };
    READ.with_borrow_mut(|read| {
        let types = match read.entry(built_in.as_ptr()) {
            Entry::Occupied(types) => types.get().clone(),
            Entry::Vacant(place) => place.insert(Rc::new(Types::new(built_in)?)).clone(),
        };
        Ok(types as Rc<dyn Layouts>)
    })
}

impl Machine<'_> {
    fn vcpu(&self, number: u32) -> Result<&Registers> {
        let vcpu = self.vcpus.get(number as usize).ok_or_else(|| {
            let last = self.vcpus.len().saturating_sub(1);
            Error::Misuse(format!("there is no CPU {number}; the last is {last}"))
        })?;
        let ended = || Error::Misuse(format!("vCPU {number} has ended"));
        vcpu.as_ref().ok_or_else(ended)
    }

    fn symbols(&self) -> Result<Symbols<'_>> {
        Symbols::new(self.image).ok_or_else(|| Error::Image("is no ELF file".into()))
    }
}
