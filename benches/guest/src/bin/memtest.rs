//! Memory touched byte by byte, under a memory manager.
#![no_std]
#![no_main]

libfluke::program!(fluke_benchmarks::memtest::main);
