//! Memory: spaces, regions and mappings, and the page tables that cache what follows from them.
//!
//! A [`Region`] exports a range of a space; a [`Mapping`] imports a part of a region into another.
//! Together they form a hierarchy whose root is physical memory. A page table entry is only ever a
//! cache of a walk through that hierarchy ([`hierarchy`]): made on a fault, dropped when anything
//! that it was derived from changes.

pub mod access;
pub mod frames;
pub mod hierarchy;
pub mod mapping;
pub mod page_table;
pub mod region;
pub mod space;
pub mod tree;

pub use frames::FramePool;
pub use hierarchy::Fault;
pub use mapping::{Mapping, Source};
pub use region::Region;
pub use space::Space;
