//! The probe guests: a few instructions each, assembled into this binary and copied to
//! [`CODE`] in guest memory.
//!
//! A guest speaks to the host with `out`: [`MARK`] says "I came this far" (the value says how
//! far), [`FAULT`] names an exception it did not expect, and [`NOTHING`] means nothing.
//! User code has no `out`; its `int3` is turned into a [`MARK`].

use std::arch::global_asm;

/// Guest-physical address of the code.
pub const CODE: u64 = 0x1_0000;
/// Port of a guest that came to a place worth telling.
pub const MARK: u16 = 0xf5;
/// Port of a guest that took exception `eax`.
pub const FAULT: u16 = 0xf6;
/// Port that is only there to be written to.
pub const NOTHING: u16 = 0xf7;
/// Address of the number a guest reads: how often to loop, or where to write.
pub const INPUT: u64 = 0x2_0000;
/// Address of the words that two CPUs share.
const SHARED: u64 = 0x2_0010;
/// Where a guest's stack at CPL 3 begins.
const USER_STACK: u64 = 0x3_0000;
/// Vector of the timer.
pub const TIMER_VECTOR: u8 = 0x20;
/// Vector of the inter-processor interrupt.
pub const IPI_VECTOR: u8 = 0x21;
/// Bytes of one stub for an unexpected exception; the stub of vector `v` is at `CODE + v * 8`.
pub const STUB_BYTES: u64 = 8;
/// Instructions in one turn of [`Label::Cpl0Loop`] and [`Label::Cpl3Loop`].
pub const LOOP_INSTRUCTIONS: f64 = 10.0;
/// One-byte instructions that [`Label::Step`] begins with.
pub const STEP_INSTRUCTIONS: u64 = 16;

