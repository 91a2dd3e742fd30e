//! Short calls, for `flukevm run --count` and `--profile` to count.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::costs::main);
