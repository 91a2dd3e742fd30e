//! The entry points, as the kernel sees them. All stubs are generated from
//! [`fluke_abi::entry_points!`].
//!
//! A trap is a call of the gate page with the entry number in `rax`. Only `rcx` and `r11` lose
//! their contents by rule; but calls advance their parameters in place, so the stubs let the
//! compiler assume that every parameter register has changed.
//!
//! The stubs return what the kernel leaves in `rax`: the number of a [`Status`] where the table
//! says so, a value where it says that, and nothing of use otherwise. Misuse does not return: it
//! is an exception of the thread (fluke-api 1.6).

use core::arch::asm;

use fluke_abi::ipc::{CallWord, Params};
use fluke_abi::layout::GATE;
use fluke_abi::object::{Cond, Mapping, Mutex, Port, Pset, Ref, Region, Task, Thread};
use fluke_abi::state::{
    Census, CondState, MappingState, MutexState, ObjectSpec, PortState, PsetState, RegionState,
    SavedState, TaskState, ThreadState,
};

use crate::Status;

/// A parameter that fits a register.
trait Word {
    fn word(self) -> u64;
}

impl Word for u64 {
    fn word(self) -> u64 {
        self
    }
}

impl<T> Word for *mut T {
    fn word(self) -> u64 {
        self as u64
    }
}

impl<T> Word for *const T {
    fn word(self) -> u64 {
        self as u64
    }
}

/// Calls entry point `number` with `parameters` in `rdi rsi rdx r10 r8 r9 r12 r13`.
///
/// # Safety
/// The kernel may read and write whatever the parameters point to.
#[inline(always)]
pub unsafe fn trap(number: u64, parameters: [u64; 8]) -> u64 {
    let result;
    // SAFETY: the gate page is mapped in every space, and its stub returns; the registers that
    // the call may change are declared. What the parameters point to is the caller's promise.
    unsafe {
        asm!(
            "mov r11d, {gate}",
            "call r11",
            gate = const GATE,
            inout("rax") number => result,
            inout("rdi") parameters[0] => _,
            inout("rsi") parameters[1] => _,
            inout("rdx") parameters[2] => _,
            inout("r10") parameters[3] => _,
            inout("r8") parameters[4] => _,
            inout("r9") parameters[5] => _,
            inout("r12") parameters[6] => _,
            inout("r13") parameters[7] => _,
            out("rcx") _,
            out("r11") _,
        );
    }
    result
}

/// Calls message entry point `number`, and updates the receive fields of `params`.
///
/// # Safety
/// `params` is valid, its tables and buffers are, and `dest` names what the call wants.
#[inline(never)]
pub unsafe fn trap_message(number: u64, dest: u64, params: *mut Params) -> u64 {
    // SAFETY: the caller's promise.
    let params = unsafe { &mut *params };
    let word = CallWord(number)
        .with_send_buffers(params.send_buffers)
        .with_send_refs(params.send_refs)
        .with_recv_buffers(params.recv_buffers)
        .with_recv_refs(params.recv_refs);
    let done;
    // SAFETY: as in `trap`.
    unsafe {
        asm!(
            "mov r11d, {gate}",
            "call r11",
            gate = const GATE,
            inout("rax") word.0 => done,
            inout("rdi") dest => _,
            inout("rsi") params.send.address => _,
            inout("rdx") params.send.words => _,
            inout("r9") params.send_table => _,
            inout("r12") params.send_ref_table => _,
            inout("r10") params.recv.address,
            inout("r8") params.recv.words,
            inout("r13") params.recv_table,
            inout("r14") params.recv_ref_table,
            inout("r15") 0u64 => params.alias,
            out("rcx") _,
            out("r11") _,
        );
    }
    let done = CallWord(done);
    params.recv_buffers = done.recv_buffers();
    params.recv_refs = done.recv_refs();
    params.flavour = done.flavour();
    u64::from(done.number())
}

/// The [`Status`] with that number.
///
/// # Panics
/// If the kernel returned something else, which no program can make up for.
pub fn status(number: u64) -> Status {
    match Status::from_number(number) {
        Some(status) => status,
        None => panic!("the kernel returned {number:#x}, which is no status"),
    }
}

/// As [`status`]; anything but success is an error.
pub fn check(number: u64) -> Result<(), Status> {
    match status(number) {
        Status::Success => Ok(()),
        other => Err(other),
    }
}

macro_rules! message {
    ($number:literal, $params:ident) => {
        trap_message($number, 0, $params)
    };
    ($number:literal, $dest:ident, $params:ident) => {
        trap_message($number, $dest.word(), $params)
    };
}

macro_rules! registers {
    ($number:literal, $($parameter:ident),*) => {{
        let given = [$($parameter.word()),*];
        let mut all = [0; 8];
        all[..given.len()].copy_from_slice(&given);
        trap($number, all)
    }};
}

macro_rules! stub {
    (regs $number:literal $name:ident $doc:literal ($($parameter:ident: $ty:ty),*)) => {
        #[doc = $doc]
        ///
        /// # Safety
        /// Every pointer is null or valid for what the call does with it.
        #[inline]
        pub unsafe fn $name($($parameter: $ty),*) -> u64 {
            // SAFETY: the caller's promise.
            unsafe { registers!($number, $($parameter),*) }
        }
    };
    (ipc $number:literal $name:ident $doc:literal ($($parameter:ident: $ty:ty),*)) => {
        #[doc = $doc]
        ///
        /// # Safety
        /// Every pointer is valid, and so is all that `params` points to.
        #[inline]
        pub unsafe fn $name($($parameter: $ty),*) -> u64 {
            // SAFETY: the caller's promise.
            unsafe { message!($number, $($parameter),*) }
        }
    };
}

macro_rules! stubs {
    ($($number:literal $kind:ident $name:ident $object:ident $class:ident $built:ident
       ($($parameter:ident: $ty:ty),*) [$($restart:ident),*] $doc:literal;)*) => {
        $(stub! { $kind $number $name $doc ($($parameter: $ty),*) })*
    };
}

fluke_abi::entry_points!(stubs);
