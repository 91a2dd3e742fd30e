//! Arenas: all objects of one type, in one run of memory, named by place and generation.
//!
//! An [`Id`] of a destroyed object never finds the object that took its place, so links between
//! objects need no reference counts and no back lists: a dead link is one that finds nothing.
//! Capacity is fixed at boot; a full arena is an error to whoever wanted an object.
//!
//! Looking an object up is most of what the kernel does, so it is an addition and a comparison: an id says where
//! the slot is, in bytes, and each slot says which id it answers to. There is nothing to check before, because an
//! id comes from the only arena of its type, whose slots stay.

use core::fmt;
use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::num::{NonZeroU32, NonZeroU64};
use core::ops::{Index, IndexMut};
use core::ptr::NonNull;

/// Names an object of type `T` for as long as it lives. An `Option` of it is as small.
#[repr(transparent)]
pub struct Id<T> {
    /// Where its slot is, in bytes from the start of the arena, and above it the generation, which is odd.
    bits: NonZeroU64,
    kind: PhantomData<fn() -> T>,
}

impl<T> Id<T> {
    /// Names nothing, ever: an even generation, and one at which a slot that is free is not the next that is.
    pub const NONE: Self = Self {
        bits: NonZeroU64::new((u32::MAX as u64 - 1) << 32).unwrap(),
        kind: PhantomData,
    };

    /// Where the object is, in bytes from the start of its arena: objects that live at the same time are in
    /// different places.
    #[inline]
    pub const fn offset(self) -> u32 {
        self.bits.get() as u32
    }

    /// Which of the places it has, from 0 on.
    pub const fn index(self) -> u32 {
        self.offset() / Slot::<T>::BYTES
    }
}

impl<T> Clone for Id<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Id<T> {}

impl<T> PartialEq for Id<T> {
    fn eq(&self, other: &Self) -> bool {
        self.bits == other.bits
    }
}

impl<T> Eq for Id<T> {}

/// Whether two names are the same, or both none: their words are compared, where the derived comparison of
/// options looks at each first.
#[inline]
pub const fn same<T>(a: Option<Id<T>>, b: Option<Id<T>>) -> bool {
    const fn word<T>(id: Option<Id<T>>) -> u64 {
        match id {
            Some(id) => id.bits.get(),
            None => 0,
        }
    }
    word(a) == word(b)
}

impl<T> fmt::Debug for Id<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}.{}", self.index(), self.bits.get() >> 32)
    }
}

/// Where an object of type `T` is that is alive as long as this is kept. An `Option` of it is as small.
#[repr(transparent)]
pub struct Position<T> {
    /// The offset of its slot, with a bit that no offset has.
    marked: NonZeroU32,
    kind: PhantomData<fn() -> T>,
}

impl<T> Position<T> {
    const MARK: u32 = 1;

    const fn offset(self) -> u32 {
        self.marked.get() - Self::MARK
    }
}

impl<T> From<Id<T>> for Position<T> {
    #[inline]
    fn from(id: Id<T>) -> Self {
        Self {
            marked: NonZeroU32::MIN | id.offset(),
            kind: PhantomData,
        }
    }
}

impl<T> Clone for Position<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Position<T> {}

impl<T> PartialEq for Position<T> {
    fn eq(&self, other: &Self) -> bool {
        self.marked == other.marked
    }
}

impl<T> Eq for Position<T> {}

impl<T> fmt::Debug for Position<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.offset() / Slot::<T>::BYTES)
    }
}

/// No slot.
const NONE: u32 = u32::MAX;
/// Bit of the name of a slot that holds an object.
const ALIVE: u64 = 1 << 32;

/// The object comes first, and has what alignment the slots have.
#[repr(C)]
struct Slot<T> {
    value: MaybeUninit<T>,
    /// The generation, odd while the slot holds an object, and below it the slot's own offset: the object's id. While
    /// it holds none, the offset is that of the next free slot.
    name: u64,
}

impl<T> Slot<T> {
    const BYTES: u32 = size_of::<Self>() as u32;

    /// The id of the object that it holds.
    #[inline]
    const fn id(&self) -> Option<Id<T>> {
        if self.name & ALIVE == 0 {
            return None;
        }
        Some(Id {
            // SAFETY: it has that bit.
            bits: unsafe { NonZeroU64::new_unchecked(self.name) },
            kind: PhantomData,
        })
    }
}

