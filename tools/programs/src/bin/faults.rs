//! Faults on every pointer of every entry point, and interruption at every wait.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::faults::main);