global_asm!(
    r#"
    .pushsection .rodata.flukevm_doctor, "a", @progbits
    .balign 16
    .globl flukevm_doctor_start
flukevm_doctor_start:
    // Unexpected exceptions. mov eax, vector is written as bytes: a name would be an address.
    .set flukevm_doctor_vector, 0
    .rept 32
    .balign {stub}
    .byte 0xb8
    .long flukevm_doctor_vector
    out {fault}, eax
    hlt
    .set flukevm_doctor_vector, flukevm_doctor_vector + 1
    .endr

    // To CPL 3 at \entry, with \flags.
    .macro flukevm_doctor_to_user entry, flags
    lea rax, [rip + \entry]
    push {user_ss}
    push {user_stack}
    push \flags
    push {user_cs}
    push rax
    iretq
    .endm

    .macro flukevm_doctor_apic_on
    mov ecx, 0x1b
    rdmsr
    or eax, 0xc00
    wrmsr
    mov ecx, 0x80f
    mov eax, 0x1ff
    xor edx, edx
    wrmsr
    .endm

    .macro flukevm_doctor_eoi
    mov ecx, 0x80b
    xor eax, eax
    xor edx, edx
    wrmsr
    .endm

    // Ten ordinary instructions, three of which touch memory.
    .macro flukevm_doctor_work
    mov rax, [{input} + 64]
    lea rdx, [rax + rbx]
    add rdx, 3
    mov rsi, rdx
    and rsi, 0xff
    mov [{input} + 72], rsi
    cmp rsi, [{input} + 80]
    mov rdi, rsi
    dec rbx
    .endm

    // Vector 3: user code tells something.
    .globl flukevm_doctor_user_mark
flukevm_doctor_user_mark:
    out {mark}, eax
    iretq

    // Vector 6 as a trap gate: done, go on behind the two bytes of ud2.
    .globl flukevm_doctor_ud2_gate
flukevm_doctor_ud2_gate:
    add qword ptr [rsp], 2
    iretq

    .globl flukevm_doctor_syscall_gate
flukevm_doctor_syscall_gate:
    sysretq

    // Does syscall come to CPL 0, and sysret back to CPL 3? Twice, then tell the CS we ended with.
    .globl flukevm_doctor_syscall
flukevm_doctor_syscall:
    flukevm_doctor_to_user 2f, 2
2:  syscall
    syscall
    mov eax, cs
    int3
    .globl flukevm_doctor_syscall_entry
flukevm_doctor_syscall_entry:
    mov eax, cs
    test al, 3
    jnz 3f
    mov rdx, cr0
    out {mark}, eax
    sysretq
3:  ud2

    .globl flukevm_doctor_sse
flukevm_doctor_sse:
    xorps xmm0, xmm0
    mov eax, 1
    movd xmm1, eax
    paddd xmm0, xmm1
    movd eax, xmm0
    out {mark}, eax

    .globl flukevm_doctor_cpl0_loop
flukevm_doctor_cpl0_loop:
    mov rbx, [{input}]
    mov eax, 1
    out {mark}, eax
3:  flukevm_doctor_work
    jnz 3b
    mov eax, 2
    out {mark}, eax
    jmp flukevm_doctor_cpl0_loop

    .globl flukevm_doctor_cpl3_loop
flukevm_doctor_cpl3_loop:
    flukevm_doctor_to_user 2f, 2
2:  mov rbx, [{input}]
    mov eax, 1
    int3
3:  flukevm_doctor_work
    jnz 3b
    mov eax, 2
    int3
    jmp 2b

    .globl flukevm_doctor_ud2_loop
flukevm_doctor_ud2_loop:
    flukevm_doctor_to_user 2f, 2
2:  mov rbx, [{input}]
    mov eax, 1
    int3
3:  ud2
    dec rbx
    jnz 3b
    mov eax, 2
    int3
    jmp 2b

    .globl flukevm_doctor_syscall_loop
flukevm_doctor_syscall_loop:
    flukevm_doctor_to_user 2f, 2
2:  mov rbx, [{input}]
    mov eax, 1
    int3
3:  syscall
    dec rbx
    jnz 3b
    mov eax, 2
    int3
    jmp 2b

    .globl flukevm_doctor_pio_loop
flukevm_doctor_pio_loop:
    mov rbx, [{input}]
    mov eax, 1
    out {mark}, eax
3:  out {nothing}, al
    dec rbx
    jnz 3b
    mov eax, 2
    out {mark}, eax
    jmp flukevm_doctor_pio_loop

    // Two ticks of the timer into hlt at CPL 0, then two into a loop at CPL 3.
    .globl flukevm_doctor_timer
flukevm_doctor_timer:
    flukevm_doctor_apic_on
    mov ecx, 0x83e
    mov eax, 0xb
    wrmsr
    mov ecx, 0x832
    mov eax, 0x20000 + {timer}
    wrmsr
    mov ecx, 0x838
    mov eax, 1000000
    wrmsr
    mov r15d, 2
2:  sti
    hlt
    cli
    test r15d, r15d
    jg 2b
    mov eax, 1
    out {mark}, eax
    mov r15d, 2
    flukevm_doctor_to_user 3f, 0x202
3:  test r15d, r15d
    jg 3b
    mov eax, 2
    int3
    .globl flukevm_doctor_tick
flukevm_doctor_tick:
    push rax
    push rcx
    push rdx
    dec r15d
    flukevm_doctor_eoi
    pop rdx
    pop rcx
    pop rax
    iretq

    // CPU 0 waits for CPU 1, interrupts it, and waits for the interrupt to be seen.
    .globl flukevm_doctor_ipi_send
flukevm_doctor_ipi_send:
    flukevm_doctor_apic_on
2:  pause
    cmp dword ptr [{shared}], 0
    je 2b
    mov ecx, 0x830
    mov eax, 0x4000 + {ipi}
    mov edx, 1
    wrmsr
3:  pause
    cmp dword ptr [{shared} + 4], 0
    je 3b
    mov eax, 1
    out {mark}, eax
    .globl flukevm_doctor_ipi_wait
flukevm_doctor_ipi_wait:
    flukevm_doctor_apic_on
    mov dword ptr [{shared}], 1
    sti
    hlt
    cli
    mov eax, [{shared} + 4]
    out {mark}, eax
    .globl flukevm_doctor_ipi_seen
flukevm_doctor_ipi_seen:
    push rax
    push rcx
    push rdx
    lock inc dword ptr [{shared} + 4]
    flukevm_doctor_eoi
    pop rdx
    pop rcx
    pop rax
    iretq

    .globl flukevm_doctor_step
flukevm_doctor_step:
    .rept {steps}
    nop
    .endr
    mov eax, 1
    out {mark}, eax

    // A place at CPL 0, mark 1; a place at CPL 3, mark 2. The mark between them makes sure that
    // even a host which emulates some user instructions runs the second place as it usually does.
    .globl flukevm_doctor_break
flukevm_doctor_break:
    nop
    .globl flukevm_doctor_break_cpl0
flukevm_doctor_break_cpl0:
    nop
    flukevm_doctor_to_user 2f, 2
2:  mov eax, 1
    int3
    nop
    .globl flukevm_doctor_break_cpl3
flukevm_doctor_break_cpl3:
    nop
    mov eax, 2
    int3

    // Write where the host says.
    .globl flukevm_doctor_write
flukevm_doctor_write:
    mov rbx, [{input}]
    mov dword ptr [rbx], 1
    mov eax, 1
    out {mark}, eax
    jmp flukevm_doctor_write

    // Read at CPL 3 where the host says.
    .globl flukevm_doctor_read
flukevm_doctor_read:
    flukevm_doctor_to_user 2f, 2
2:  mov rbx, [{input}]
    mov eax, [rbx]
    int3
    jmp 2b

    .purgem flukevm_doctor_to_user
    .purgem flukevm_doctor_apic_on
    .purgem flukevm_doctor_eoi
    .purgem flukevm_doctor_work
    .globl flukevm_doctor_end
flukevm_doctor_end:
    .popsection
    "#,
    stub = const STUB_BYTES,
    fault = const FAULT,
    mark = const MARK,
    nothing = const NOTHING,
    input = const INPUT,
    shared = const SHARED,
    user_stack = const USER_STACK,
    user_cs = const fluke_abi::boot::USER_CS,
    user_ss = const fluke_abi::boot::USER_SS,
    timer = const TIMER_VECTOR,
    ipi = const IPI_VECTOR,
    steps = const STEP_INSTRUCTIONS,
);

