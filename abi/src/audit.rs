//! What the program that takes threads apart in the middle of their calls (`audit`) tells the host, by
//! `machine_tell` with the address of a [`Told`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::state::ThreadState;

/// Hash of the thread that is taken apart, whichever thread object it is at the time.
pub const TARGET_HASH: u64 = u64::from_le_bytes(*b"FLUKETGT");

/// What `rbp` is in the call that is looked at, and in no other: no call uses it.
pub const MARK: u64 = u64::from_le_bytes(*b"FLUKEMRK");

/// Result of a call that raised an exception: this, its code from bit 32 on, and the subcode.
pub const RAISED: u64 = 0xbad0 << 48;

/// Result of a call that has lost registers of its caller's.
pub const LOST: u64 = 0xbad1 << 48;

/// The program's second argument where the target is put together in another machine.
pub const ELSEWHERE: &str = "elsewhere";

/// Calls whose results are kept, of each thread.
pub const RESULTS_MAX: usize = 16;

/// [`Told::news`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum News {
    /// All threads are there, and are about to begin.
    Ready = 1,
    /// The state of the target has been taken; it is about to be destroyed.
    Taken = 2,
    /// All threads have done what they had to.
    Done = 3,
    /// There is no such scene, or it cannot be made.
    Failed = 4,
}

impl News {
    /// The news with number `n`.
    pub const fn from_number(n: u64) -> Option<Self> {
        match n {
            1 => Some(Self::Ready),
            2 => Some(Self::Taken),
            3 => Some(Self::Done),
            4 => Some(Self::Failed),
            _ => None,
        }
    }
}

/// What came of a scene.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Outcome {
    /// How the target's calls ended: `rax`, in order.
    pub target: [u64; RESULTS_MAX],
    /// The same of its partner.
    pub partner: [u64; RESULTS_MAX],
    /// What was left of the parameters of the target's calls: a digest of their registers afterwards, in order.
    pub target_left: [u64; RESULTS_MAX],
    /// The same of its partner.
    pub partner_left: [u64; RESULTS_MAX],
    /// Digest of all memory that the calls fill.
    pub memory: u64,
}

/// What is told.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Told {
    /// [`News`] number.
    pub news: u64,
    /// When done.
    pub outcome: Outcome,
    /// State of the target, once it has been taken.
    pub state: ThreadState,
}
