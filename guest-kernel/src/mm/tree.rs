//! The mappings of a space, by address: a treap, so that finding one among thousands takes few
//! instructions. The heap order is by a scrambled place; a user cannot steer it.

use crate::arena::{Arena, Id};
use crate::mm::Mapping;

/// Subtree, or none.
type Tree = Option<Id<Mapping>>;

/// Mappings of a space; they do not overlap.
#[derive(Default)]
pub struct MappingTree {
    root: Tree,
}

fn weight(id: Id<Mapping>) -> u32 {
    id.offset()
        .wrapping_add(1)
        .wrapping_mul(0x9e37_79b9)
        .rotate_left(13)
        .wrapping_mul(0x85eb_ca6b)
}

/// Where a subtree hangs: nowhere yet, or to the left or right of a mapping.
#[derive(Clone, Copy)]
enum Place {
    Root,
    Left(Id<Mapping>),
    Right(Id<Mapping>),
}

/// Hangs `tree` at a place; returns what the whole tree now is.
fn hang(all: &mut Arena<Mapping>, root: Tree, place: Place, tree: Tree) -> Tree {
    match place {
        Place::Root => return tree,
        Place::Left(id) => all[id].children.0 = tree,
        Place::Right(id) => all[id].children.1 = tree,
    }
    root
}

/// Splits into what starts before `start`, and the rest. A loop: kernel stacks are small.
fn split(all: &mut Arena<Mapping>, mut tree: Tree, start: u64) -> (Tree, Tree) {
    let (mut left, mut right) = (None, None);
    let (mut left_end, mut right_end) = (Place::Root, Place::Root);
    while let Some(id) = tree {
        if all[id].start < start {
            left = hang(all, left, left_end, tree);
            left_end = Place::Right(id);
            tree = all[id].children.1;
        } else {
            right = hang(all, right, right_end, tree);
            right_end = Place::Left(id);
            tree = all[id].children.0;
        }
    }
    (
        hang(all, left, left_end, None),
        hang(all, right, right_end, None),
    )
}

/// Joins two trees; everything in `left` starts before everything in `right`.
fn merge(all: &mut Arena<Mapping>, mut left: Tree, mut right: Tree) -> Tree {
    let (mut root, mut end) = (None, Place::Root);
    while let (Some(l), Some(r)) = (left, right) {
        if weight(l) > weight(r) {
            root = hang(all, root, end, left);
            end = Place::Right(l);
            left = all[l].children.1;
        } else {
            root = hang(all, root, end, right);
            end = Place::Left(r);
            right = all[r].children.0;
        }
    }
    hang(all, root, end, left.or(right))
}

impl MappingTree {
    /// The mapping that starts last at or before `address`: if any covers it, that one.
    pub fn at_or_before(&self, all: &Arena<Mapping>, address: u64) -> Option<Id<Mapping>> {
        let mut best = None;
        let mut tree = self.root;
        while let Some(id) = tree {
            let mapping = &all[id];
            if mapping.start <= address {
                best = tree;
                tree = mapping.children.1;
            } else {
                tree = mapping.children.0;
            }
        }
        best
    }

    /// Whether a mapping other than `except` has an address in `start..end`.
    pub fn overlaps(
        &self,
        all: &Arena<Mapping>,
        start: u64,
        end: u64,
        except: Id<Mapping>,
    ) -> bool {
        let mut before = end;
        while let Some(id) = before
            .checked_sub(1)
            .and_then(|last| self.at_or_before(all, last))
        {
            if id != except {
                return all[id].start + all[id].size > start;
            }
            before = all[id].start;
        }
        false
    }

    /// Adds a mapping that overlaps no other.
    pub fn insert(&mut self, all: &mut Arena<Mapping>, id: Id<Mapping>) {
        all[id].children = (None, None);
        let start = all[id].start;
        let (left, right) = split(all, self.root, start);
        let left = merge(all, left, Some(id));
        self.root = merge(all, left, right);
    }

    /// Takes a mapping out.
    pub fn remove(&mut self, all: &mut Arena<Mapping>, id: Id<Mapping>) {
        let start = all[id].start;
        let (left, rest) = split(all, self.root, start);
        let (_, right) = split(all, rest, start + 1);
        self.root = merge(all, left, right);
    }

    /// Some mapping, until there are none.
    pub const fn any(&self) -> Option<Id<Mapping>> {
        self.root
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::tests::arena;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        /// Against `BTreeMap`: insert where free, remove, find everywhere.
        #[test]
        fn behaves_like_an_ordered_map(
            operations in prop::collection::vec((any::<bool>(), 0u64..64, 1u64..6), 1..120)
        ) {
            let mut all: Arena<Mapping> = arena(128);
            let nobody = all.insert(Mapping::new(0)).ok().unwrap();
            let (mut tree, mut model) = (MappingTree::default(), BTreeMap::new());
            for (add, start, size) in operations {
                let clash = model.iter().any(|(&s, &(z, _))| s < start + size && start < s + z);
                prop_assert_eq!(tree.overlaps(&all, start, start + size, nobody), clash);
                if add && !clash {
                    let mut mapping = Mapping::new(0);
                    (mapping.start, mapping.size) = (start, size);
                    let id = all.insert(mapping).ok().unwrap();
                    tree.insert(&mut all, id);
                    model.insert(start, (size, id));
                } else if !add && let Some((_, id)) = model.remove(&start) {
                    tree.remove(&mut all, id);
                    all.remove(id);
                }
                for address in 0..72 {
                    let expected = model.iter()
                        .find(|(s, (z, _))| (**s..**s + z).contains(&address))
                        .map(|(_, (_, id))| *id);
                    let expected = expected.map(|id| &raw const all[id]);
                    let found = tree.at_or_before(&all, address);
                    let found = found.map(|id| &all[id]).filter(|mapping| mapping.covers(address));
                    prop_assert_eq!(found.map(|mapping| &raw const *mapping), expected);
                }
            }
        }
    }
}
