//! The memory functions that compiled code calls, and what the precompiled `core` links to.
//!
//! The string instructions are the simplest code that cannot be turned into a call of itself.

use core::arch::asm;

/// `memcpy` of C.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
    // SAFETY: the caller's promise; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") size => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// `memmove` of C.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= size {
        // SAFETY: copying forwards never reads what it has overwritten.
        return unsafe { memcpy(to, from, size) };
    }
    // SAFETY: the caller's promise; copying backwards from the last byte, and the direction flag
    // is cleared again.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") size => _,
            inout("rdi") to.wrapping_add(size).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(size).wrapping_sub(1) => _,
            options(nostack));
    }
    to
}

/// `memset` of C.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, byte: i32, size: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rep stosb", inout("rcx") size => _, inout("rdi") to => _, in("al") byte as u8,
            options(nostack, preserves_flags));
    }
    to
}

/// `memcmp` of C.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, size: usize) -> i32 {
    for i in 0..size {
        // SAFETY: the caller's promise.
        let (a, b) = unsafe { (*a.add(i), *b.add(i)) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// `bcmp` of old C, which compilers still call.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, size: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(a, b, size) }
}

/// `strlen` of C, which `core::ffi::CStr` calls.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut length = 0;
    // SAFETY: the caller's promise.
    while unsafe { *text.add(length) } != 0 {
        length += 1;
    }
    length
}

// The precompiled `core` was built with unwinding; nothing here ever unwinds.

/// Never called.
#[unsafe(no_mangle)]
pub extern "C" fn rust_eh_personality() {}

/// Never called.
#[unsafe(no_mangle)]
pub extern "C" fn _Unwind_Resume() -> ! {
    crate::parent::exit(crate::parent::STATUS_PANIC)
}
