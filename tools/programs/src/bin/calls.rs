//! Calls for `flukevm run --count` to count.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::calls::main);
