//! Text on the machine's console.

use core::fmt::{self, Write};

use crate::sys;

/// Bytes that go out in one call, so that lines of several threads do not mix.
const LINE_BYTES: usize = 256;

struct Line {
    bytes: [u8; LINE_BYTES],
    used: usize,
}

impl Line {
    fn flush(&mut self) {
        write(&self.bytes[..self.used]);
        self.used = 0;
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            if self.used == LINE_BYTES {
                self.flush();
            }
            let (now, later) = rest.split_at(rest.len().min(LINE_BYTES - self.used));
            self.bytes[self.used..self.used + now.len()].copy_from_slice(now);
            self.used += now.len();
            rest = later;
        }
        Ok(())
    }
}

/// Prints bytes as they are.
pub fn write(bytes: &[u8]) {
    if !bytes.is_empty() {
        // SAFETY: the kernel only reads the bytes.
        unsafe { sys::console_write(bytes.as_ptr(), bytes.len() as u64) };
    }
}

/// Prints formatted text; what [`print!`](crate::print) calls.
pub fn print(text: fmt::Arguments<'_>) {
    format(text, "");
}

/// Prints a line; what [`println!`](crate::println) calls.
pub fn print_line(text: fmt::Arguments<'_>) {
    format(text, "\n");
}

fn format(text: fmt::Arguments<'_>, end: &str) {
    let mut line = Line {
        bytes: [0; LINE_BYTES],
        used: 0,
    };
    // An error can only come from a `Display` of the caller's; what it wrote still goes out.
    let _ = line.write_fmt(text).and_then(|()| line.write_str(end));
    line.flush();
}

/// Prints to the console.
#[macro_export]
macro_rules! print {
    ($($text:tt)*) => { $crate::console::print(::core::format_args!($($text)*)) };
}

/// Prints a line to the console.
#[macro_export]
macro_rules! println {
    () => { $crate::console::write(b"\n") };
    ($($text:tt)*) => { $crate::console::print_line(::core::format_args!($($text)*)) };
}
