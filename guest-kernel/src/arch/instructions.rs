//! Single instructions, as functions.
//!
//! The kernel uses none that an emulated CPL 0 lacks: no vector instruction, `popcnt`, BMI or
//! `cmpxchg16b` (docs/hosts.md).

use core::arch::asm;

use fluke_abi::port::PROBE;

/// Writes a model-specific register.
///
/// # Safety
/// The value must keep the machine in the state that the kernel relies on.
#[inline]
pub unsafe fn wrmsr(msr: u32, value: u64) {
    // SAFETY: the caller's.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags));
    }
}

/// Reads a model-specific register that exists.
#[inline]
pub fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading the registers that the kernel names has no side effect.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high,
            options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Time-stamp counter.
#[inline]
pub fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: no side effect.
    unsafe {
        asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a 32-bit value to an I/O port.
#[inline]
pub fn out32(port: u16, value: u32) {
    // SAFETY: the machine's ports (fluke_abi::port) do not change guest memory.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags));
    };
}

/// As [`out32`], with `detail` in `rdi`, where the host finds it.
#[inline]
pub fn out32_with(port: u16, value: u32, detail: u64) {
    // SAFETY: as above.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, in("rdi") detail, options(nomem, nostack, preserves_flags));
    };
}

/// Tells the host that a probe point was come to, with what `fluke_abi::probe` says, in the order there.
pub fn report_probe(kind: u32, about: [u64; 6]) {
    let [thread, hash, word, rip, space, detail] = about;
    // SAFETY: the host may stop the machine here, as everywhere.
    unsafe {
        asm!("out dx, eax", in("dx") PROBE, in("eax") kind, in("rdi") thread, in("rsi") hash,
            in("rcx") word, in("r8") rip, in("r9") space, in("r10") detail,
            options(nostack, preserves_flags));
    };
}

/// Writes bytes to an I/O port, in one instruction.
#[inline]
pub fn out_bytes(port: u16, bytes: &[u8]) {
    // SAFETY: reads exactly the slice; the ports do not change guest memory.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _,
            options(readonly, nostack, preserves_flags));
    }
}

/// Waits for an interrupt with interrupts on; returns with interrupts off.
#[inline]
pub fn wait_for_interrupt() {
    // SAFETY: `sti` takes effect after `hlt` has begun, so no wake-up is lost; the interrupt stubs
    // preserve all registers.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// The flag that lets a CPU take interrupts.
pub const INTERRUPT_FLAG: u64 = 1 << 9;

/// Lets this CPU take interrupts.
#[inline]
pub fn enable_interrupts() {
    // SAFETY: the stubs preserve all registers, and the caller has a stack for them.
    unsafe { asm!("sti", options(nostack)) };
}

/// Turns interrupts off; says whether they were on.
#[inline]
pub fn disable_interrupts() -> bool {
    let flags: u64;
    // SAFETY: the stack is balanced; being undisturbed changes nothing for the caller.
    unsafe { asm!("pushfq", "pop {}", "cli", out(reg) flags) };
    flags & INTERRUPT_FLAG != 0
}

/// Stops this CPU for good.
pub fn halt() -> ! {
    loop {
        // SAFETY: interrupts are off; nothing happens ever after.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Address that caused the last page fault.
#[inline]
pub fn fault_address() -> u64 {
    let address: u64;
    // SAFETY: no side effect.
    unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack, preserves_flags)) };
    address
}

/// Physical address of the page table in use.
#[inline]
pub fn page_table() -> u64 {
    let root: u64;
    // SAFETY: no side effect.
    unsafe { asm!("mov {}, cr3", out(reg) root, options(nomem, nostack, preserves_flags)) };
    root
}

/// Changes the page table in use, or drops what the CPU remembers of it. `root` is the kernel's own
/// table or one made by `mm::page_table::create`: both map the kernel.
#[inline]
pub fn set_page_table(root: u64) {
    // SAFETY: all of the kernel stays mapped as it is, and it uses no user address.
    unsafe { asm!("mov cr3, {}", in(reg) root, options(nostack, preserves_flags)) };
}
