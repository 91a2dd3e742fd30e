//! Mutexes, condition variables and IPC between eight threads.
#![no_std]
#![no_main]

libfluke::program!(fluke_programs::stress::main);
