//! The guest programs. Each is a module here, with a few lines in `src/bin` that make it a
//! program; so `clippy` and the host's compiler see them without the guest's flags.
//!
//! | program | what it does |
//! | --- | --- |
//! | [`root`] | the first program: starts the one to run, manages all user memory |
//! | [`tour`] | a narrated self-check of the kernel |
//! | [`sha256tree`] | hashes files with worker spaces on all CPUs |
//! | [`nest`] | runs a program below levels of itself |
//! | [`schedulers`] | two levels of schedulers in user mode |
//! | [`colony`] | sleeps in every kind of call, asks for a checkpoint, and goes on |
//! | [`audit`] | plays a scene, and takes a thread apart when the host rings |
//! | [`calls`] | short calls, to count their instructions |
//! | [`costs`] | where the kernel does least, to count and profile its instructions |
//! | [`scene`] | one call that can sleep, and what makes it end, for scripts |
//! | [`hello`], [`spin`], [`fuzz`], [`badptr`], [`exhaust`], [`faults`], [`wild`], [`panics`], [`console`], [`preempt`], [`stress`], [`unmake`] | tests |
#![no_std]

extern crate alloc;

pub mod audit;
pub mod badptr;
pub mod caller;
pub mod calls;
pub mod colony;
pub mod console;
pub mod costs;
pub mod exhaust;
pub mod faults;
pub mod fuzz;
pub mod handler;
pub mod hello;
pub mod nest;
pub mod panics;
pub mod preempt;
pub mod resume;
pub mod root;
pub mod scene;
pub mod schedulers;
pub mod sha256tree;
pub mod spin;
pub mod stress;
pub mod tour;
pub mod unmake;
pub mod wild;

/// Status of a program whose self-check failed.
const FAILED: u64 = 1;
/// Status of a program that was called in a wrong way.
const USAGE: u64 = 2;
