//! Never ends.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::spin::main);
