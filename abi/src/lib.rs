//! The contract between the Fluke kernel, its user programs and the `flukevm` host.
//!
//! Everything that two of the three must agree on is here and nowhere else:
//!
//! * [`entry`]: the one table of entry points. Kernel dispatch, user stubs, the C header and the
//!   documentation are generated from it.
//! * [`error`]: which codes each entry point can end with.
//! * [`object`]: object types and the memory that names an object.
//! * [`state`]: the structures that hold an object's exported state.
//! * [`code`]: return codes, exception codes, insanities.
//! * [`ipc`]: the call word and the message parameters.
//! * [`layout`]: the addresses everybody knows.
//! * [`audit`]: what the program that takes threads apart tells the host.
//! * [`mod@bench`]: what benchmark programs tell the host.
//! * [`boot`]: what the host hands to the kernel and to the root program.
//! * [`port`]: the I/O ports of the machine.
//! * [`probe`]: the places in the kernel where the host can pause the machine.
//! * [`driver`]: the kernel's own drivers, and what they understand.
//! * [`stats`]: counters that the kernel keeps for the host.
//! * [`store`]: requests to the file on the host.
//!
//! The crate has no code of its own beyond accessors, and builds without `std`.
#![no_std]

pub mod audit;
pub mod bench;
pub mod boot;
pub mod code;
pub mod driver;
pub mod entry;
pub mod error;
pub mod ipc;
pub mod layout;
pub mod mutant;
pub mod object;
pub mod port;
pub mod probe;
pub mod state;
pub mod stats;
pub mod store;

/// Version of everything in this crate. A kernel, a program and a host work together only if
/// they carry the same one.
pub const ABI_VERSION: u32 = 4;
