//! Root program: starts the first program and manages all user memory.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::root::main);
