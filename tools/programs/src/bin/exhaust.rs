//! Creates objects until the kernel has no room, twice.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::exhaust::main);
