//! References: kernel-held links to other objects (fluke-api 11).

use fluke_abi::object::Type;

use crate::arena::{Arena, Id};
use crate::kernel::Kernel;
use crate::object::{Header, Link, Object};

/// A reference object.
pub struct Ref {
    header: Header<Self>,
    /// What it links to. May be dead.
    pub link: Link,
}

impl Ref {
    /// A null reference.
    pub const fn new(hash: u64) -> Self {
        Self {
            header: Header::new(hash),
            link: Link::Null,
        }
    }
}

impl Object for Ref {
    const TYPE: Type = Type::Ref;

    fn header(&mut self) -> &mut Header<Self> {
        &mut self.header
    }

    fn arena(kernel: &mut Kernel) -> &mut Arena<Self> {
        &mut kernel.refs
    }
}

impl Kernel {
    /// The link of a reference, null if its target has died.
    pub fn link(&mut self, reference: Id<Ref>) -> Link {
        let link = self.refs[reference].link;
        if self.link_hash(link).is_some() {
            link
        } else {
            Link::Null
        }
    }

    /// Hash of a link's target, if it is alive.
    pub fn link_hash(&mut self, link: Link) -> Option<u64> {
        fn hash<T: Object>(kernel: &mut Kernel, id: Id<T>) -> Option<u64> {
            T::arena(kernel)
                .get_mut(id)
                .map(|object| object.header().hash)
        }
        match link {
            Link::Null => None,
            Link::Thread(id) => hash(self, id),
            Link::Task(id) => hash(self, id),
            Link::Region(id) => hash(self, id),
            Link::Mapping(id) => hash(self, id),
            Link::Port(id) => hash(self, id),
            Link::Pset(id) => hash(self, id),
            Link::Mutex(id) => hash(self, id),
            Link::Cond(id) => hash(self, id),
        }
    }
}

impl Link {
    /// Type of the target, dead or alive.
    pub const fn kind(self) -> Type {
        match self {
            Self::Null => Type::Null,
            Self::Thread(_) => Type::Thread,
            Self::Task(_) => Type::Task,
            Self::Region(_) => Type::Region,
            Self::Mapping(_) => Type::Mapping,
            Self::Port(_) => Type::Port,
            Self::Pset(_) => Type::Pset,
            Self::Mutex(_) => Type::Mutex,
            Self::Cond(_) => Type::Cond,
        }
    }
}
