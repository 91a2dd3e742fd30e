//! Runtime of Fluke user programs.
//!
//! * [`sys`]: one stub for each entry point, generated from the table in [`fluke_abi::entry`].
//! * [`object`]: the nine kinds of kernel object, with their calls as methods.
//! * [`thread`], [`rpc`], [`space`]: threads, messages, and child spaces made of one's own memory.
//! * [`supervisor`]: a whole program as a child, with the memory it asks for.
//! * [`startup`], [`parent`], [`exception`]: what a program is given, and whom it can turn to.
//! * [`print!`], [`println!`]: text on the machine's console.
//!
//! With the feature `guest` the crate is also the program's only runtime: start code, panic
//! handler, allocator and memory functions. A program then looks like this:
//!
//! ```ignore
//! #![no_std]
//! #![no_main]
//! libfluke::program!(main);
//!
//! fn main() -> u64 {
//!     libfluke::println!("hello");
//!     0
//! }
//! ```
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub use fluke_abi as abi;

pub mod console;
pub mod elf;
pub mod exception;
pub mod heap;
pub mod object;
pub mod parent;
pub mod rpc;
pub mod space;
pub mod startup;
pub mod supervisor;
#[allow(
    rustdoc::broken_intra_doc_links,
    reason = "the table cites the manual as `[node n]`"
)]
pub mod sys;
pub mod thread;

#[cfg(feature = "guest")]
mod memory;
#[cfg(feature = "guest")]
mod panic;
#[cfg(feature = "guest")]
mod start;

pub use fluke_abi::code::Status;
pub use parent::exit;

/// Names the function that a program starts with. It returns the program's exit status.
#[macro_export]
macro_rules! program {
    ($main:path) => {
        /// Called by the start code of `libfluke`.
        #[unsafe(no_mangle)]
        extern "Rust" fn fluke_main() -> u64 {
            $main()
        }
    };
}
