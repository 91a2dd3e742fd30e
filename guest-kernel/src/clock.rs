//! Time: nanoseconds since boot, or since that of a machine whose checkpoint goes on here, from the
//! time-stamp counter.

use crate::arch::instructions::rdtsc;

/// Converts between the counter, nanoseconds and timer ticks.
#[derive(Clone, Copy)]
pub struct Clock {
    start: u64,
    /// Nanoseconds at the start.
    first: u64,
    /// Nanoseconds per counter tick, times 2^32.
    ns_per_tick: u64,
    /// Timer ticks per nanosecond, times 2^32.
    timer_per_ns: u64,
}

impl Clock {
    /// A clock that starts now, and shows `first` nanoseconds. Frequencies in kHz.
    pub fn new(tsc_khz: u64, timer_khz: u64, first: u64) -> Self {
        Self {
            start: rdtsc(),
            first,
            ns_per_tick: (1_000_000 << 32) / tsc_khz.max(1),
            timer_per_ns: (timer_khz << 32) / 1_000_000,
        }
    }

    /// Nanoseconds since boot.
    #[inline]
    pub fn now(&self) -> u64 {
        self.first + scale(rdtsc().wrapping_sub(self.start), self.ns_per_tick)
    }

    /// Timer ticks until `deadline`: at least 1, and no more than the timer can count; a timer that
    /// fires early is set again.
    #[inline]
    pub fn ticks_until(&self, deadline: u64) -> u32 {
        let ns = deadline.saturating_sub(self.now());
        scale(ns, self.timer_per_ns).clamp(1, u64::from(u32::MAX)) as u32
    }
}

/// `value * factor / 2^32`, saturating.
#[inline]
fn scale(value: u64, factor: u64) -> u64 {
    let product = (u128::from(value) * u128::from(factor)) >> 32;
    u64::try_from(product).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_far_deadline_saturates_the_timer_and_a_past_one_fires_at_once() {
        let clock = Clock::new(2_000_000, 1_000_000, 0);
        assert_eq!(clock.ticks_until(u64::MAX), u32::MAX);
        assert_eq!(clock.ticks_until(0), 1);
    }

    #[test]
    fn scale_multiplies_fractions() {
        assert_eq!(scale(1000, 1 << 31), 500);
        assert_eq!(scale(u64::MAX, u64::MAX), u64::MAX);
    }
}
