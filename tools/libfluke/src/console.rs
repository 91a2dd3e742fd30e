//! Text on the machine's console.
//!
//! The console's driver serves the port behind [`Startup::console`](crate::startup::Startup::console).
//! Text goes there in one-way messages. Such a call ends at the instant at which the driver has the
//! message, whole; so a thread that is stopped, or made again from its state, has either sent it or is
//! about to. And it uses no connection: the printing thread may be in one.

use core::fmt::{self, Write};

use fluke_abi::driver::Driver;
use fluke_abi::ipc::{Buffer, Params, WORD_SIZE};

use crate::object::Ref;
use crate::{rpc, startup, sys};

/// Bytes that go out in one message, so that lines of several threads do not mix.
const LINE_BYTES: usize = 256;

/// A message to the driver.
#[repr(C)]
struct Line {
    size: u64,
    text: [u8; LINE_BYTES],
}

impl Line {
    const fn new() -> Self {
        Self {
            size: 0,
            text: [0; LINE_BYTES],
        }
    }

    fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let used = self.size as usize;
            if used == LINE_BYTES {
                self.flush();
                continue;
            }
            let (now, later) = bytes.split_at(bytes.len().min(LINE_BYTES - used));
            self.text[used..used + now.len()].copy_from_slice(now);
            self.size += now.len() as u64;
            bytes = later;
        }
    }

    fn flush(&mut self) {
        if self.size == 0 {
            return;
        }
        let mut params = Params {
            send: Buffer {
                address: core::ptr::from_ref(self) as u64,
                words: 1 + self.size.div_ceil(WORD_SIZE),
            },
            ..Params::default()
        };
        // Without a console there is nobody to tell.
        // SAFETY: the kernel only reads the line, which is borrowed for the call.
        unsafe { sys::ipc_send(console().handle(), &raw mut params) };
        self.size = 0;
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text.as_bytes());
        Ok(())
    }
}

/// Link to the console's port.
fn console() -> &'static Ref {
    startup::try_startup().map_or_else(of_root, |startup| &startup.console)
}

/// The same where the root program has it from the start.
pub fn of_root() -> &'static Ref {
    // SAFETY: only the root program comes here, which has the object before its first instruction.
    unsafe { &*(Driver::Console.reference() as *const Ref) }
}

/// Waits until all that the calling thread has printed is out.
pub fn flush() {
    let _ = rpc::call(console(), &[0], &mut []);
}

/// Prints bytes as they are.
pub fn write(bytes: &[u8]) {
    let mut line = Line::new();
    line.push(bytes);
    line.flush();
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
    let mut line = Line::new();
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
