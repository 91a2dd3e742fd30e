//! A compiler at work on files from a server.
#![no_std]
#![no_main]

libfluke::program!(fluke_benchmarks::compile::main);
