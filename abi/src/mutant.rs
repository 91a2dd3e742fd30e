//! Bugs that a kernel built for tests alone can be told to have, one at a time, by [`BootInfo::mutant`]:
//! whatever looks for bugs must find each. No other kernel has any trace of them.
//!
//! [`BootInfo::mutant`]: crate::boot::BootInfo::mutant

/// Makes [`Mutant`] of names and texts.
macro_rules! mutants {
    ($($name:ident: $doc:literal;)*) => {
        /// A bug.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        #[allow(non_camel_case_types, reason = "as users write them")]
        pub enum Mutant {
            /// None.
            none,
            /// No bug, but slow: something to find for who compares costs. Not among [`Mutant::ALL`].
            slow_transfer,
            $(#[doc = $doc] $name,)*
        }

        impl Mutant {
            /// All that are bugs.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Its name.
            pub const fn name(self) -> &'static str {
                match self {
                    Self::none => "none",
                    Self::slow_transfer => "slow_transfer",
                    $(Self::$name => stringify!($name),)*
                }
            }

            /// What is wrong.
            pub const fn doc(self) -> &'static str {
                match self {
                    Self::none => "Nothing is wrong.",
                    Self::slow_transfer => "Each transfer of a message first turns in a loop.",
                    $(Self::$name => $doc,)*
                }
            }
        }
    };
}

mutants! {
    pointer_not_advanced: "The receiver's pointer stays where it was after a piece of a message.";
    words_kept: "On the fast path the receiver's registers stay as they were.";
    advanced_before_copy: "A message moves on in both threads' registers before its memory was looked up.";
    table_not_advanced: "The pointer into a table of buffers stays, while its count goes down.";
    reference_again: "The count of references goes down, the pointer into their table does not.";
    progress_after_preemption: "The receiver's progress is still in the kernel's variables at a preemption point.";
    search_torn: "A search has moved its offset on, but not its registers, when others may have the kernel.";
    completed_early: "A call is done for its caller before it has done what it is for.";
    handover_on_stack: "Who is handed a mutex completes its call itself, when it wakes.";
    cond_wait_again: "A thread asleep in cond_wait would wait again, without its mutex.";
    cond_wait_torn: "cond_wait lets go of its mutex before it is mutex_lock.";
    connect_again: "A client that a server has connected to would connect again.";
    over_on_stack: "That the connection was turned over is known only to the stack of who waits for the answer.";
    kernel_mutex_kept: "Who waits still has the kernel mutex.";
    sender_not_exported: "The exported state does not say who is the sender.";
    handlers_not_exported: "The exported state has no handlers.";
    pset_not_exported: "The exported state has no port set.";
    pending_not_exported: "The exported state does not tell of exceptions held back.";
    fpu_not_exported: "The exported state has no x87 and SSE registers.";
    register_not_exported: "The exported state has no rbx.";
    priority_not_imported: "A thread that is made from a state has the priority that it had.";
    exceptions_not_imported: "A thread that is made from a state has exceptions disabled.";
    partner_not_imported: "A thread that is made from a state is not its partner's partner.";
    connection_broken: "A connection breaks with the thread, though its state was exported.";
    client_forgotten: "Who waits for a reply of a thread that is destroyed goes on waiting.";
    reply_unlooked: "Who replies does not look whether the client still waits.";
    waiter_left: "A destroyed client stays in the queue of its port.";
    sleeper_left: "A destroyed thread stays among those that sleep by the clock.";
    attention_not_called: "A thread that enables exceptions does not look at those held back.";
    translation_left: "A page table keeps what came through a mapping that is withdrawn.";
    stop_unheard: "A thread that runs on another CPU is not told that it is to stop.";
    stop_not_awaited: "Who stops a thread that runs on another CPU does not wait until it has stopped.";
    doorbell_lost: "Who waits for the doorbell when it rings does not wake.";
}

impl Mutant {
    /// The bug of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|mutant| mutant.name() == name)
    }
}
