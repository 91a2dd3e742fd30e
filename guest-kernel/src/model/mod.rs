//! The execution model: on which stack the kernel runs, and what becomes of it when a thread waits.
//!
//! This is the only module that knows. Everything else is common: handlers are restartable
//! functions that keep a thread's progress in its registers, and sleep by [`make_way`] alone.
//!
//! | | [process](self) | [interrupt](self) |
//! | --- | --- | --- |
//! | stack | one for each thread | one for each CPU |
//! | `make_way` | the stack is kept, another thread runs; returns `Ok` when woken | the stack is dropped: `Err(Stop::Restart)` |
//! | resuming | from the kept stack | by making the call again, from the thread's registers |
//!
//! Each model provides the same items: [`NAME`], [`STACK_PER_THREAD`], [`Stack`] (what a thread
//! keeps), [`prepare`], [`release`], [`abandon`], [`entry_stack`], [`make_way`], [`switch`],
//! [`resume`].

#[cfg(feature = "process")]
mod process;
#[cfg(feature = "process")]
pub use process::*;

#[cfg(not(feature = "process"))]
mod interrupt;
#[cfg(not(feature = "process"))]
pub use interrupt::*;

#[cfg(all(feature = "process", feature = "interrupt"))]
compile_error!("choose one execution model: `process` or `interrupt`");

#[cfg(all(feature = "full", not(feature = "process")))]
compile_error!("preemption level full needs the process model: a preempted thread keeps its stack");
