/* The first instructions of a C program: main(startup block), then the parent is told. */
    .globl _start
    .type _start, @function
    .section .text._start, "ax"
_start:
    xor %ebp, %ebp          /* the end of the chain of frames */
    and $-16, %rsp
    mov %rdi, %rbx          /* the startup block; see startup.h */
    call main
    mov %rbx, %rdi
    mov %eax, %esi
    call fluke_program_exit
    ud2

    .section .note.GNU-stack, "", @progbits
