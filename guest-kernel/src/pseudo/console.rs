//! The console's driver: prints what it is sent on a serial port.

use fluke_abi::port::CONSOLE;
use zerocopy::IntoBytes;

use super::{Server, supervisor};
use crate::arch::instructions::out_bytes;

/// Bytes printed at once.
const PIECE: usize = 256;

/// Prints one message after the other. An answer says that all so far is printed.
pub fn main(mut server: Server) -> ! {
    loop {
        let words = server.answer_and_wait(0);
        let [size, text @ ..] = &server.message()[..words] else {
            continue;
        };
        let text = text.as_bytes();
        let size = text.len().min(*size as usize);
        for piece in text[..size].chunks(PIECE) {
            supervisor(print, &piece);
        }
    }
}

/// In supervisor mode, which the port needs.
extern "C" fn print(piece: &&[u8]) -> u64 {
    out_bytes(CONSOLE, piece);
    0
}
