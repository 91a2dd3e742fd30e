//! The Fluke kernel.
//!
//! A re-creation of the kernel of Ford, Hibler, Lepreau, McGrath and Tullmann, *Interface and
//! Execution Models in the Fluke Kernel*, OSDI '99: one source, several execution models, and an
//! API whose calls are atomic or divided into atomic stages that are visible in the registers.
//!
//! Read in this order: [`boundary`] (how a call is made), [`call`] (what a handler works with),
//! [`entry`] (the handlers), [`ipc`] (messages), [`mm`] (memory), [`sched`], and last [`model`],
//! the only part that knows on which stack all this happens.
//!
//! Compiled for the host, the crate is a library whose logic is tested there; the bootable image is
//! `main.rs`.
#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

#[cfg(test)]
extern crate std;

#[allow(unsafe_code, reason = "the machine")]
pub mod arch;
#[allow(unsafe_code, reason = "memory of objects")]
pub mod arena;
#[allow(unsafe_code, reason = "leaving stacks")]
pub mod boundary;
#[allow(unsafe_code, reason = "the running thread stays")]
pub mod call;
pub mod clock;
pub mod donation;
pub mod entry;
pub mod ipc;
#[allow(unsafe_code, reason = "dividing the pool")]
pub mod kernel;
#[allow(unsafe_code, reason = "the locks")]
pub mod lock;
pub mod mm;
#[allow(unsafe_code, reason = "stack switching")]
pub mod model;
pub mod mutant;
#[allow(unsafe_code, reason = "memory of the table")]
pub mod object;
#[allow(unsafe_code, reason = "a test in two instructions")]
pub mod probe;
#[allow(unsafe_code, reason = "user mode in the kernel")]
pub mod pseudo;
pub mod queue;
pub mod reference;
#[allow(unsafe_code, reason = "a thread's place")]
pub mod sched;
#[allow(unsafe_code, reason = "the list of free stacks")]
pub mod stacks;
pub mod sync;
pub mod thread;
pub mod wait;
