//! The local APIC in x2APIC mode (SDM vol. 3, 12.12): one-shot timer, IPIs, EOI.

use super::instructions::{rdmsr, wrmsr};

const APIC_BASE: u32 = 0x1b;
const APIC_BASE_X2APIC: u64 = 0xc00;
const EOI: u32 = 0x80b;
const SPURIOUS: u32 = 0x80f;
const ICR: u32 = 0x830;
const LVT_TIMER: u32 = 0x832;
const TIMER_COUNT: u32 = 0x838;
const TIMER_DIVIDE: u32 = 0x83e;
const DIVIDE_BY_1: u64 = 0xb;
const ENABLE: u64 = 0x100;

/// Vector of the timer interrupt.
pub const TIMER_VECTOR: u8 = 0x20;
/// Vector of the interrupt that brings another CPU into the kernel.
pub const KICK_VECTOR: u8 = 0x21;
/// Vector of spurious interrupts; no EOI.
pub const SPURIOUS_VECTOR: u8 = 0xff;

/// Turns this CPU's APIC on.
pub fn init() {
    // SAFETY: the vectors have stubs in the IDT, and interrupts are off until a thread runs.
    unsafe {
        wrmsr(APIC_BASE, rdmsr(APIC_BASE) | APIC_BASE_X2APIC);
        wrmsr(SPURIOUS, ENABLE | u64::from(SPURIOUS_VECTOR));
        wrmsr(TIMER_DIVIDE, DIVIDE_BY_1);
        wrmsr(LVT_TIMER, u64::from(TIMER_VECTOR));
    }
}

/// Acknowledges the interrupt in service.
#[inline]
pub fn end_of_interrupt() {
    // SAFETY: called once for each interrupt taken.
    unsafe { wrmsr(EOI, 0) };
}

/// Makes the timer fire once after `ticks`; 0 turns it off. The host, where tests run, has none.
#[inline]
pub fn set_timer(ticks: u32) {
    if cfg!(test) {
        return;
    }
    // SAFETY: its vector has a stub.
    unsafe { wrmsr(TIMER_COUNT, u64::from(ticks)) };
}

/// Brings CPU `number` into the kernel.
#[inline]
pub fn kick(number: u32) {
    // SAFETY: its vector has a stub on every CPU.
    unsafe { wrmsr(ICR, u64::from(number) << 32 | u64::from(KICK_VECTOR)) };
}
