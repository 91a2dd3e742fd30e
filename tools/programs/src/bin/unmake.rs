//! Unmakes what calls wait for.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::unmake::main);
