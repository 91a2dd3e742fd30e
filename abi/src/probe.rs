//! Probe points: places in the kernel where the host can pause the machine.
//!
//! Each kind has a byte, in order of numbers, in the kernel's static [`ARMED`]. The host arms a kind by
//! writing 1 to its byte, and disarms it with 0; the kernel tests the byte at each point of the kind, and
//! does nothing else if it is 0. If it is not, it writes the kind's number to [`crate::port::PROBE`], with
//!
//! | register | |
//! | --- | --- |
//! | `eax` | number of the kind |
//! | `rdi` | address of the thread that it is about, as the kernel has it |
//! | `rsi` | hash of that thread |
//! | `rcx` | its call word, and |
//! | `r8` | its instruction pointer, as its registers have them |
//! | `r9` | index of its space; all ones without one |
//! | `r10` | what the kind says |
//!
//! The thread need not be the one that runs: one side of a message does the work for both.

/// Path of the static that has the bytes.
pub const ARMED: &str = "fluke_kernel::probe::ARMED";

/// `r10` of [`Probe::Wait`] if the wait is not the call's: for a keeper, or for time.
pub const WAIT_OTHER: u64 = 1;

macro_rules! probes {
    ($($name:ident = $number:literal $text:literal $doc:literal;)*) => {
        /// A kind of probe point.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum Probe { $(#[doc = $doc] $name = $number,)* }

        impl Probe {
            /// All kinds, in order of numbers.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The kind with number `n`, if there is one.
            pub const fn from_number(n: u32) -> Option<Self> {
                match n { $($number => Some(Self::$name),)* _ => None }
            }

            /// What users call it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

probes! {
    Enter = 0 "enter" "A thread has come from user mode to make a call. A call that starts over inside the kernel does not come again.";
    Exit = 1 "exit" "A thread leaves to user mode. Its call is done if its instruction pointer is `GATE_DONE`.";
    Commit = 2 "commit" "A call, or a stage of one, is about to be written down as done, in the registers of the thread that made it.";
    Wait = 3 "wait" "A thread has been put to sleep, and its registers say what it will do when it wakes. `r10`: 0, or `WAIT_OTHER`.";
    SoftFault = 4 "soft_fault" "The page table of a thread's space has been filled, for a program's access or the kernel's. `r10`: the address.";
    HardFault = 5 "hard_fault" "A thread is about to be put to sleep until its keeper has dealt with a fault. `r10`: the address.";
    PreemptionPoint = 6 "preemption_point" "A thread is in the middle of a message, and looks whether somebody else is to have the kernel or the CPU.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_numbered_in_order() {
        for (n, &probe) in (0..).zip(Probe::ALL) {
            assert_eq!((probe as u32, Probe::from_number(n)), (n, Some(probe)));
        }
        assert_eq!(Probe::from_number(Probe::ALL.len() as u32), None);
    }
}
