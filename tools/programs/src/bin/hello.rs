//! Prints its arguments and ends with the status given first.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::hello::main);
