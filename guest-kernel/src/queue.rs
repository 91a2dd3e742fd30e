//! Queues of threads, linked through the threads themselves.
//!
//! A thread is in at most one queue: the run queue of a CPU, or that of what it waits for. So a
//! thread holds one pair of links, and queueing never needs memory.

use crate::arena::{Arena, Id, Position};

/// Links of a member of a queue. Members are alive, so their positions name them.
pub struct Links<T> {
    prev: Option<Position<T>>,
    next: Option<Position<T>>,
}

impl<T> Links<T> {
    /// Links of something in no queue.
    pub const fn new() -> Self {
        Self {
            prev: None,
            next: None,
        }
    }
}

impl<T> Links<T> {
    /// The next member of the queue, with its name.
    #[inline]
    pub fn next<'a>(&self, members: &'a Arena<T>) -> Option<(Id<T>, &'a T)> {
        self.next.map(|next| members.at(next))
    }
}

impl<T> Default for Links<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// What can be in a [`Queue`].
pub trait Linked: Sized {
    /// The member's links.
    fn links(&mut self) -> &mut Links<Self>;
}

/// A first-in, first-out queue.
pub struct Queue<T> {
    head: Option<Position<T>>,
    tail: Option<Position<T>>,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Queue<T> {
    /// An empty queue.
    pub const fn new() -> Self {
        Self {
            head: None,
            tail: None,
        }
    }

    /// The name of the member that came first.
    #[inline]
    pub fn first(&self, members: &Arena<T>) -> Option<Id<T>> {
        self.head.map(|head| members.name_at(head))
    }

    /// The member itself, with its name.
    #[inline]
    pub fn front<'a>(&self, members: &'a Arena<T>) -> Option<(Id<T>, &'a T)> {
        self.head.map(|head| members.at(head))
    }

    /// Whether nobody is queued.
    pub const fn is_empty(&self) -> bool {
        self.head.is_none()
    }
}

impl<T: Linked> Queue<T> {
    /// Appends a member, which must be in no queue.
    #[inline]
    pub fn push(&mut self, members: &mut Arena<T>, id: Id<T>) {
        let at = Position::from(id);
        *members[id].links() = Links {
            prev: self.tail,
            next: None,
        };
        match self.tail.replace(at) {
            Some(last) => members[last].links().next = Some(at),
            None => self.head = Some(at),
        }
    }

    /// Inserts a member before `successor`, or at the end.
    pub fn insert_before(&mut self, members: &mut Arena<T>, id: Id<T>, successor: Option<Id<T>>) {
        let Some(next) = successor else {
            return self.push(members, id);
        };
        let at = Position::from(id);
        let prev = members[next].links().prev.replace(at);
        *members[id].links() = Links {
            prev,
            next: Some(next.into()),
        };
        match prev {
            Some(prev) => members[prev].links().next = Some(at),
            None => self.head = Some(at),
        }
    }

    /// Takes a member out, wherever it is. It must be in this queue.
    pub fn remove(&mut self, members: &mut Arena<T>, id: Id<T>) {
        let Links { prev, next } = core::mem::take(members[id].links());
        match prev {
            Some(prev) => members[prev].links().next = next,
            None => self.head = next,
        }
        match next {
            Some(next) => members[next].links().prev = prev,
            None => self.tail = prev,
        }
    }

    /// Takes the first member out.
    #[inline(always)]
    pub fn pop<'a>(&mut self, members: &'a mut Arena<T>) -> Option<(Id<T>, &'a mut T)> {
        let first = self.head?;
        if self.tail == Some(first) {
            // Its links say what they say in no queue.
            (self.head, self.tail) = (None, None);
        } else {
            self.head = members[first].links().next.take();
            if let Some(next) = self.head {
                members[next].links().prev = None;
            }
        }
        Some(members.member(first))
    }

    /// The member after `id`.
    pub fn after(&self, members: &mut Arena<T>, id: Id<T>) -> Option<Id<T>> {
        let next = members[id].links().next?;
        Some(members.name_at(next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::tests::arena;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    #[derive(Default)]
    struct Member(Links<Member>);

    impl Linked for Member {
        fn links(&mut self) -> &mut Links<Self> {
            &mut self.0
        }
    }

    proptest! {
        /// Against `VecDeque`: any mix of push, pop, remove and insert.
        #[test]
        fn behaves_like_a_deque(operations in prop::collection::vec((0u8..4, 0usize..8), 0..80)) {
            let mut members = arena(8);
            let ids: Vec<_> = (0..8)
                .map(|_| members.insert(Member::default()).ok().unwrap())
                .collect();
            let (mut queue, mut model) = (Queue::new(), VecDeque::new());
            for (operation, n) in operations {
                let id = ids[n];
                let at = model.iter().position(|&m| m == id);
                match (operation, at) {
                    (0, None) => {
                        queue.push(&mut members, id);
                        model.push_back(id);
                    }
                    (1, _) => {
                        let first = queue.pop(&mut members).map(|(id, _)| id);
                        prop_assert_eq!(first, model.pop_front());
                    }
                    (2, Some(at)) => {
                        queue.remove(&mut members, id);
                        model.remove(at);
                    }
                    (3, None) => {
                        let at = model.len() / 2;
                        queue.insert_before(&mut members, id, model.get(at).copied());
                        model.insert(at, id);
                    }
                    _ => {}
                }
                let mut order = Vec::new();
                let mut next = queue.first(&members);
                while let Some(id) = next {
                    order.push(id);
                    next = queue.after(&mut members, id);
                }
                prop_assert_eq!(order, Vec::from(model.clone()));
            }
        }
    }
}
