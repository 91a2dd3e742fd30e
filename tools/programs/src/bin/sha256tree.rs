//! Hashes files with worker spaces on all CPUs.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::sha256tree::main);
