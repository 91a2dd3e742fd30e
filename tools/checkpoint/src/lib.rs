//! A user-mode checkpointer (Tullmann et al., *User-level Checkpointing Through Exportable Kernel State*,
//! IWOOOS '96): an ordinary program that runs another below itself, writes all of it to a file, and brings
//! it back from there, in the same machine or in one with another kernel configuration, other CPUs, another
//! host. The program in question, which may be many spaces with many threads, knows nothing of it.
//!
//! * [`format`](mod@format): the file; also read by the host, which refuses what cannot be restored.
//! * [`kinds`]: the calls that take and give the state of each type of object.
//! * [`environment`]: what is to be written: memory, objects, links to the outside.
//! * [`take`]: stopping it, and taking it down; [`restore`]: making it again.
//! * [`store`]: the file on the host; [`program`]: the program.
#![no_std]

extern crate alloc;

pub mod environment;
pub mod format;
pub mod kinds;
pub mod program;
pub mod restore;
pub mod store;
pub mod take;
