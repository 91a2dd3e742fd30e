//! A narrated self-check of the kernel; what `flukevm run` runs.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::tour::main);
