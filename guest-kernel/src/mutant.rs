//! Bugs to test those with who look for bugs. Only images with the feature `mutants` have them; in all others
//! `mutant!` is false, and nothing of them is left.

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

pub use fluke_abi::mutant::Mutant;

/// The bug that this kernel has.
static CHOSEN: AtomicU32 = AtomicU32::new(Mutant::none as u32);

/// Makes it the kernel with that bug, at boot.
pub fn choose(number: u64) {
    if cfg!(feature = "mutants") {
        CHOSEN.store(number as u32, Relaxed);
    }
}

/// Whether this kernel has that bug.
pub fn is(mutant: Mutant) -> bool {
    CHOSEN.load(Relaxed) == mutant as u32
}

/// Turns in a loop.
pub fn dawdle() {
    const TURNS: u32 = 100;
    for turn in 0..TURNS {
        core::hint::black_box(turn);
    }
}

/// Whether this kernel is to have the bug of that name. A macro, so that it is `false` before anything is
/// compiled of what depends on it.
macro_rules! mutant {
    ($name:ident) => {
        cfg!(feature = "mutants") && $crate::mutant::is($crate::mutant::Mutant::$name)
    };
}
pub(crate) use mutant;
