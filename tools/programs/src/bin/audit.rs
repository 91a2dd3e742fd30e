//! Takes a thread apart in the middle of its calls.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::audit::main);
