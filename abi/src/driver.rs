//! The kernel's own drivers: threads that run in user mode in the kernel's address space, and serve a
//! port each, as any server does.
//!
//! The root program finds a reference to each port in its page of objects, and hands it on as it likes.
//! Drivers take one-way and idempotent messages, which are answered when all is done that the message
//! asks for; connections they refuse with `ConnectInvalidDest`, because a client could keep the driver
//! waiting with one.

use crate::layout::ROOT_OBJECTS;
use crate::object::OBJECT_SIZE;

/// A driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Driver {
    /// Prints. A message is a count of bytes, in a word, and that much text.
    Console = 0,
    /// Reads and writes a file on the host, see [`crate::store`].
    Store = 1,
}

impl Driver {
    /// Address in the root space of the reference to the driver's port.
    pub const fn reference(self) -> u64 {
        // Behind thread and space.
        ROOT_OBJECTS + (2 + self as u64) * OBJECT_SIZE
    }
}

/// Most words of a message to a driver; a longer one is cut.
pub const MESSAGE_WORDS: usize = 3 + crate::store::TRANSFER_MAX as usize / 8;