/// All objects of type `T`.
pub struct Arena<T> {
    slots: NonNull<Slot<T>>,
    /// Bytes of slots.
    size: u32,
    /// Slots from this offset on were never used; their memory is still zero.
    fresh: u32,
    /// The slot that was freed last.
    free: u32,
    live: u32,
}

// SAFETY: an arena owns its memory like a `Vec<T>`.
unsafe impl<T: Send> Send for Arena<T> {}

impl<T> Arena<T> {
    /// Bytes that one object takes.
    pub const STRIDE: usize = size_of::<Slot<T>>();

    /// An arena in `bytes` of zeroed memory at `memory`, of which it uses less than 2 GiB.
    ///
    /// # Safety
    /// The memory must be valid, aligned to 64 bytes, zero, used by nobody else, and stay so. The arena may
    /// be asked only about ids and positions that it has given.
    pub unsafe fn new(memory: NonNull<u8>, bytes: usize) -> Self {
        const { assert!(align_of::<Slot<T>>() <= 64) };
        let slots = bytes.min(i32::MAX as usize) / Self::STRIDE;
        // So that `Id::NONE` looks at memory that is there.
        assert!(slots > 0, "an arena without room");
        Self {
            slots: memory.cast(),
            size: (slots * Self::STRIDE) as u32,
            fresh: 0,
            free: NONE,
            live: 0,
        }
    }

    /// Objects alive.
    pub const fn live(&self) -> u32 {
        self.live
    }

    /// The slot at an offset that an id or a position has, or that is below `fresh`.
    #[inline]
    fn slot(&self, offset: u32) -> &Slot<T> {
        // SAFETY: ids and positions are of this arena, so there is a slot; and never used ones are zero, which is one
        // without an object.
        unsafe { self.slots.byte_add(offset as usize).as_ref() }
    }

    /// As [`slot`](Self::slot).
    #[inline]
    fn slot_mut(&mut self, offset: u32) -> &mut Slot<T> {
        // SAFETY: as in `slot`; `&mut self` makes the access exclusive.
        unsafe { self.slots.byte_add(offset as usize).as_mut() }
    }

    /// Puts `value` into the arena; gives it back if the arena is full.
    pub fn insert(&mut self, value: T) -> Result<Id<T>, T> {
        let offset = if self.free != NONE {
            self.free
        } else if self.fresh < self.size {
            self.fresh += Slot::<T>::BYTES;
            self.fresh - Slot::<T>::BYTES
        } else {
            return Err(value);
        };
        let recycled = self.free == offset;
        let slot = self.slot_mut(offset);
        let next_free = slot.name as u32;
        let bits = slot.name >> 32 << 32 | ALIVE | u64::from(offset);
        slot.value.write(value);
        slot.name = bits;
        if recycled {
            self.free = next_free;
        }
        self.live += 1;
        Ok(Id {
            // SAFETY: it has that bit.
            bits: unsafe { NonZeroU64::new_unchecked(bits) },
            kind: PhantomData,
        })
    }

    /// Takes an object out.
    pub fn remove(&mut self, id: Id<T>) -> Option<T> {
        let free = self.free;
        let slot = self.slot_mut(id.offset());
        if slot.name != id.bits.get() {
            return None;
        }
        let generation = (slot.name >> 32) as u32;
        slot.name = u64::from(generation.wrapping_add(1)) << 32 | u64::from(free);
        // SAFETY: the name was that of a live object, and no longer is.
        let value = unsafe { slot.value.assume_init_read() };
        self.free = id.offset();
        self.live -= 1;
        Some(value)
    }

    /// The object, if it is alive.
    #[inline]
    pub fn get(&self, id: Id<T>) -> Option<&T> {
        let slot = self.slot(id.offset());
        // SAFETY: ids carry odd generations, and such a slot holds an object.
        (slot.name == id.bits.get()).then(|| unsafe { slot.value.assume_init_ref() })
    }

    /// The object, if it is alive.
    #[inline]
    pub fn get_mut(&mut self, id: Id<T>) -> Option<&mut T> {
        let slot = self.slot_mut(id.offset());
        // SAFETY: as in `get`.
        (slot.name == id.bits.get()).then(|| unsafe { slot.value.assume_init_mut() })
    }

