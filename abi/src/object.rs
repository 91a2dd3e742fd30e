//! Object types, and the memory that names an object.
//!
//! An active object is attached to a small piece of physical memory. Whoever has that memory
//! mapped names the object by the address at which it appears (fluke-api 1.3). A program only
//! reserves the memory; what it holds while the object is active is the kernel's affair.

/// Bytes of memory that name an object, and their alignment.
pub const OBJECT_SIZE: u64 = 32;

macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        #[repr(C, align(32))]
        pub struct $name(core::cell::UnsafeCell<[u8; OBJECT_SIZE as usize]>);

        impl $name {
            /// Memory for an object; the object is made by the `create` entry point.
            pub const fn new() -> Self {
                Self(core::cell::UnsafeCell::new([0; OBJECT_SIZE as usize]))
            }

            /// The handle: the address that names the object in this space.
            pub const fn handle(&self) -> *mut Self {
                core::ptr::from_ref(self).cast_mut()
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new()
            }
        }

        // SAFETY: programs never read or write the memory; the kernel serialises all use of it.
        unsafe impl Sync for $name {}
        // SAFETY: as above.
        unsafe impl Send for $name {}
    )*};
}

handles! {
    /// A flow of control, attached to a space.
    Thread
    /// An address space (`fluke_task_t` in the manual, *space* in the papers).
    Task
    /// A range of a space's memory that may be mapped elsewhere.
    Region
    /// A range of memory imported into a space from a region.
    Mapping
    /// The server side end point of IPC.
    Port
    /// A group of ports that server threads wait on.
    Pset
    /// A lock.
    Mutex
    /// A condition variable.
    Cond
    /// A kernel-held link to another object, or null.
    Ref
}

/// Type of an object (`fluke_type_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Type {
    /// No object: the target of a null reference.
    Null = 0,
    /// [`Thread`].
    Thread = 1,
    /// [`Task`].
    Task = 2,
    /// [`Region`].
    Region = 3,
    /// [`Mapping`].
    Mapping = 4,
    /// [`Port`].
    Port = 5,
    /// [`Pset`].
    Pset = 6,
    /// [`Mutex`].
    Mutex = 7,
    /// [`Cond`].
    Cond = 8,
    /// [`Ref`].
    Ref = 9,
}

impl Type {
    /// All types of object, in order of their numbers.
    pub const ALL: [Self; 9] = [
        Self::Thread,
        Self::Task,
        Self::Region,
        Self::Mapping,
        Self::Port,
        Self::Pset,
        Self::Mutex,
        Self::Cond,
        Self::Ref,
    ];

    /// The type's name, as that of its structure.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Null => "Null",
            Self::Thread => "Thread",
            Self::Task => "Task",
            Self::Region => "Region",
            Self::Mapping => "Mapping",
            Self::Port => "Port",
            Self::Pset => "Pset",
            Self::Mutex => "Mutex",
            Self::Cond => "Cond",
            Self::Ref => "Ref",
        }
    }

    /// The type with number `n`.
    pub const fn from_number(n: u64) -> Option<Self> {
        match n {
            0 => Some(Self::Null),
            1..=9 => Some(Self::ALL[n as usize - 1]),
            _ => None,
        }
    }
}
