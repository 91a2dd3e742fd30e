//! The way from a PVH entrance (32-bit mode, paging off, `ebx` = address of the start information) to
//! that of the kernel (`fluke_abi::boot`). The code is assembled into this binary and copied to
//! [`TRAMPOLINE`] in the image.
//!
//! What the kernel takes for granted and a foreign machine may lack is looked for first: long mode with
//! no-execute pages, an x2APIC, and memory. If it is not there, a line on the console says so, and the
//! exit port is written with status 1.

use std::arch::global_asm;
use std::mem::offset_of;

use fluke_abi::boot::{KERNEL_CS, KERNEL_SS};
use fluke_abi::layout::{DIRECT_MAP, KERNEL_IMAGE, KERNEL_STACKS, PAGE_SIZE};
use fluke_abi::port::{CONSOLE, EXIT};
use zerocopy::{Immutable, IntoBytes};

use crate::boot::{Entrance, TRAMPOLINE, TRAMPOLINE_PAGES};
use crate::error::Error;
use crate::kvm::{CR0, CR4, CR4_SMAP, CR4_SMEP, EFER, EFER_LMA};
use crate::memory::{Frames, Memory};
use crate::paging::{Entry, PageTables};

/// Memory that the machine must have beyond that of the image, bytes: firmware may have used the end of it,
/// and the kernel wants its own zeroed.
pub const HEADROOM: u64 = 2 << 20;

/// Offset of the [`Parameters`] in the trampoline's page.
const PARAMETERS: u64 = 0x800;
/// Their address.
const AT: u64 = TRAMPOLINE + PARAMETERS;

/// What the code reads.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Parameters {
    gdt: [u64; 3],
    /// Operand of `lgdt`: bytes minus one, address.
    gdt_limit: u16,
    gdt_base: [u16; 2],
    unused: u16,
    page_table: u32,
    /// Where the machine's memory may end at the earliest.
    memory_end: u32,
    stack: u64,
    boot_info: u64,
    entry: u64,
}

global_asm!(
    r#"
    .pushsection .rodata.flukevm_pvh, "a", @progbits
    .balign 16
    .code32
    .globl flukevm_pvh_start
flukevm_pvh_start:
    cli
    cld
    // Whoever used the interrupt controllers of a PC before: they shall not interrupt the kernel, which
    // has its local APIC. And the serial port shall take bytes: 8 bits, and no access to the divisor.
    movb $0xff, %al
    outb %al, $0x21
    outb %al, $0xa1
    movw ${console} + 3, %dx
    movb $3, %al
    outb %al, %dx

    // Memory: one entry of the map, of type 1, from below the image to its end at least.
    cmpl $0x336ec578, (%ebx)
    jne 8f
    cmpl $0, 4(%ebx)
    je 8f
    movl 40(%ebx), %esi
    movl 48(%ebx), %ecx
1:  testl %ecx, %ecx
    jz 8f
    cmpl $1, 16(%esi)
    jne 2f
    cmpl $0, 4(%esi)
    jne 2f
    movl (%esi), %eax
    cmpl ${base}, %eax
    ja 2f
    movl 12(%esi), %edi
    movl 8(%esi), %edx
    addl %eax, %edx
    adcl $0, %edi
    jnz 3f
    cmpl {memory_end}, %edx
    jae 3f
2:  addl $24, %esi
    decl %ecx
    jmp 1b

    // Long mode and no-execute pages, then the x2APIC.
3:  movl $0x80000000, %eax
    cpuid
    cmpl $0x80000001, %eax
    jb 7f
    movl $0x80000001, %eax
    cpuid
    andl $(1 << 29 | 1 << 20), %edx
    cmpl $(1 << 29 | 1 << 20), %edx
    jne 7f
    movl $1, %eax
    cpuid
    testl $(1 << 21), %ecx
    jz 7f

    // The protections that the CPU has.
    movl ${cr4}, %esi
    xorl %eax, %eax
    cpuid
    cmpl $7, %eax
    jb 5f
    movl $7, %eax
    xorl %ecx, %ecx
    cpuid
    testl $(1 << 7), %ebx
    jz 4f
    orl ${smep}, %esi
4:  testl $(1 << 20), %ebx
    jz 5f
    orl ${smap}, %esi
5:  movl %esi, %cr4
    movl {page_table}, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    movl ${efer}, %eax
    xorl %edx, %edx
    wrmsr
    movl ${cr0}, %eax
    movl %eax, %cr0
    lgdtl {gdt}
    ljmpl ${cs}, ${base} + 6f - flukevm_pvh_start

    .code64
6:  movl ${ss}, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %fs
    movl %eax, %gs
    movl %eax, %ss
    movq {stack}, %rsp
    movq {boot_info}, %rsi
    xorl %edi, %edi
    jmpq *{entry}

    .code32
7:  movl ${base} + 91f - flukevm_pvh_start, %esi
    movl $(92f - 91f), %ecx
    jmp 9f
8:  movl ${base} + 92f - flukevm_pvh_start, %esi
    movl $(93f - 92f), %ecx
9:  movw ${console}, %dx
    rep outsb
    movw ${exit}, %dx
    movl $1, %eax
    outl %eax, %dx
10: hlt
    jmp 10b
91: .ascii "flukevm: this machine's CPU lacks long mode, no-execute pages or an x2APIC; boot the image under another VMM\n"
92: .ascii "flukevm: this machine has too little memory; give it at least 2 MiB more than --mem of flukevm image\n"
93:
    .code64
    .globl flukevm_pvh_end
flukevm_pvh_end:
    .popsection
    "#,
    base = const TRAMPOLINE,
    console = const CONSOLE,
    exit = const EXIT,
    memory_end = const AT + offset_of!(Parameters, memory_end) as u64,
    page_table = const AT + offset_of!(Parameters, page_table) as u64,
    gdt = const AT + offset_of!(Parameters, gdt_limit) as u64,
    stack = const AT + offset_of!(Parameters, stack) as u64,
    boot_info = const AT + offset_of!(Parameters, boot_info) as u64,
    entry = const AT + offset_of!(Parameters, entry) as u64,
    cr0 = const CR0,
    cr4 = const CR4,
    smep = const CR4_SMEP,
    smap = const CR4_SMAP,
    // The CPU sets LMA itself.
    efer = const EFER & !EFER_LMA,
    cs = const KERNEL_CS,
    ss = const KERNEL_SS,
    options(att_syntax)
);