    /// Two objects, if they are alive, and not the same.
    #[inline]
    pub fn both(&mut self, a: Id<T>, b: Id<T>) -> Option<(&mut T, &mut T)> {
        let (a, b) = (NonNull::from(self.get_mut(a)?), self.get_mut(b)?);
        if a == NonNull::from(&mut *b) {
            return None;
        }
        // SAFETY: of that object there is no other reference.
        Some((unsafe { &mut *a.as_ptr() }, b))
    }

    /// Where objects can be: the offsets of all slots that were ever used, in order.
    pub fn offsets(&self) -> impl Iterator<Item = u32> + use<T> {
        (0..self.fresh).step_by(Self::STRIDE)
    }

    /// The id of the object at one of the [`offsets`](Self::offsets), if one lives there.
    #[inline]
    pub fn id_at(&self, offset: u32) -> Option<Id<T>> {
        if offset >= self.fresh || !offset.is_multiple_of(Slot::<T>::BYTES) {
            return None;
        }
        self.slot(offset).id()
    }

    /// The id of the object at a position.
    #[inline]
    pub fn name_at(&self, at: Position<T>) -> Id<T> {
        self.at(at).0
    }

    /// The object at a position, with its id.
    #[inline]
    pub fn at(&self, at: Position<T>) -> (Id<T>, &T) {
        let slot = self.slot(at.offset());
        match slot.id() {
            // SAFETY: it has a name, so there is an object.
            Some(id) => (id, unsafe { slot.value.assume_init_ref() }),
            None => panic!("use of a destroyed object"),
        }
    }

    /// As [`at`](Self::at).
    #[inline]
    pub fn member(&mut self, at: Position<T>) -> (Id<T>, &mut T) {
        let slot = self.slot_mut(at.offset());
        match slot.id() {
            // SAFETY: it has a name, so there is an object.
            Some(id) => (id, unsafe { slot.value.assume_init_mut() }),
            None => panic!("use of a destroyed object"),
        }
    }

    /// Ids of all live objects, in order of their places.
    pub fn ids(&self) -> impl Iterator<Item = Id<T>> + '_ {
        self.offsets().filter_map(|offset| self.id_at(offset))
    }
}

impl<T> Index<Id<T>> for Arena<T> {
    type Output = T;

    /// The object, which the caller knows to be alive.
    #[inline]
    fn index(&self, id: Id<T>) -> &T {
        match self.get(id) {
            Some(value) => value,
            None => panic!("use of a destroyed object"),
        }
    }
}

impl<T> Index<Position<T>> for Arena<T> {
    type Output = T;

    /// The object that is there.
    #[inline]
    fn index(&self, at: Position<T>) -> &T {
        &self[self.name_at(at)]
    }
}

impl<T> IndexMut<Position<T>> for Arena<T> {
    #[inline]
    fn index_mut(&mut self, at: Position<T>) -> &mut T {
        self.member(at).1
    }
}

impl<T> IndexMut<Id<T>> for Arena<T> {
    #[inline]
    fn index_mut(&mut self, id: Id<T>) -> &mut T {
        match self.get_mut(id) {
            Some(value) => value,
            None => panic!("use of a destroyed object"),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An arena in leaked host memory.
    pub(crate) fn arena<T>(capacity: usize) -> Arena<T> {
        let layout =
            std::alloc::Layout::from_size_align(capacity * Arena::<T>::STRIDE, 64).unwrap();
        // SAFETY: the layout has a size; the memory is zeroed, aligned and leaked to the arena.
        unsafe {
            let memory = NonNull::new(std::alloc::alloc_zeroed(layout)).unwrap();
            Arena::new(memory, layout.size())
        }
    }

    #[test]
    fn a_dead_id_finds_nothing_even_when_its_slot_is_used_again() {
        let mut arena = arena(2);
        let first = arena.insert(1u64).unwrap();
        assert_eq!(arena.remove(first), Some(1));
        let second = arena.insert(2).unwrap();
        assert_eq!(first.index(), second.index());
        assert_eq!((arena.get(first), arena.get(second)), (None, Some(&2)));
        assert_eq!(arena.remove(first), None);
    }

    #[test]
    fn a_full_arena_gives_the_value_back_and_works_on() {
        let mut arena = arena(2);
        let first = arena.insert(1u64).unwrap();
        arena.insert(2).unwrap();
        assert_eq!(arena.insert(3), Err(3));
        arena.remove(first);
        arena.insert(4).unwrap();
        assert_eq!((arena.live(), arena.insert(5)), (2, Err(5)));
    }
}
