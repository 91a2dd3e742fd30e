//! Pause conditions: where a machine is to pause by itself.
//!
//! A [`Condition`] is what must happen, and in which thread, space or call, and how often. The machine runs
//! until the first of some that are given comes true ([`Vm::run_until`](crate::vm::Vm::run_until)), and is
//! paused there, all of it.
//!
//! * Probe points ([`Probe`]) are the kernel's own: [`fluke_abi::probe`].
//! * A place is an address, function or source line of the kernel: a hardware breakpoint on all vCPUs.
//! * Instructions of the kernel are counted by single steps.
//! * A write is found by taking the page from the guest's writes: whoever writes there, program or kernel and
//!   by whatever address, leaves the guest, and the host writes. Slow for a page that is written to often. A
//!   vector instruction that KVM cannot do in the guest's stead ends the machine.
//!
//! ```no_run
//! # use flukevm::{condition::{Condition, Until}, vm::Vm};
//! # use std::time::Duration;
//! # fn example(vm: &mut Vm) -> Result<(), flukevm::error::Error> {
//! use fluke_abi::{entry::Entry, probe::Probe};
//! let asleep = Condition::probe(Probe::Wait).call(Entry::cond_wait).count(2);
//! if let Until::Hit(hit) = vm.run_until(&[asleep], Duration::from_secs(5))? {
//!     println!("thread {:?} sleeps", hit.thread);
//! }
//! # Ok(())
//! # }
//! ```

pub(crate) mod pages;
mod run;
pub(crate) mod watch;

use std::fmt;

use fluke_abi::entry::Entry;
use fluke_abi::probe::Probe;

use crate::stop::StopReason;

/// Most places that conditions can have together: x86 has so many breakpoints.
pub const PLACES_MAX: usize = 4;

/// What must happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A probe point is come to.
    Probe(Probe),
    /// An instruction of the kernel is about to be executed.
    Place(Place),
    /// Memory is written to.
    Write {
        /// Number of the space; none for physical memory.
        space: Option<u64>,
        /// First byte.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// A vCPU has executed instructions at CPL 0.
    Instructions {
        /// Its number.
        vcpu: u32,
        /// How many.
        count: u32,
    },
}

/// A place in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A virtual address.
    Address(u64),
    /// The first instruction of a function, which is named by its path or the end of it: `wait::fall_asleep`.
    Symbol(String),
    /// The first instruction of a line of a source file, which is named by its path or the end of it, in each
    /// function that the line has become part of.
    Line(String, u32),
}

/// Which thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The one that views call by this number.
    Number(u64),
    /// That with this hash.
    Hash(u64),
}

/// When to pause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    what: What,
    thread: Option<Who>,
    space: Option<u64>,
    call: Option<Entry>,
    count: u64,
}

impl Condition {
    fn new(what: What) -> Self {
        Self {
            what,
            thread: None,
            space: None,
            call: None,
            count: 1,
        }
    }

    /// A probe point is come to.
    pub fn probe(probe: Probe) -> Self {
        Self::new(What::Probe(probe))
    }

    /// A place in the kernel is come to.
    pub fn place(place: Place) -> Self {
        Self::new(What::Place(place))
    }

    /// Any of `size` bytes of physical memory are written to.
    pub fn physical_write(address: u64, size: u64) -> Self {
        Self::new(What::Write {
            space: None,
            address,
            size,
        })
    }

    /// Any of `size` bytes are written to that a space has at `address` when the machine is let run.
    pub fn write(space: u64, address: u64, size: u64) -> Self {
        Self::new(What::Write {
            space: Some(space),
            address,
            size,
        })
    }

    /// A vCPU has executed `count` instructions at CPL 0, from where the machine is let run; programs run
    /// freely in between. No interrupt is taken at CPL 0 meanwhile. Entering the kernel and leaving it are one
    /// instruction each.
    pub fn instructions(vcpu: u32, count: u32) -> Self {
        Self::new(What::Instructions { vcpu, count })
    }

    /// Only if it is about this thread: for a probe point, whose call or memory it is; else, who runs.
    #[must_use]
    pub fn thread(mut self, who: Who) -> Self {
        self.thread = Some(who);
        self
    }

    /// Only if the thread is in the space of this number.
    #[must_use]
    pub fn space(mut self, number: u64) -> Self {
        self.space = Some(number);
        self
    }

    /// Only if the thread is in this call: the one that it has come from user mode with, or the one that its
    /// registers name now, which does the rest.
    #[must_use]
    pub fn call(mut self, call: Entry) -> Self {
        self.call = Some(call);
        self
    }

    /// At the `n`-th time, from 1.
    #[must_use]
    pub fn count(mut self, n: u64) -> Self {
        self.count = n.max(1);
        self
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address:#x}"),
            Self::Symbol(name) => f.write_str(name),
            Self::Line(file, line) => write!(f, "{file}:{line}"),
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Probe(probe) => f.write_str(probe.name()),
            Self::Place(place) => write!(f, "at {place}"),
            Self::Instructions { vcpu, count } => {
                write!(f, "{count} instructions of the kernel on vCPU {vcpu}")
            }
            Self::Write { address, size, .. } => write!(f, "write of {size} at {address:#x}"),
        }
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.what.fmt(f)?;
        if let Some(call) = self.call {
            write!(f, " in {}", call.row().name)?;
        }
        match self.thread {
            Some(Who::Number(number)) => write!(f, " of thread {number}")?,
            Some(Who::Hash(hash)) => write!(f, " of the thread with hash {hash}")?,
            None => {}
        }
        if let Some(space) = self.space {
            write!(f, " in space {space}")?;
        }
        match self.count {
            1 => Ok(()),
            n => write!(f, ", time {n}"),
        }
    }
}

/// A condition came true.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Which of the conditions, from 0.
    pub condition: usize,
    /// The vCPU that came to it.
    pub vcpu: u32,
    /// Number of the thread that it is about.
    pub thread: Option<u64>,
    /// The call that the thread has come from user mode with, as far as that was seen.
    pub begun: Option<Entry>,
    /// The call that its registers name now.
    pub call: Option<Entry>,
    /// The address of a fault, a place or a write.
    pub address: u64,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub enum Until {
    /// A condition came true; the machine is paused.
    Hit(Hit),
    /// The machine stopped for good.
    Stopped(StopReason),
    /// The time is up; the machine is paused.
    Late,
}