unsafe extern "C" {
    static flukevm_doctor_start: u8;
    static flukevm_doctor_end: u8;
}

/// All guests, as they lie at [`CODE`].
pub fn image() -> &'static [u8] {
    let start = &raw const flukevm_doctor_start;
    let bytes = (&raw const flukevm_doctor_end).addr() - start.addr();
    // SAFETY: the two symbols enclose one read-only section part of this binary, see above.
    unsafe { std::slice::from_raw_parts(start, bytes) }
}

macro_rules! labels {
    ($($(#[$doc:meta])* $name:ident = $symbol:ident,)*) => {
        /// A place in the image.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Label { $($(#[$doc])* $name,)* }

        unsafe extern "C" { $(static $symbol: u8;)* }

        impl Label {
            /// Its guest-physical (and virtual) address.
            pub fn address(self) -> u64 {
                let place = match self { $(Self::$name => (&raw const $symbol).addr(),)* };
                CODE + (place - (&raw const flukevm_doctor_start).addr()) as u64
            }
        }
    };
}

labels! {
    /// Handler of vector 3.
    UserMark = flukevm_doctor_user_mark,
    /// Handler of vector 6 where `ud2` is the trap.
    Ud2Gate = flukevm_doctor_ud2_gate,
    /// LSTAR of the fastest `syscall`.
    SyscallGate = flukevm_doctor_syscall_gate,
    /// LSTAR of a `syscall` that looks where it came to.
    SyscallEntry = flukevm_doctor_syscall_entry,
    /// Two checked `syscall`s: three marks, kernel CS, kernel CS, user CS.
    Syscall = flukevm_doctor_syscall,
    /// SSE arithmetic at CPL 0: mark 1.
    Sse = flukevm_doctor_sse,
    /// `INPUT` turns between mark 1 and mark 2, for ever.
    Cpl0Loop = flukevm_doctor_cpl0_loop,
    /// The same at CPL 3.
    Cpl3Loop = flukevm_doctor_cpl3_loop,
    /// `INPUT` times `ud2` from CPL 3.
    Ud2Loop = flukevm_doctor_ud2_loop,
    /// `INPUT` times `syscall` from CPL 3.
    SyscallLoop = flukevm_doctor_syscall_loop,
    /// `INPUT` times `out`.
    PioLoop = flukevm_doctor_pio_loop,
    /// Timer ticks at CPL 0 (mark 1) and CPL 3 (mark 2).
    Timer = flukevm_doctor_timer,
    /// Handler of [`TIMER_VECTOR`].
    Tick = flukevm_doctor_tick,
    /// CPU 0 of the IPI guest: mark 1.
    IpiSend = flukevm_doctor_ipi_send,
    /// CPU 1 of the IPI guest: mark 1.
    IpiWait = flukevm_doctor_ipi_wait,
    /// Handler of [`IPI_VECTOR`].
    IpiSeen = flukevm_doctor_ipi_seen,
    /// [`STEP_INSTRUCTIONS`] times `nop`, then mark 1; may be entered at either level.
    Step = flukevm_doctor_step,
    /// Passes the next label, mark 1, the label after that, mark 2.
    Break = flukevm_doctor_break,
    /// Executed at CPL 0.
    BreakCpl0 = flukevm_doctor_break_cpl0,
    /// Executed at CPL 3.
    BreakCpl3 = flukevm_doctor_break_cpl3,
    /// Writes to the address in `INPUT`, mark 1, for ever.
    Write = flukevm_doctor_write,
    /// Reads at CPL 3 from the address in `INPUT`, marks what it read, for ever.
    Read = flukevm_doctor_read,
}
