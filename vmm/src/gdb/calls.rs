//! Catching calls of the kernel's entry points: where they come in, and where they go back.
//!
//! One place of the kernel is passed by all that comes from user mode, and one by all that goes there. A call
//! is told from the rest by the trap frame, which lies in the thread: so its address says whose call it is,
//! whichever vCPU it comes back on, and however often the kernel has begun with it anew.

use std::collections::HashMap;

use fluke_abi::entry::Entry;
use fluke_abi::layout::{GATE, GATE_DONE};

use crate::count::{GATE_VECTOR, Ways};

/// Bytes of a trap frame above its vector, which come from the CPU and the stubs.
const FROM_VECTOR: u64 = 7 * 8;
/// Registers below the vector where all ways into the kernel have met.
const SAVED: u64 = 9;

/// Numbers of entry points, as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers(u128);

impl Numbers {
    /// All.
    pub const ALL: Self = Self(u128::MAX);

    /// Adds one. Numbers of no entry point are nobody's.
    pub fn add(&mut self, number: u64) {
        self.0 |= Self::bit(number);
    }

    /// Takes one out.
    pub fn remove(&mut self, number: u64) {
        self.0 &= !Self::bit(number);
    }

    /// Whether a number is there.
    pub fn has(self, number: u64) -> bool {
        self.0 & Self::bit(number) != 0
    }

    /// The entry points.
    pub fn entries(self) -> impl Iterator<Item = Entry> {
        let numbers = (0..128).filter(move |number| self.has((*number).into()));
        numbers.filter_map(Entry::from_number)
    }

    fn bit(number: u64) -> u128 {
        u32::try_from(number)
            .ok()
            .and_then(|number| 1_u128.checked_shl(number))
            .unwrap_or(0)
    }
}

/// Which end of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The kernel has it before it.
    Entry,
    /// The kernel is done with it, and about to return to user mode.
    Return,
}

/// Calls that are caught.
#[derive(Debug, Default)]
pub struct Calls {
    /// Those that the debugger itself wants to hear of.
    pub by_number: Numbers,
    /// Those that its user asked for by name.
    pub by_name: Numbers,
    /// Calls that have come in, and not gone back: numbers by the ends of the frames.
    open: HashMap<u64, u64>,
}

impl Calls {
    /// Whether any are.
    pub fn any(&self) -> bool {
        self.by_number != Numbers::default() || self.by_name != Numbers::default()
    }

    /// Catches none any more.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// What is caught of a vCPU at an instruction, if anything is: number and end. `word` reads memory at an
    /// address.
    pub fn caught(
        &mut self,
        ways: &Ways,
        (rip, rsp, rax): (u64, u64, u64),
        word: impl Fn(u64) -> Option<u64>,
    ) -> Option<(u64, End)> {
        let (vector, end) = match rip {
            _ if rip == ways.enter => (rsp.wrapping_add(8 * SAVED), End::Entry),
            _ if rip == ways.leaving => (rsp, End::Return),
            _ => return None,
        };
        let frame = vector.wrapping_add(FROM_VECTOR);
        let instruction = word(vector.wrapping_add(16))?;
        match end {
            End::Entry => {
                if (word(vector)?, instruction) != (GATE_VECTOR, GATE) {
                    return None;
                }
                let number = u64::from(rax as u16);
                if self.by_number.has(number) || self.by_name.has(number) {
                    self.open.insert(frame, number);
                    return Some((number, end));
                }
                self.open.remove(&frame);
                None
            }
            End::Return if instruction == GATE_DONE => Some((self.open.remove(&frame)?, end)),
            End::Return => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAYS: Ways = Ways {
        trap: 1,
        syscall: 2,
        enter: 3,
        from_kernel: 4,
        leaving: 5,
        swapgs: 9,
    };

    /// A vCPU at an end of a call, whose thread's frame lies there.
    fn at(calls: &mut Calls, rip: u64, frame: u64, rax: u64, user: u64) -> Option<(u64, End)> {
        let vector = frame - 56;
        let rsp = if rip == WAYS.enter {
            vector - 72
        } else {
            vector
        };
        calls.caught(&WAYS, (rip, rsp, rax), |address| match address - vector {
            0 => Some(GATE_VECTOR),
            16 => Some(user),
            other => panic!("looks at {other}"),
        })
    }

    #[test]
    fn a_call_is_caught_at_both_ends_whatever_lies_between() {
        let (enter, leaving) = (WAYS.enter, WAYS.leaving);
        let mut calls = Calls::default();
        assert!(!calls.any());
        calls.by_name.add(7);
        assert!(calls.any());
        // Another call, an exception of a program, a call, another thread's return.
        assert_eq!(at(&mut calls, enter, 0x1000, 8, GATE), None);
        assert_eq!(at(&mut calls, enter, 0x1000, 7, 0x4000), None);
        assert_eq!(
            at(&mut calls, enter, 0x1000, 7 | 1 << 40, GATE),
            Some((7, End::Entry))
        );
        assert_eq!(at(&mut calls, leaving, 0x2000, 0, GATE_DONE), None);
        // It is interrupted, goes on, and is done; then the program is interrupted where it came back.
        assert_eq!(at(&mut calls, leaving, 0x1000, 7, GATE), None);
        assert_eq!(
            at(&mut calls, leaving, 0x1000, 0, GATE_DONE),
            Some((7, End::Return))
        );
        assert_eq!(at(&mut calls, leaving, 0x1000, 0, GATE_DONE), None);
        assert_eq!(at(&mut calls, 5, 0x1000, 7, GATE), None);
        calls.by_name.remove(7);
        assert!(!calls.any());
    }

    #[test]
    fn numbers_of_no_entry_point_are_nobodys() {
        let mut numbers = Numbers::default();
        for number in [128, 1 << 32, u64::MAX] {
            numbers.add(number);
        }
        assert_eq!(numbers, Numbers::default());
        assert!(!Numbers::ALL.has(200));
    }
}