unsafe extern "C" {
    static flukevm_pvh_start: u8;
    static flukevm_pvh_end: u8;
}

/// The code, for [`TRAMPOLINE`].
fn code() -> &'static [u8] {
    let (start, end) = (&raw const flukevm_pvh_start, &raw const flukevm_pvh_end);
    // SAFETY: both symbols bound one run of bytes in a read-only section, in this order.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// Writes the trampoline into the memory of a machine whose CPU 0 starts `at`.
///
/// It has page tables of its own, the kernel's with the trampoline's page at its physical address beside: the
/// kernel leaves them when it loads those of the first space.
///
/// # Errors
/// If the memory is too small.
pub fn write(memory: &Memory, at: &Entrance) -> Result<(), Error> {
    let tables = TRAMPOLINE + PAGE_SIZE;
    let mut frames = Frames::new(&[(tables, TRAMPOLINE + TRAMPOLINE_PAGES * PAGE_SIZE)]);
    let mut tables = PageTables::new(memory, &mut frames)?;
    for va in [DIRECT_MAP, KERNEL_STACKS, KERNEL_IMAGE] {
        tables.share(at.page_table, va)?;
    }
    tables.map(TRAMPOLINE, TRAMPOLINE, PAGE_SIZE, Entry::CODE)?;
    let gdt_base = (AT + offset_of!(Parameters, gdt) as u64) as u32;
    let parameters = Parameters {
        // Marked as accessed, since the CPU cannot write here.
        gdt: [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff],
        gdt_limit: size_of::<[u64; 3]>() as u16 - 1,
        gdt_base: [gdt_base as u16, (gdt_base >> 16) as u16],
        unused: 0,
        page_table: tables.root() as u32,
        memory_end: (memory.size() + HEADROOM) as u32,
        stack: at.stack,
        boot_info: at.rsi,
        entry: at.rip,
    };
    memory.write(TRAMPOLINE, code())?;
    memory.put(AT, &parameters)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_and_parameters_fit_in_one_page() {
        assert!(code().len() as u64 <= PARAMETERS);
        assert!(PARAMETERS + size_of::<Parameters>() as u64 <= PAGE_SIZE);
    }
}
