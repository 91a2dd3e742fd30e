//! Programs that measure the kernel from inside. `flukevm bench` runs them in every configuration, and says what
//! their lines mean; each can be run by itself.
//!
//! | program | what it does |
//! | --- | --- |
//! | [`flukeperf`] | every synchronisation and message primitive, many times; other calls |
//! | [`memtest`] | touches memory one byte at a time, under a memory manager that provides it page by page |
//! | [`compile`] | compiles shaders that it reads from a file server |
//!
//! They are here, and not among `tools/programs`, because of what they are made of: `compile` is mostly a compiler.
#![no_std]

extern crate alloc;

pub mod compile;
pub mod flukeperf;
pub mod memtest;
pub mod meter;
pub mod neighbour;

/// Status of a program that could not do its work.
const FAILED: u64 = 1;
/// Status of a program that was called in a wrong way.
const USAGE: u64 = 2;
