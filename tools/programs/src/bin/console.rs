//! Makes life hard for the driver of the console.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::console::main);
