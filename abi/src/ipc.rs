//! IPC: the call word in `rax`, and the message parameters.
//!
//! All parameters of a transfer are registers that the kernel advances as data moves, so that at
//! any instant they say what is left (OSDI '99 4.2, 4.3; fluke-api 8.5):
//!
//! | register | meaning |
//! | --- | --- |
//! | `rax` | [`CallWord`]: entry number and four counts |
//! | `rdi` | destination reference (`connect`, `call`, `send`), or port set (`setup`) |
//! | `rsi`, `rdx` | address and words of the current send buffer |
//! | `r9` | table of further send buffers ([`Buffer`]) |
//! | `r12` | table of addresses of references to send |
//! | `r10`, `r8` | address and words of the current receive buffer |
//! | `r13` | table of further receive buffers |
//! | `r14` | table of addresses of reference objects to fill |
//! | `r15` | out: alias of the port that a server's message came through |

use crate::code::Status;

/// Bytes of a message word (`fluke_ipc_word_t`).
pub const WORD_SIZE: u64 = 8;

/// Which of the three flavours of message a server thread received.
///
/// The manual lets the thread resume at one of three registered entry points instead; one number
/// in the returned word is the same information in the terms of a 64-bit ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Flavour {
    /// None.
    None = 0,
    /// One-way: at most once, cut to fit.
    Oneway = 1,
    /// Idempotent: answer with `ipc_reply`.
    Idempotent = 2,
    /// Reliable: the thread is now server of a connection.
    Reliable = 3,
}

impl Flavour {
    /// The flavour with number `n`; anything else is [`Flavour::None`].
    pub const fn from_number(n: u8) -> Self {
        match n {
            1 => Self::Oneway,
            2 => Self::Idempotent,
            3 => Self::Reliable,
            _ => Self::None,
        }
    }
}

/// The word in `rax`: which call, and how many table entries are left.
///
/// | bits | while the call is to be made | when it is done |
/// | --- | --- | --- |
/// | 0-15 | entry number | [`Status`] |
/// | 16-23 | send buffers in the table | left |
/// | 24-31 | references to send | left |
/// | 32-39 | receive buffers in the table | left |
/// | 40-47 | reference objects to fill | left |
/// | 48-55 | [`Flavour`] received so far | flavour |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct CallWord(pub u64);

macro_rules! field {
    ($(#[$doc:meta])* $get:ident $with:ident $shift:literal $ty:ty) => {
        $(#[$doc])*
        pub const fn $get(self) -> $ty {
            (self.0 >> $shift) as $ty
        }

        /// The same word with this field replaced.
        #[must_use]
        pub const fn $with(self, value: $ty) -> Self {
            Self(self.0 & !((<$ty>::MAX as u64) << $shift) | (value as u64) << $shift)
        }
    };
}

impl CallWord {
    field!(/// Entry number, or the status of a completed call.
        number with_number 0 u16);
    field!(/// Send buffers left in the table.
        send_buffers with_send_buffers 16 u8);
    field!(/// References left to send.
        send_refs with_send_refs 24 u8);
    field!(/// Receive buffers left in the table.
        recv_buffers with_recv_buffers 32 u8);
    field!(/// Reference objects left to fill.
        recv_refs with_recv_refs 40 u8);
    field!(/// Number of the flavour received.
        flavour with_flavour 48 u8);

    /// Status of a completed call.
    pub const fn status(self) -> Option<Status> {
        Status::from_number(self.number() as u64)
    }
}

/// One message buffer (`fluke_ipc_buf`).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Buffer {
    /// Address, aligned to [`WORD_SIZE`].
    pub address: u64,
    /// Length in words.
    pub words: u64,
}

/// Message parameters (`fluke_ipc_params`), as user programs keep them. User stubs load them into
/// registers; afterwards the receive fields say what is left unused.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Params {
    /// First send buffer.
    pub send: Buffer,
    /// Further send buffers.
    pub send_table: *const Buffer,
    /// References to pass.
    pub send_ref_table: *const *mut crate::object::Ref,
    /// First receive buffer.
    pub recv: Buffer,
    /// Further receive buffers.
    pub recv_table: *const Buffer,
    /// Reference objects to fill.
    pub recv_ref_table: *const *mut crate::object::Ref,
    /// Entries in `send_table`.
    pub send_buffers: u8,
    /// Entries in `send_ref_table`.
    pub send_refs: u8,
    /// Entries in `recv_table`.
    pub recv_buffers: u8,
    /// Entries in `recv_ref_table`.
    pub recv_refs: u8,
    /// Out: number of the [`Flavour`] received by a server.
    pub flavour: u8,
    /// Room, zero.
    pub reserved: [u8; 3],
    /// Out: alias of the port that a server's message came through.
    pub alias: u64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            send: Buffer::default(),
            send_table: core::ptr::null(),
            send_ref_table: core::ptr::null(),
            recv: Buffer::default(),
            recv_table: core::ptr::null(),
            recv_ref_table: core::ptr::null(),
            send_buffers: 0,
            send_refs: 0,
            recv_buffers: 0,
            recv_refs: 0,
            flavour: 0,
            reserved: [0; 3],
            alias: 0,
        }
    }
}

/// What a keeper receives: an idempotent message of these words, and one reference to the thread.
///
/// Any reply, whatever it holds, makes the thread try again what raised the exception.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ExceptionMessage {
    /// [`EXCEPTION_MAGIC`], to tell a keeper's own requests from the kernel's.
    pub magic: u64,
    /// [`crate::code::Exception`].
    pub code: u64,
    /// As the code says: an address, an insanity, an error code.
    pub subcode: u64,
    /// Page faults: [`crate::state::Prot`] bits of the access.
    pub access: u64,
    /// Page faults: offset in the region whose keeper this is; else 0.
    pub region_offset: u64,
    /// Hash of the region whose keeper this is; 0 at a space's keeper.
    pub region_hash: u64,
    /// Hash of the thread.
    pub thread_hash: u64,
    /// The thread's instruction pointer.
    pub rip: u64,
}

/// What a scheduler receives from a thread that could run, if only it had time: a one-way message of
/// these words, and one reference to the thread (fluke-api 3.6; the words are ours).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TimeRequest {
    /// [`TIME_MAGIC`], to tell a scheduler's own messages from the kernel's.
    pub magic: u64,
    /// The identifier that the scheduler gave the thread.
    pub sched_val: u64,
    /// Hash of the thread.
    pub thread_hash: u64,
}

/// First word of a [`TimeRequest`].
pub const TIME_MAGIC: u64 = u64::from_le_bytes(*b"FLUKETIM");

impl TimeRequest {
    /// Words in the message.
    pub const WORDS: usize = size_of::<Self>() / WORD_SIZE as usize;

    /// The message as words.
    pub const fn to_words(self) -> [u64; Self::WORDS] {
        [self.magic, self.sched_val, self.thread_hash]
    }
}

/// First word of an [`ExceptionMessage`]: no program's request starts like this.
pub const EXCEPTION_MAGIC: u64 = u64::from_le_bytes(*b"FLUKEEXC");

impl ExceptionMessage {
    /// Words in the message.
    pub const WORDS: usize = size_of::<Self>() / WORD_SIZE as usize;

    /// The message as words.
    pub const fn to_words(self) -> [u64; Self::WORDS] {
        [
            self.magic,
            self.code,
            self.subcode,
            self.access,
            self.region_offset,
            self.region_hash,
            self.thread_hash,
            self.rip,
        ]
    }
}
