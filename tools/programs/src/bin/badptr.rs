//! Writes through a wild pointer.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::badptr::main);
