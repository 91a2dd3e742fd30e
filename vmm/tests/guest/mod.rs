//! Guests written by hand.

/// Assembles a guest: position-independent code, entered at CPL 0 with `edi` the vCPU's number.
macro_rules! guest {
    ($name:ident: $($line:literal)*) => {{
        mod code { core::arch::global_asm!(
            concat!(".pushsection .rodata.guest_", stringify!($name), ",\"a\",@progbits"),
            concat!(".globl guest_", stringify!($name), "_start"),
            concat!("guest_", stringify!($name), "_start:"),
            $($line,)*
            concat!(".globl guest_", stringify!($name), "_end"),
            concat!("guest_", stringify!($name), "_end:"),
            ".popsection",
        ); }
        unsafe extern "C" {
            #[link_name = concat!("guest_", stringify!($name), "_start")]
            static START: u8;
            #[link_name = concat!("guest_", stringify!($name), "_end")]
            static END: u8;
        }
        // SAFETY: the assembly above puts both symbols around one run of constant bytes.
        unsafe {
            let (start, end) = (&raw const START, &raw const END);
            std::slice::from_raw_parts(start, end.offset_from_unsigned(start)).to_vec()
        }
    }};
}
