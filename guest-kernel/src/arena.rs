//! Arenas: all objects of one type, in one run of memory, named by index and generation.
//!
//! An [`Id`] of a destroyed object never finds the object that took its place, so links between
//! objects need no reference counts and no back lists: a dead link is one that finds nothing.
//! Capacity is fixed at boot; a full arena is an error to whoever wanted an object.

use core::fmt;
use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::num::{NonZeroU32, NonZeroU64};
use core::ops::{Index, IndexMut};
use core::ptr::NonNull;

/// Names an object of type `T` for as long as it lives. An `Option` of it is as small.
#[repr(transparent)]
pub struct Id<T> {
    /// Position in the arena, and above it the generation, which is odd.
    bits: NonZeroU64,
    kind: PhantomData<fn() -> T>,
}

impl<T> Id<T> {
    /// Names nothing, ever.
    pub const NONE: Self = Self::new(NONE, 1);

    /// The name of what lives at `index` since that generation.
    #[inline]
    pub const fn new(index: u32, generation: u32) -> Self {
        // An odd number stays what it is.
        let bits = ((generation | 1) as u64) << 32 | index as u64;
        Self {
            bits: match NonZeroU64::new(bits) {
                Some(bits) => bits,
                None => NonZeroU64::MAX,
            },
            kind: PhantomData,
        }
    }

    /// The same name, as that of an object of another type.
    #[inline]
    pub const fn cast<U>(self) -> Id<U> {
        Id {
            bits: self.bits,
            kind: PhantomData,
        }
    }

    /// Position in the arena; objects that live at the same time have different ones.
    #[inline]
    pub const fn index(self) -> u32 {
        self.bits.get() as u32
    }

    /// Which of the objects that have lived there.
    #[inline]
    pub const fn generation(self) -> u32 {
        (self.bits.get() >> 32) as u32
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
        write!(f, "#{}.{}", self.index(), self.generation())
    }
}

/// Where an object of type `T` is that is alive as long as this is kept. An `Option` of it is as small.
#[repr(transparent)]
pub struct Position<T> {
    /// The bits of its index, inverted: those of [`NONE`] are all ones.
    inverted: NonZeroU32,
    kind: PhantomData<fn() -> T>,
}

impl<T> Position<T> {
    const fn index(self) -> u32 {
        !self.inverted.get()
    }
}

impl<T> From<Id<T>> for Position<T> {
    #[inline]
    fn from(id: Id<T>) -> Self {
        Self {
            // That of `Id::NONE`, which is nowhere, becomes another place where nothing is.
            inverted: NonZeroU32::new(!id.index()).unwrap_or(NonZeroU32::MIN),
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
        self.inverted == other.inverted
    }
}

impl<T> Eq for Position<T> {}

impl<T> fmt::Debug for Position<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.index())
    }
}

/// No slot.
const NONE: u32 = u32::MAX;

/// The object comes first, and has what alignment the slots have.
#[repr(C)]
struct Slot<T> {
    value: MaybeUninit<T>,
    /// While the slot holds an object, its own position; while it does not, the next free slot.
    next: u32,
    /// Odd while the slot holds an object. The two words are then the object's name.
    generation: u32,
}

impl<T> Slot<T> {
    /// Whether it holds the object of that name.
    #[inline]
    const fn holds(&self, id: Id<T>) -> bool {
        self.word() == id.bits.get()
    }

    /// The name of the object that it holds.
    #[inline]
    const fn name(&self) -> Option<Id<T>> {
        if self.generation.is_multiple_of(2) {
            return None;
        }
        Some(Id {
            // SAFETY: an odd number is part of it.
            bits: unsafe { NonZeroU64::new_unchecked(self.word()) },
            kind: PhantomData,
        })
    }

    const fn word(&self) -> u64 {
        (self.generation as u64) << 32 | self.next as u64
    }
}

/// All objects of type `T`.
pub struct Arena<T> {
    slots: NonNull<Slot<T>>,
    capacity: u32,
    /// Slots from here on were never used; their memory is still zero.
    fresh: u32,
    free: u32,
    live: u32,
}

// SAFETY: an arena owns its memory like a `Vec<T>`.
unsafe impl<T: Send> Send for Arena<T> {}

impl<T> Arena<T> {
    /// Bytes that one object takes.
    pub const STRIDE: usize = size_of::<Slot<T>>();

    /// An arena with room for nothing.
    pub const fn empty() -> Self {
        Self {
            slots: NonNull::dangling(),
            capacity: 0,
            fresh: 0,
            free: NONE,
            live: 0,
        }
    }

