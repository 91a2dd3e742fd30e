//! Panics.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::panics::main);
