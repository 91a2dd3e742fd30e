//! Threads asleep in every kind of call, to be written to a file and brought back.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::colony::main);
