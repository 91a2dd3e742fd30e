//! Objects and the physical memory that names them.
//!
//! An active object is found from (page frame, offset): each frame has a short list of the objects
//! whose memory lies in it. Whoever has the frame mapped can name them; whoever has not, cannot.

use core::ptr::NonNull;

use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::object::{OBJECT_SIZE, Type};

use crate::arch::memory::direct;
use crate::arena::Id;
use crate::kernel::Kernel;

/// What every object has; the same for all types, but for whose name it is.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Header<T> {
    /// Physical address of the memory that names the object, and in its low bits, which are zero, the object's
    /// type: one word to look for. 0 before the object is attached to memory.
    memory: u64,
    /// Fixed at creation; different hashes mean different objects (fluke-api 1.4).
    pub hash: u64,
    /// The object itself, at the latest once it is attached to memory.
    id: Id<T>,
    /// Next object in the same frame.
    next: Place,
}

/// The low bits of addresses of objects.
const TYPE_BITS: u64 = OBJECT_SIZE - 1;

const _: () = assert!((Type::ALL.len() as u64) < TYPE_BITS);

/// Where an object's header is: it stays there as long as the object is attached to memory, which is no longer
/// than it lives.
type Place = Option<NonNull<Header<Anything>>>;

/// An object of a type that only its header tells.
enum Anything {}

// SAFETY: places are the arenas', which have no thread affinity.
unsafe impl<T> Send for Header<T> {}

impl<T> Header<T> {
    /// The object's own name, once it has been given it.
    #[inline]
    pub const fn id(&self) -> Id<T> {
        self.id
    }

    /// Gives an object its own name.
    pub const fn set_id(&mut self, id: Id<T>) {
        self.id = id;
    }

    /// Physical address of its memory.
    const fn address(&self) -> u64 {
        self.memory & !TYPE_BITS
    }

    /// Type of the object.
    fn kind(&self) -> Type {
        Type::from_number(self.memory & TYPE_BITS).unwrap_or(Type::Null)
    }

    /// Header of an object not yet attached to memory.
    pub const fn new(hash: u64) -> Self {
        Self {
            memory: 0,
            hash,
            id: Id::NONE,
            next: None,
        }
    }
}

/// Something that can live in an arena and be attached to memory.
pub trait Object: Sized + 'static {
    /// Its type.
    const TYPE: Type;

    /// Its header.
    fn header(&mut self) -> &mut Header<Self>;

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
    heads: &'static mut [Place],
}

impl ObjectTable {
    /// Bytes of table for `memory_size` bytes of memory.
    pub const fn bytes(memory_size: u64) -> u64 {
        memory_size / PAGE_SIZE * size_of::<Place>() as u64
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
        // SAFETY: the caller gives the memory, zero is `None`.
        let heads = unsafe { core::slice::from_raw_parts_mut(direct(at), frames) };
        Self { heads }
    }

    /// The objects in the frame of a physical address.
    #[inline]
    fn in_frame(&self, physical: u64) -> impl Iterator<Item = &Header<Anything>> {
        let head = self.heads.get((physical / PAGE_SIZE) as usize);
        let mut next = head.copied().flatten();
        core::iter::from_fn(move || {
            // SAFETY: what is in the table lives, at that place.
            let header = unsafe { next?.as_ref() };
            next = header.next;
            Some(header)
        })
    }
}

impl Kernel {
    /// The object of type `T` whose memory is at a physical address.
    #[inline]
    pub fn find_object<T: Object>(&self, physical: u64) -> Option<Id<T>> {
        let wanted = physical | T::TYPE as u64;
        for header in self.objects.in_frame(physical) {
            if header.memory == wanted {
                // SAFETY: by its type it is the header of a `T`.
                return Some(unsafe { NonNull::from(header).cast::<Header<T>>().as_ref() }.id());
            }
        }
        None
    }

    /// The type of the object whose memory is there; `Null` if there is none.
    pub fn type_at(&self, physical: u64) -> Type {
        let mut objects = self.objects.in_frame(physical);
        let found = objects.find(|header| header.address() == physical);
        found.map_or(Type::Null, |header| header.kind())
    }

    /// The object with the lowest address at or after `physical`, in the same frame.
    pub fn next_object(&self, physical: u64) -> Option<(u64, Type)> {
        let objects = self.objects.in_frame(physical);
        let next = objects.filter(|header| header.address() >= physical);
        let next = next.min_by_key(|header| header.address())?;
        Some((next.address(), next.kind()))
    }

    /// Attaches an object to the memory at a physical address, which names no object yet.
    pub fn attach<T: Object>(&mut self, id: Id<T>, physical: u64) {
        let place = NonNull::from(T::arena(self)[id].header()).cast();
        let Some(head) = self.objects.heads.get_mut((physical / PAGE_SIZE) as usize) else {
            return;
        };
        let next = head.replace(place);
        let header = T::arena(self)[id].header();
        header.memory = physical | T::TYPE as u64;
        header.set_id(id);
        header.next = next;
    }

    /// Detaches an object from its memory.
    pub fn detach<T: Object>(&mut self, id: Id<T>) {
        let header = T::arena(self)[id].header();
        let (own, memory, after) = (
            NonNull::from(&*header).cast(),
            header.address(),
            header.next,
        );
        let mut next = self.objects.heads.get_mut((memory / PAGE_SIZE) as usize);
        while let Some(place) = next {
            let Some(mut header) = *place else { return };
            if header == own {
                *place = after;
                return;
            }
            // SAFETY: as in `in_frame`.
            next = Some(unsafe { &mut header.as_mut().next });
        }
    }
}
