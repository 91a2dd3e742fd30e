//! Objects and the physical memory that names them.
//!
//! An active object is found from (page frame, offset): each frame has a short list of the objects
//! whose memory lies in it. Whoever has the frame mapped can name them; whoever has not, cannot.

use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::object::Type;

use crate::arch::memory::direct;
use crate::arena::Id;
use crate::kernel::Kernel;

/// Type and arena index of an object, packed; 0 is nothing.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(transparent)]
pub struct Name(u32);

const TYPE_SHIFT: u32 = 28;

impl Name {
    /// No object.
    pub const NONE: Self = Self(0);

    const fn new(kind: Type, index: u32) -> Self {
        Self((kind as u32) << TYPE_SHIFT | index)
    }

    /// The object's type; `Null` for [`Name::NONE`].
    pub fn kind(self) -> Type {
        Type::from_number(u64::from(self.0 >> TYPE_SHIFT)).unwrap_or(Type::Null)
    }

    /// The object's index in the arena of its type.
    pub const fn index(self) -> u32 {
        self.0 & ((1 << TYPE_SHIFT) - 1)
    }
}

/// What every object has.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Physical address of the memory that names the object.
    pub memory: u64,
    /// Fixed at creation; different hashes mean different objects (fluke-api 1.4).
    pub hash: u64,
    /// Next object in the same frame.
    next: Name,
}

impl Header {
    /// Header of an object not yet attached to memory.
    pub const fn new(hash: u64) -> Self {
        Self {
            memory: 0,
            hash,
            next: Name::NONE,
        }
    }
}

/// Something that can live in an arena and be attached to memory.
pub trait Object: Sized + 'static {
    /// Its type.
    const TYPE: Type;

    /// Its header.
    fn header(&mut self) -> &mut Header;

    /// The arena of all objects of the type.
    fn arena(kernel: &mut Kernel) -> &mut crate::arena::Arena<Self>;
}

/// A link to an object of any type, dead once the object is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the variants are the types of that name")]
pub enum Link {
    #[default]
    Null,
    Thread(Id<crate::thread::Thread>),
    Task(Id<crate::mm::Space>),
    Region(Id<crate::mm::Region>),
    Mapping(Id<crate::mm::Mapping>),
    Port(Id<crate::ipc::Port>),
    Pset(Id<crate::ipc::Pset>),
    Mutex(Id<crate::sync::Mutex>),
    Cond(Id<crate::sync::Cond>),
}

/// Lists of objects by frame.
pub struct ObjectTable {
    heads: &'static mut [Name],
}

impl ObjectTable {
    /// Bytes of table for `memory_size` bytes of memory.
    pub const fn bytes(memory_size: u64) -> u64 {
        memory_size / PAGE_SIZE * size_of::<Name>() as u64
    }

    /// A table of no frames.
    pub const fn empty() -> Self {
        Self { heads: &mut [] }
    }

    /// A table for `memory_size` bytes of memory in zeroed memory at physical address `at`.
    ///
    /// # Safety
    /// The memory must be the table's alone.
    pub unsafe fn new(at: u64, memory_size: u64) -> Self {
        let frames = (memory_size / PAGE_SIZE) as usize;
        // SAFETY: the caller gives the memory, zero is `Name::NONE`.
        let heads = unsafe { core::slice::from_raw_parts_mut(direct(at), frames) };
        Self { heads }
    }

    /// First object in the frame of a physical address.
    #[inline]
    pub fn first(&self, physical: u64) -> Name {
        self.heads
            .get((physical / PAGE_SIZE) as usize)
            .copied()
            .unwrap_or(Name::NONE)
    }
}

impl Kernel {
    /// The header of a live object.
    pub fn header(&mut self, name: Name) -> Option<&mut Header> {
        fn at<T: Object>(kernel: &mut Kernel, index: u32) -> Option<&mut Header> {
            let arena = T::arena(kernel);
            let id = arena.id_at(index)?;
            arena.get_mut(id).map(T::header)
        }
        let index = name.index();
        match name.kind() {
            Type::Null => None,
            Type::Thread => at::<crate::thread::Thread>(self, index),
            Type::Task => at::<crate::mm::Space>(self, index),
            Type::Region => at::<crate::mm::Region>(self, index),
            Type::Mapping => at::<crate::mm::Mapping>(self, index),
            Type::Port => at::<crate::ipc::Port>(self, index),
            Type::Pset => at::<crate::ipc::Pset>(self, index),
            Type::Mutex => at::<crate::sync::Mutex>(self, index),
            Type::Cond => at::<crate::sync::Cond>(self, index),
            Type::Ref => at::<crate::reference::Ref>(self, index),
        }
    }

    /// The object whose memory is at a physical address.
    pub fn find_object(&mut self, physical: u64) -> Name {
        let mut name = self.objects.first(physical);
        while let Some(header) = self.header(name) {
            if header.memory == physical {
                return name;
            }
            name = header.next;
        }
        Name::NONE
    }

    /// The object with the lowest address at or after `physical`, in the same frame.
    pub fn next_object(&mut self, physical: u64) -> Option<(u64, Type)> {
        let mut best: Option<(u64, Type)> = None;
        let mut name = self.objects.first(physical);
        while let Some(header) = self.header(name) {
            let at = header.memory;
            let next = header.next;
            if at >= physical && best.is_none_or(|(other, _)| at < other) {
                best = Some((at, name.kind()));
            }
            name = next;
        }
        best
    }

    /// Attaches an object to the memory at a physical address, which names no object yet.
    pub fn attach<T: Object>(&mut self, id: Id<T>, physical: u64) {
        let name = Name::new(T::TYPE, id.index());
        let Some(head) = self.objects.heads.get_mut((physical / PAGE_SIZE) as usize) else {
            return;
        };
        let next = core::mem::replace(head, name);
        let header = T::arena(self)[id].header();
        header.memory = physical;
        header.next = next;
    }

    /// Detaches an object from its memory.
    pub fn detach<T: Object>(&mut self, id: Id<T>) {
        let name = Name::new(T::TYPE, id.index());
        let Header { memory, next, .. } = *T::arena(self)[id].header();
        let frame = (memory / PAGE_SIZE) as usize;
        let mut at = self.objects.first(memory);
        if at == name {
            self.objects.heads[frame] = next;
            return;
        }
        while let Some(header) = self.header(at) {
            if header.next == name {
                header.next = next;
                return;
            }
            at = header.next;
        }
    }
}
