//! What taking and giving state needs to know of each type of object.
//!
//! The calls have the same form for all of them (fluke-api 2): the object, its state structure, then a
//! reference object for each link. So one table does for nine types.

use fluke_abi::entry::Entry;
use fluke_abi::object::Type;
use fluke_abi::state::{
    CondState, MappingState, MutexState, PortState, PsetState, RegionState, TaskState, ThreadState,
};

/// A link in an object's state.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// Which parameter of `get_state` and `set_state` it is.
    pub parameter: usize,
    /// Type of what it links to; `Null` is any.
    pub target: Type,
}

impl Slot {
    const fn new(parameter: usize, target: Type) -> Self {
        Self { parameter, target }
    }

    /// Whether it can link to an object whose type has that number.
    pub fn accepts(self, kind: u8) -> bool {
        match self.target {
            Type::Null => kind != Type::Ref as u8,
            target => kind == target as u8,
        }
    }
}

/// The calls of a type.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// The type.
    pub kind: Type,
    /// Makes an object of it, with a hash if it has one.
    pub create: Entry,
    /// Makes a reference link to one; references have none.
    pub reference: Option<Entry>,
    /// Takes the state.
    pub get: Entry,
    /// Gives it.
    pub set: Entry,
    /// Bytes of the state structure, which begins with the hash; references have none.
    pub state: usize,
    /// Its links. `waiting_for` of a thread is not among them: what a thread waits for is in its registers.
    pub links: &'static [Slot],
}

/// Every type, in order of numbers.
pub const KINDS: [Kind; 9] = [
    Kind {
        kind: Type::Thread,
        create: Entry::thread_create_hash,
        reference: Some(Entry::thread_reference),
        get: Entry::thread_get_state,
        set: Entry::thread_set_state,
        state: size_of::<ThreadState>(),
        links: &[
            Slot::new(2, Type::Task),
            Slot::new(3, Type::Port),
            Slot::new(5, Type::Thread),
            Slot::new(6, Type::Thread),
        ],
    },
    Kind {
        kind: Type::Task,
        create: Entry::task_create_hash,
        reference: Some(Entry::task_reference),
        get: Entry::task_get_state,
        set: Entry::task_set_state,
        state: size_of::<TaskState>(),
        links: &[Slot::new(2, Type::Port)],
    },
    Kind {
        kind: Type::Region,
        create: Entry::region_create_hash,
        reference: Some(Entry::region_reference),
        get: Entry::region_get_state,
        set: Entry::region_set_state,
        state: size_of::<RegionState>(),
        links: &[Slot::new(2, Type::Task), Slot::new(3, Type::Port)],
    },
    Kind {
        kind: Type::Mapping,
        create: Entry::mapping_create_hash,
        reference: Some(Entry::mapping_reference),
        get: Entry::mapping_get_state,
        set: Entry::mapping_set_state,
        state: size_of::<MappingState>(),
        links: &[Slot::new(2, Type::Region), Slot::new(3, Type::Task)],
    },
    Kind {
        kind: Type::Port,
        create: Entry::port_create_hash,
        reference: Some(Entry::port_reference),
        get: Entry::port_get_state,
        set: Entry::port_set_state,
        state: size_of::<PortState>(),
        links: &[Slot::new(2, Type::Pset)],
    },
    Kind {
        kind: Type::Pset,
        create: Entry::pset_create_hash,
        reference: Some(Entry::pset_reference),
        get: Entry::pset_get_state,
        set: Entry::pset_set_state,
        state: size_of::<PsetState>(),
        links: &[],
    },
    Kind {
        kind: Type::Mutex,
        create: Entry::mutex_create_hash,
        reference: Some(Entry::mutex_reference),
        get: Entry::mutex_get_state,
        set: Entry::mutex_set_state,
        state: size_of::<MutexState>(),
        links: &[Slot::new(2, Type::Thread)],
    },
    Kind {
        kind: Type::Cond,
        create: Entry::cond_create_hash,
        reference: Some(Entry::cond_reference),
        get: Entry::cond_get_state,
        set: Entry::cond_set_state,
        state: size_of::<CondState>(),
        links: &[Slot::new(2, Type::Thread)],
    },
    // A reference is its link: to copy it takes it out, to copy another over it puts one in.
    Kind {
        kind: Type::Ref,
        create: Entry::ref_create,
        reference: None,
        get: Entry::ref_copy,
        set: Entry::ref_copy,
        state: 0,
        links: &[Slot::new(1, Type::Null)],
    },
];

/// The calls of a type.
pub fn kind_of(kind: Type) -> Option<&'static Kind> {
    KINDS.iter().find(|row| row.kind == kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_where_their_types_do_and_name_calls_of_that_type() {
        for (row, kind) in KINDS.iter().zip(Type::ALL) {
            assert_eq!(row.kind, kind);
            for entry in [row.create, row.get, row.set]
                .into_iter()
                .chain(row.reference)
            {
                assert_eq!(entry.row().object, kind.name(), "{}", entry.row().name);
            }
        }
    }

    #[test]
    fn links_are_the_reference_parameters_of_the_calls() {
        for row in KINDS.iter().filter(|row| row.kind != Type::Ref) {
            for entry in [row.get, row.set] {
                let parameters = entry.row().parameters;
                let references: alloc::vec::Vec<_> = (1..parameters.len())
                    .filter(|&n| {
                        parameters[n].1.ends_with("Ref") && parameters[n].0 != "waiting_for"
                    })
                    .collect();
                let links: alloc::vec::Vec<_> =
                    row.links.iter().map(|slot| slot.parameter).collect();
                assert_eq!(links, references, "{}", entry.row().name);
            }
        }
    }
}
