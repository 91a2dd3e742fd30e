//! The driver of the file on the host. The host reads and writes this driver's memory itself; all there is
//! to do in supervisor mode is to tell it where.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fluke_abi::driver::MESSAGE_WORDS;
use fluke_abi::port::{STORE, StoreBlock};
use fluke_abi::store::{Answer, READ, TRANSFER_MAX, WRITE};

use super::{Server, physical, supervisor};
use crate::arch::instructions::out32;

/// Words of a request before the bytes.
const REQUEST: usize = 3;
/// Words of an answer before the bytes.
const ANSWER: usize = 2;

const _: () = assert!(MESSAGE_WORDS >= REQUEST + TRANSFER_MAX as usize / 8);
const _: () = assert!(size_of::<Block>() == size_of::<StoreBlock>());

/// A [`StoreBlock`], in which the host writes too.
#[repr(C)]
struct Block {
    request: AtomicU64,
    offset: AtomicU64,
    size: AtomicU64,
    address: AtomicU64,
    answer: AtomicU64,
    done: AtomicU64,
}

/// Has one request after the other done.
pub fn main(mut server: Server) -> ! {
    let mut answer = 0;
    loop {
        let words = server.answer_and_wait(answer);
        answer = 1;
        let message = server.message();
        let [request, offset, size, ..] = *message;
        let room = match request {
            WRITE => (words.saturating_sub(REQUEST) * 8) as u64,
            READ => TRANSFER_MAX,
            _ => u64::MAX,
        };
        if words < REQUEST || size > room {
            message[0] = Answer::BadRequest as u64;
            continue;
        }
        let data = if request == READ { ANSWER } else { REQUEST };
        let block = Block {
            request: request.into(),
            offset: offset.into(),
            size: size.into(),
            address: physical(&message[data]).into(),
            answer: (Answer::NoFile as u64).into(),
            done: 0.into(),
        };
        supervisor(tell, &block);
        message[0] = block.answer.load(Relaxed);
        if request == READ {
            let read = block.done.load(Relaxed).min(size);
            message[1] = read;
            answer = ANSWER + read.div_ceil(8) as usize;
        }
    }
}

/// In supervisor mode, which the port needs.
extern "C" fn tell(block: &Block) -> u64 {
    out32(STORE, physical(block) as u32);
    0
}
