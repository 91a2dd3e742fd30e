//! Why a machine stopped, and the exit status that says so.
//!
//! | status | the machine |
//! | --- | --- |
//! | 0-125 | ended with this status of the guest's own |
//! | 126 | ended with a status of the guest's own above 125 |
//! | 124 | also: ran out of `--timeout` |
//! | 128 | kernel panic |
//! | 129 | triple fault |
//! | 130 | stopped by SIGINT (Ctrl-C) or SIGTERM |
//! | 131 | an instruction that KVM cannot emulate |
//! | 132 | a vCPU failed: KVM refused to run it, it touched memory that is not there, or its thread panicked |
//! | 133 | deadlock: every CPU idle, no thread can run, nothing can wake one |
//!
//! Before a machine exists the command ends with 1 (the host) or 2 (the command line, a file).

use std::fmt;
use std::time::Duration;

use crate::crash::Crash;

/// Highest exit status that a guest can have for itself.
pub const GUEST_STATUS_MAX: u32 = 125;

/// Why a machine stopped.
#[derive(Clone, Debug)]
pub enum StopReason {
    /// The guest ended itself with this status.
    Exited(u32),
    /// It ran for longer than it was given.
    Timeout(Duration),
    /// A signal of this name told flukevm to stop.
    Interrupted(&'static str),
    /// The kernel gave up.
    KernelPanic {
        /// Its message.
        message: String,
        /// Where.
        crash: Box<Crash>,
    },
    /// A CPU could not deliver an exception.
    TripleFault(Box<Crash>),
    /// KVM could not go on with an instruction.
    EmulationFailure {
        /// KVM's suberror number.
        suberror: u32,
        /// Where.
        crash: Box<Crash>,
    },
    /// A vCPU cannot go on for another reason.
    VcpuFailed {
        /// Its number.
        vcpu: u32,
        /// The reason.
        why: String,
        /// Where, if that is known.
        crash: Option<Box<Crash>>,
    },
    /// The kernel saw that nothing will ever run again.
    Deadlock,
}

impl StopReason {
    /// Exit status of a command that ran the machine.
    pub fn status(&self) -> u8 {
        match self {
            Self::Exited(status) if *status <= GUEST_STATUS_MAX => *status as u8,
            Self::Exited(_) => 126,
            Self::Timeout(_) => 124,
            Self::KernelPanic { .. } => 128,
            Self::TripleFault(_) => 129,
            Self::Interrupted(_) => 130,
            Self::EmulationFailure { .. } => 131,
            Self::VcpuFailed { .. } => 132,
            Self::Deadlock => 133,
        }
    }

    /// One word for machines to read.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Exited(_) => "exited",
            Self::Timeout(_) => "timeout",
            Self::Interrupted(_) => "interrupted",
            Self::KernelPanic { .. } => "kernel-panic",
            Self::TripleFault(_) => "triple-fault",
            Self::EmulationFailure { .. } => "emulation-failure",
            Self::VcpuFailed { .. } => "vcpu-failed",
            Self::Deadlock => "deadlock",
        }
    }

    /// Where the machine crashed, if it did.
    pub fn crash(&self) -> Option<&Crash> {
        match self {
            Self::KernelPanic { crash, .. }
            | Self::TripleFault(crash)
            | Self::EmulationFailure { crash, .. } => Some(crash),
            Self::VcpuFailed { crash, .. } => crash.as_deref(),
            _ => None,
        }
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "the guest exited with status {status}"),
            Self::Timeout(limit) => write!(
                f,
                "timeout: the guest ran for more than {}",
                humantime::format_duration(*limit)
            ),
            Self::Interrupted(signal) => write!(f, "interrupted by {signal}"),
            Self::KernelPanic { message, crash } => {
                write!(f, "kernel panic on vCPU {}: {message}", crash.vcpu)
            }
            Self::TripleFault(crash) => write!(f, "triple fault on {crash}"),
            Self::EmulationFailure { suberror, crash } => write!(
                f,
                "KVM cannot emulate an instruction (suberror {suberror}) on {crash}"
            ),
            Self::VcpuFailed { vcpu, why, .. } => write!(f, "vCPU {vcpu} failed: {why}"),
            Self::Deadlock => write!(
                f,
                "deadlock: every CPU is idle, no thread can run, and nothing can wake one"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_of_the_guest_and_of_the_machine_are_apart() {
        for status in 0..=GUEST_STATUS_MAX {
            assert_eq!(u32::from(StopReason::Exited(status).status()), status);
        }
        assert_eq!(StopReason::Exited(126).status(), 126);
        assert_eq!(StopReason::Exited(u32::MAX).status(), 126);
        assert_eq!(StopReason::Timeout(Duration::ZERO).status(), 124);
        assert_eq!(StopReason::Deadlock.status(), 133);
    }
}
