//! Never ends, and never enters the kernel.

/// The program.
pub fn main() -> u64 {
    libfluke::println!("spinning");
    loop {
        core::hint::spin_loop();
    }
}
