//! Long messages under the eyes of a more important thread.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::fuzz::main);
