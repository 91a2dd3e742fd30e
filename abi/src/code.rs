//! Return codes, exception codes and insanities (fluke-api 12). The manual gives no numbers;
//! these are ours.

macro_rules! codes {
    ($(#[$outer:meta])* $name:ident: $repr:ty { $($(#[$doc:meta])* $variant:ident = $n:literal,)* }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr($repr)]
        pub enum $name { $($(#[$doc])* $variant = $n,)* }

        impl $name {
            /// Every code, in order of numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The code with number `n`.
            pub const fn from_number(n: u64) -> Option<Self> {
                match n { $($n => Some(Self::$variant),)* _ => None }
            }

            /// The code's name, as in the manual but in camel case.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant),)* }
            }
        }
    };
}

codes! {
    /// What an entry point returns (`fluke_error_t` and `fluke_ipc_error_t` in one).
    Status: u16 {
        /// Done.
        Success = 0,
        /// The kernel's memory pool has no room for the object.
        NoMemory = 1,
        /// `mutex_trylock`: somebody holds the mutex.
        MutexHeld = 2,
        /// `ipc_send`: no live port behind the reference.
        InvalidDest = 3,
        /// `ipc_call`, `connect`: no live port behind the reference.
        ConnectInvalidDest = 4,
        /// The connection was lost while sending.
        SendDisconnected = 5,
        /// The connection was lost while turning over.
        OverDisconnected = 6,
        /// The connection was lost while waiting for the sender to turn over.
        AckDisconnected = 7,
        /// The connection was lost while receiving; also the normal end of a stream.
        RecvDisconnected = 8,
        /// The receive buffers are full; call receive again.
        RecvMoreData = 9,
        /// The slots for references are full; call receive again.
        RecvMoreRefs = 10,
        /// `thread_schedule`: the thread has no use for the time, or no more.
        TimeUnused = 11,
    }
}

codes! {
    /// Besides a message, what makes `thread_schedule` return (`enum wakeup_sensitivity`).
    Wakeup: u64 {
        /// The thread has no more use for the time: it sleeps or is stopped.
        OnBlock = 0,
        /// Nothing; a thread that sleeps has the time again when it is woken.
        OnSwitch = 1,
        /// Nothing; and while the thread sleeps, the time goes to the next that asks the port.
        OnConflict = 2,
    }
}

codes! {
    /// Synchronous and asynchronous exceptions a thread can take.
    ///
    /// The numbers below 32 are the CPU's vectors (SDM vol. 3, 6.3.1).
    Exception: u16 {
        /// `#DE`: divide error.
        DivideError = 0,
        /// `#DB`: debug trap.
        Debug = 1,
        /// `#BP`: breakpoint.
        Breakpoint = 3,
        /// `#OF`: overflow.
        Overflow = 4,
        /// `#BR`: bound range exceeded.
        BoundRange = 5,
        /// `#UD`: invalid opcode.
        InvalidOpcode = 6,
        /// `#SS`: stack-segment fault.
        StackFault = 12,
        /// `#GP`: general protection.
        GeneralProtection = 13,
        /// `#PF`: page fault that no keeper remedied. Subcode: the address.
        PageFault = 14,
        /// `#MF`: x87 floating point.
        X87 = 16,
        /// `#AC`: alignment check.
        AlignmentCheck = 17,
        /// `#XM`: SIMD floating point.
        Simd = 19,
        /// Misuse of an entry point. Subcode: the [`Insanity`].
        Insanity = 32,
        /// `thread_interrupt` was called on the thread.
        Interrupt = 33,
        /// The partner in a connection in which the thread is client sent an alert.
        ClientAlert = 34,
        /// The partner in a connection in which the thread is server sent an alert.
        ServerAlert = 35,
        /// The kernel's pool has no page for a page table. Subcode: the address.
        NoMemory = 36,
        /// An exception the CPU raised that has no name here. Subcode: the vector.
        Other = 37,
    }
}

codes! {
    /// The program is wrong: the call had no effect (`FLUKE_INSANITY_*`).
    Insanity: u16 {
        /// No active object at the handle.
        NoObject = 1,
        /// The object is not a thread.
        NotThread = 2,
        /// The object is not a space.
        NotTask = 3,
        /// The object is not a region.
        NotRegion = 4,
        /// The object is not a mapping.
        NotMapping = 5,
        /// The object is not a port.
        NotPort = 6,
        /// The object is not a port set.
        NotPset = 7,
        /// The object is not a mutex.
        NotMutex = 8,
        /// The object is not a condition variable.
        NotCond = 9,
        /// The object is not a reference.
        NotRef = 10,
        /// The reference does not link to a thread.
        NotThreadRef = 11,
        /// The reference does not link to a space.
        NotTaskRef = 12,
        /// The reference does not link to a region.
        NotRegionRef = 13,
        /// The reference does not link to a port.
        NotPortRef = 14,
        /// The reference does not link to a port set.
        NotPsetRef = 15,
        /// `thread_schedule`: no such sensitivity.
        InvalidObject = 16,
        /// An active object already occupies the memory.
        ObjectExists = 17,
        /// A handle, address or size is not aligned as needed.
        NotAligned = 18,
        /// A range or address is outside what a space may use.
        InvalidAddress = 19,
        /// The mapping overlaps another one or the entry-point area.
        AddressOverlap = 20,
        /// Bad protection value.
        InvalidProt = 21,
        /// The call may not be applied to the caller.
        CurrentThread = 22,
        /// `cur_thread` is not the caller.
        NotCurrentThread = 23,
        /// Two threads manipulate the same thread at once.
        RaceCondition = 24,
        /// The mutex is locked.
        MutexLocked = 25,
        /// The mutex is not locked.
        MutexNotLocked = 26,
        /// The caller does not hold the mutex.
        MutexNotOwner = 27,
        /// The thread is not the sender of the connection.
        NotSender = 28,
        /// The thread is not the receiver of the connection.
        NotReceiver = 29,
        /// A message buffer is not aligned to a word.
        BufferUnaligned = 30,
        /// There is no entry point of that number, or it is not built.
        NoEntry = 31,
        /// Only the root space may do this.
        NotRoot = 32,
        /// Only threads of the kernel's own space may do this.
        NotKernel = 33,
    }
}
