//! The kernel's primitives, timed.
#![no_std]
#![no_main]

libfluke::program!(fluke_benchmarks::flukeperf::main);
