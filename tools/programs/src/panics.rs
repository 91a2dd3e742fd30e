//! Panics, three calls deep.

use core::hint::black_box;

/// The program.
pub fn main() -> u64 {
    outer(3)
}

#[inline(never)]
fn outer(n: u64) -> u64 {
    black_box(inner(n)) + 1
}

#[inline(never)]
fn inner(n: u64) -> u64 {
    assert!(black_box(n) == 0, "a panic as ordered, with {n}");
    n
}
