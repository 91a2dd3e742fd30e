//! The machine: everything that touches CPU state, I/O ports or raw memory.
//!
//! All `unsafe` of the kernel is here, in [`crate::arena`] and in the execution model's stack
//! switching.

pub mod apic;
pub mod cpu;
pub mod entry;
pub mod fpu;
pub mod instructions;
pub mod memory;
