//! Runs a program that can be written to a file and brought back.
#![no_std]
#![no_main]

libfluke::program!(fluke_checkpoint::program::main);
