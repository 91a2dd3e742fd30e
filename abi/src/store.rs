//! The store: a file on the host, behind a port. Requests are idempotent.
//!
//! | request | answer |
//! | --- | --- |
//! | `[READ, offset, bytes]` | `[Answer::Done, bytes read]`, and the bytes |
//! | `[WRITE, offset, bytes]`, and the bytes | `[Answer::Done]` |
//! | `[COMMIT, 0, size]` | `[Answer::Done]`: the file has that size, and what was there before is gone |
//!
//! Bytes are padded to whole words. What is written is seen by reading at once, but is not the host's file
//! before it is committed.

/// Read bytes.
pub const READ: u64 = 1;
/// Write bytes.
pub const WRITE: u64 = 2;
/// What was written is the file.
pub const COMMIT: u64 = 3;

/// Most bytes of one request: whole words.
pub const TRANSFER_MAX: u64 = 32 << 10;

/// First word of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Answer {
    /// It is done.
    Done = 0,
    /// The machine has no such file.
    NoFile = 1,
    /// The host could not do it.
    Failed = 2,
    /// There is no such request.
    BadRequest = 3,
}

impl Answer {
    /// The answer with number `n`; anything unknown is a failure.
    pub const fn from_number(n: u64) -> Self {
        match n {
            0 => Self::Done,
            1 => Self::NoFile,
            3 => Self::BadRequest,
            _ => Self::Failed,
        }
    }
}
