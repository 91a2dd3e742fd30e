//! Calls every entry point with wild parameters.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::wild::main);
