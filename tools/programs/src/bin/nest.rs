//! Runs a program below levels of itself.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::nest::main);