    /// An arena in `bytes` of zeroed memory at `memory`.
    ///
    /// # Safety
    /// The memory must be valid, aligned to 64 bytes, zero, used by nobody else, and stay so.
    pub unsafe fn new(memory: NonNull<u8>, bytes: usize) -> Self {
        const { assert!(align_of::<Slot<T>>() <= 64) };
        let capacity = (bytes / Self::STRIDE).min(NONE as usize - 1) as u32;
        Self {
            slots: memory.cast(),
            capacity,
            fresh: 0,
            free: NONE,
            live: 0,
        }
    }

    /// Objects alive.
    pub const fn live(&self) -> u32 {
        self.live
    }

    /// Objects there is room for in all.
    pub const fn capacity(&self) -> u32 {
        self.capacity
    }

    #[inline]
    fn slot(&self, index: u32) -> Option<&Slot<T>> {
        // SAFETY: slots below `fresh` lie in the arena's memory and are initialised.
        (index < self.fresh).then(|| unsafe { self.slots.add(index as usize).as_ref() })
    }

    #[inline]
    fn slot_mut(&mut self, index: u32) -> Option<&mut Slot<T>> {
        // SAFETY: as in `slot`; `&mut self` makes the access exclusive.
        (index < self.fresh).then(|| unsafe { self.slots.add(index as usize).as_mut() })
    }

    /// Puts `value` into the arena; gives it back if the arena is full.
    pub fn insert(&mut self, value: T) -> Result<Id<T>, T> {
        let index = if self.free != NONE {
            self.free
        } else if self.fresh < self.capacity {
            self.fresh += 1;
            self.fresh - 1
        } else {
            return Err(value);
        };
        let recycled = self.free == index;
        let Some(slot) = self.slot_mut(index) else {
            return Err(value);
        };
        slot.generation = slot.generation.wrapping_add(1);
        slot.value.write(value);
        let generation = slot.generation;
        let next_free = core::mem::replace(&mut slot.next, index);
        if recycled {
            self.free = next_free;
        }
        self.live += 1;
        Ok(Id::new(index, generation))
    }

    /// Takes an object out.
    pub fn remove(&mut self, id: Id<T>) -> Option<T> {
        let free = self.free;
        let slot = self.slot_mut(id.index()).filter(|slot| slot.holds(id))?;
        slot.generation = slot.generation.wrapping_add(1);
        slot.next = free;
        // SAFETY: the generation was that of a live object, and no longer is.
        let value = unsafe { slot.value.assume_init_read() };
        self.free = id.index();
        self.live -= 1;
        Some(value)
    }

    /// The object, if it is alive.
    #[inline]
    pub fn get(&self, id: Id<T>) -> Option<&T> {
        let slot = self.slot(id.index()).filter(|slot| slot.holds(id))?;
        // SAFETY: ids carry odd generations, and such a slot holds an object.
        Some(unsafe { slot.value.assume_init_ref() })
    }

    /// The object, if it is alive.
    #[inline]
    pub fn get_mut(&mut self, id: Id<T>) -> Option<&mut T> {
        let slot = self.slot_mut(id.index()).filter(|slot| slot.holds(id))?;
        // SAFETY: as in `get`.
        Some(unsafe { slot.value.assume_init_mut() })
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

    /// The id of the object at `index`, if one lives there.
    #[inline]
    pub fn id_at(&self, index: u32) -> Option<Id<T>> {
        self.slot(index).and_then(Slot::name)
    }

    /// The name of the object at a position.
    #[inline]
    pub fn name_at(&self, at: Position<T>) -> Id<T> {
        match self.slot(at.index()).and_then(Slot::name) {
            Some(id) => id,
            None => panic!("use of a destroyed object"),
        }
    }

    /// The object at a position, with its name.
    #[inline]
    pub fn at(&self, at: Position<T>) -> (Id<T>, &T) {
        match self.slot(at.index()).map(|slot| (slot.name(), slot)) {
            // SAFETY: it has a name, so there is an object.
            Some((Some(id), slot)) => (id, unsafe { slot.value.assume_init_ref() }),
            _ => panic!("use of a destroyed object"),
        }
    }

    /// As [`at`](Self::at).
    #[inline]
    pub fn member(&mut self, at: Position<T>) -> (Id<T>, &mut T) {
        match self.slot_mut(at.index()).map(|slot| (slot.name(), slot)) {
            // SAFETY: it has a name, so there is an object.
            Some((Some(id), slot)) => (id, unsafe { slot.value.assume_init_mut() }),
            _ => panic!("use of a destroyed object"),
        }
    }

    /// Ids of all live objects, in order of their indexes.
    pub fn ids(&self) -> impl Iterator<Item = Id<T>> + '_ {
        (0..self.fresh).filter_map(|index| self.id_at(index))
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
