//! Probe points: where the host can have the machine pause ([`fluke_abi::probe`]).

use core::arch::asm;
use core::sync::atomic::AtomicU8;

use fluke_abi::probe::Probe;

use crate::arch::instructions::report_probe;
use crate::thread::Thread;

/// Which kinds of points are armed. Only the host writes to it. The stubs look at it in every space.
#[used]
#[unsafe(link_section = ".bss.cpu")]
pub static ARMED: [AtomicU8; Probe::ALL.len()] = [const { AtomicU8::new(0) }; Probe::ALL.len()];

/// Whether points of the kind of this number are armed. Two instructions, whatever the compiler thinks of it.
#[inline(always)]
fn is_armed<const KIND: usize>() -> bool {
    // SAFETY: the byte is part of the static. All that the kernel has written is there for the host to see.
    unsafe {
        asm!(
            "cmp byte ptr [rip + {armed} + {kind}], 0",
            "jne {yes}",
            armed = sym ARMED,
            kind = const KIND,
            yes = label { return true },
            options(readonly, nostack),
        );
    }
    false
}

/// A probe point, of the kind of this number. If it is armed, `about` says which thread it is about, and what
/// the kind has to say.
#[inline(always)]
pub fn probe<'t, const KIND: usize>(about: impl FnOnce() -> (&'t Thread, u64)) {
    if is_armed::<KIND>() {
        let (thread, detail) = about();
        hit(KIND, thread, detail);
    }
}

#[cold]
#[inline(never)]
fn hit(kind: usize, thread: &Thread, detail: u64) {
    let space = thread.space.map_or(u64::MAX, |space| space.index().into());
    let about = [
        &raw const *thread as u64,
        thread.hash(),
        thread.frame.rax,
        thread.frame.rip,
        space,
        detail,
    ];
    report_probe(kind as u32, about);
}
