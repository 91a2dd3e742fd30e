//! The bootable image: entry point, panic handler, and what the compiler expects of a C library.
#![no_std]
#![no_main]

use core::arch::naked_asm;
use core::fmt::{self, Write};
use core::panic::PanicInfo;

use fluke_abi::ABI_VERSION;
use fluke_abi::boot::{BootInfo, IMAGE_MAGIC, ImageInfo};
use fluke_abi::port::{EVENT, Event, KERNEL_LOG};
use fluke_kernel::arch::instructions::{halt, out_bytes, out32};
use fluke_kernel::{boundary, lock, model, pseudo, stacks};

/// What the host reads of this image before it boots it.
#[used]
#[unsafe(link_section = ".fluke.image")]
static IMAGE: ImageInfo = ImageInfo {
    magic: IMAGE_MAGIC,
    abi_version: ABI_VERSION,
    stack_per_thread: model::STACK_PER_THREAD as u32,
    stack_bytes: stacks::STACK_BYTES,
    config: image_name(),
};

/// What the host calls this image, NUL-padded.
const fn image_name() -> [u8; 16] {
    let (model, level) = (model::NAME.as_bytes(), lock::NAME.as_bytes());
    let mut name = [0; 16];
    let mut at = 0;
    while at < model.len() + level.len() {
        name[at] = if at < model.len() {
            model[at]
        } else {
            level[at - model.len()]
        };
        at += 1;
    }
    name
}

/// Where every CPU enters; see `fluke_abi::boot`.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn _start() -> ! {
    naked_asm!("mov rdx, rsp", "xor ebp, ebp", "call {}", "ud2", sym start);
}

extern "C" fn start(number: u32, boot: &'static BootInfo, stack: u64) -> ! {
    // SAFETY: `_start` passes on what the host gave this CPU.
    unsafe { boundary::start::start(number, boot, stack) }
}

/// The host's log.
struct Log;

impl Write for Log {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        out_bytes(KERNEL_LOG, text.as_bytes());
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    if pseudo::in_user_mode() {
        pseudo::supervisor(report, info);
    }
    report(info);
    halt()
}

/// In supervisor mode. Does not return.
extern "C" fn report(info: &PanicInfo<'_>) -> u64 {
    // The log cannot fail.
    let _ = writeln!(Log, "kernel panic: {info}");
    out32(EVENT, Event::Panic as u32);
    halt()
}

/// Stands for unwinding, which the image does not do; core's precompiled code names it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As `rust_eh_personality`.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    halt()
}

mod memory_functions {
    //! `memcpy` and its kin, by string instructions of eight bytes: one emulated instruction moves
    //! a word, whatever its size.

    use core::arch::naked_asm;

    #[unsafe(naked)]
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        naked_asm!(
            "mov rax, rdi",
            "mov rcx, rdx",
            "shr rcx, 3",
            "rep movsq",
            "mov ecx, edx",
            "and ecx, 7",
            "jz 2f",
            "rep movsb",
            "2: ret",
        );
    }

    #[unsafe(naked)]
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        naked_asm!(
            "mov rax, rdi",
            "sub rax, rsi",
            "cmp rax, rdx",
            "jae {memcpy}",
            // The target starts inside the source: from the end, byte by byte.
            "mov rax, rdi",
            "mov rcx, rdx",
            "lea rsi, [rsi + rdx - 1]",
            "lea rdi, [rdi + rdx - 1]",
            "std",
            "rep movsb",
            "cld",
            "ret",
            memcpy = sym memcpy,
        );
    }

    #[unsafe(naked)]
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
        naked_asm!(
            "mov r8, rdi",
            "movzx eax, sil",
            "mov r9, 0x0101010101010101",
            "imul rax, r9",
            "mov rcx, rdx",
            "shr rcx, 3",
            "rep stosq",
            "mov ecx, edx",
            "and ecx, 7",
            "jz 2f",
            "rep stosb",
            "2: mov rax, r8",
            "ret",
        );
    }

    #[unsafe(naked)]
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(first: *const u8, second: *const u8, len: usize) -> i32 {
        naked_asm!(
            "xor eax, eax",
            "mov rcx, rdx",
            "cmp rcx, rcx",
            "repe cmpsb",
            "je 2f",
            "movzx eax, byte ptr [rdi - 1]",
            "movzx ecx, byte ptr [rsi - 1]",
            "sub eax, ecx",
            "2: ret",
        );
    }

    #[unsafe(naked)]
    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(first: *const u8, second: *const u8, len: usize) -> i32 {
        naked_asm!("jmp {}", sym memcmp);
    }
}
