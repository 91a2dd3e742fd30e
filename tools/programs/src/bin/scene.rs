//! One call that can sleep, and what makes it end.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::scene::main);
