//! Moving a message: from buffers of one thread straight to buffers of another, in whatever pieces
//! the two buffer lists and the page boundaries make, with references beside the data.

use fluke_abi::code::Insanity;
use fluke_abi::ipc::{Buffer, CallWord, WORD_SIZE};
use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::state::Prot;

use crate::arch::cpu::Frame;
use crate::arch::memory::copy_words;
use crate::arena::Id;
use crate::call::Stop;
use crate::kernel::Kernel;
use crate::mm::access::{View, mapped};
use crate::mutant::{dawdle, mutant};
use crate::reference::Ref;
use crate::thread::Thread;

/// What is left of one direction of a thread's message parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Current buffer.
    pub address: u64,
    /// Words left in it.
    pub words: u64,
    /// Table of further buffers.
    pub table: u64,
    /// Buffers left in the table.
    pub buffers: u8,
    /// Table of addresses of references.
    pub ref_table: u64,
    /// References left.
    pub refs: u8,
}

impl Cursor {
    /// What is left to send.
    pub const fn sending(frame: &Frame) -> Self {
        let word = CallWord(frame.rax);
        Self {
            address: frame.rsi,
            words: frame.rdx,
            table: frame.r9,
            buffers: word.send_buffers(),
            ref_table: frame.r12,
            refs: word.send_refs(),
        }
    }

    /// What is left to fill.
    pub const fn receiving(frame: &Frame) -> Self {
        let word = CallWord(frame.rax);
        Self {
            address: frame.r10,
            words: frame.r8,
            table: frame.r13,
            buffers: word.recv_buffers(),
            ref_table: frame.r14,
            refs: word.recv_refs(),
        }
    }

    /// Stores progress in the send registers.
    pub const fn store_sending(&self, frame: &mut Frame) {
        (frame.rsi, frame.rdx, frame.r9, frame.r12) =
            (self.address, self.words, self.table, self.ref_table);
        frame.rax = CallWord(frame.rax)
            .with_send_buffers(self.buffers)
            .with_send_refs(self.refs)
            .0;
    }

    /// Stores progress in the receive registers.
    pub const fn store_receiving(&self, frame: &mut Frame) {
        (frame.r10, frame.r8, frame.r13, frame.r14) =
            (self.address, self.words, self.table, self.ref_table);
        frame.rax = CallWord(frame.rax)
            .with_recv_buffers(self.buffers)
            .with_recv_refs(self.refs)
            .0;
    }

    /// Whether no data are left.
    pub const fn no_data(&self) -> bool {
        self.words == 0 && self.buffers == 0
    }

    /// Whether nothing at all is left.
    pub const fn is_empty(&self) -> bool {
        self.no_data() && self.refs == 0
    }

    /// Nothing left: what a sender has when its data were thrown away.
    pub const fn drop_all(&mut self) {
        (self.words, self.buffers, self.refs) = (0, 0, 0);
    }

    pub(super) const fn advance(&mut self, words: u64) {
        self.address += words * WORD_SIZE;
        self.words -= words;
    }
}

/// Words to move at once: what both have, within a page of each.
pub fn piece(from: &Cursor, to: &Cursor) -> u64 {
    let words = from.words.min(to.words);
    words
        .min(page_rest(from.address))
        .min(page_rest(to.address))
}

/// Words from the one at `address` to the end of its page.
pub const fn page_rest(address: u64) -> u64 {
    const WORDS: u64 = PAGE_SIZE / WORD_SIZE;
    WORDS - address / WORD_SIZE % WORDS
}

/// The registers of a thread that has sent all of its current buffer.
pub const fn sent_all(frame: &mut Frame) {
    frame.rsi += frame.rdx * WORD_SIZE;
    frame.rdx = 0;
}

/// The registers of a thread that has received so many words.
pub const fn received(frame: &mut Frame, words: u64) {
    frame.r10 += words * WORD_SIZE;
    frame.r8 -= words;
}

/// Physical address of words in a page that a thread has mapped.
#[inline(always)]
fn words_mapped(view: View, address: u64, words: u64, access: Prot) -> Option<u64> {
    let fits = address.is_multiple_of(WORD_SIZE) && words <= page_rest(address);
    if fits {
        mapped(view, address, access)
    } else {
        None
    }
}

/// One of the two threads in a transfer.
pub struct Party {
    view: View,
    /// What is left of its message, or of its room.
    pub cursor: Cursor,
}

/// How a transfer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The sender has nothing left.
    Sent,
    /// The sender has data left, the receiver no space.
    DataFull,
    /// The sender has references left, the receiver no slots.
    RefsFull,
    /// As many words as were asked for have moved, and there is more.
    Enough,
}

/// Whose memory or parameters stopped a transfer.
pub struct Trouble {
    /// The thread.
    pub thread: Id<Thread>,
    /// What it has to deal with.
    pub stop: Stop,
}

impl Kernel {
    /// A thread as the one that sends.
    #[inline]
    pub fn sending(&self, id: Id<Thread>) -> Party {
        let thread = &self.threads[id];
        Party {
            view: self.view_of(thread),
            cursor: Cursor::sending(&thread.frame),
        }
    }

    /// A thread as the one that receives.
    #[inline]
    pub fn receiving(&self, id: Id<Thread>) -> Party {
        let thread = &self.threads[id];
        Party {
            view: self.view_of(thread),
            cursor: Cursor::receiving(&thread.frame),
        }
    }

    /// What most often a whole transfer is: copies a message from a thread, whose memory is `view`, to another, if it
    /// is one piece that both have mapped and for which there is room. Its words; the registers stay.
    #[inline(always)]
    pub fn copy_at_once(&self, from: &Thread, view: View, to: &Thread) -> Option<u64> {
        let (word, words) = (from.word(), from.frame.rdx);
        let whole = word.send_buffers() == 0 && word.send_refs() == 0 && words <= to.frame.r8;
        if !whole {
            return None;
        }
        if words > 0 {
            if mutant!(slow_transfer) {
                dawdle();
            }
            let source = words_mapped(view, from.frame.rsi, words, Prot::READ)?;
            let target = words_mapped(self.view_of(to), to.frame.r10, words, Prot::WRITE)?;
            copy_words(source, target, words);
        }
        Some(words)
    }

    /// Moves data and references until one side has no more, or `most` words have moved. The cursors
    /// always say what is left, also on trouble.
    pub fn transfer(
        &mut self,
        from: &mut Party,
        to: &mut Party,
        most: u64,
    ) -> Result<Outcome, Trouble> {
        let (source_view, target_view) = (from.view, to.view);
        let (from, to) = (&mut from.cursor, &mut to.cursor);
        let (sender, receiver) = (source_view.id, target_view.id);
        let by_sender = |stop| Trouble {
            thread: sender,
            stop,
        };
        let by_receiver = |stop| Trouble {
            thread: receiver,
            stop,
        };
        if mutant!(slow_transfer) {
            dawdle();
        }
        let mut left = most;
        loop {
            self.next_buffer(sender, from).map_err(by_sender)?;
            if from.words == 0 {
                break;
            }
            self.next_buffer(receiver, to).map_err(by_receiver)?;
            if to.words == 0 {
                return Ok(Outcome::DataFull);
            }
            if left == 0 {
                return Ok(Outcome::Enough);
            }
            let words = piece(from, to).min(left);
            let source = self.translate_in(source_view, from.address, Prot::READ);
            let source = source.map_err(by_sender)?;
            let target = self.translate_in(target_view, to.address, Prot::WRITE);
            let target = target.map_err(by_receiver)?;
            copy_words(source, target, words);
            from.advance(words);
            to.advance(words);
            if mutant!(pointer_not_advanced) {
                to.address -= words * WORD_SIZE;
            }
            left -= words;
        }
        while from.refs > 0 {
            if to.refs == 0 {
                return Ok(Outcome::RefsFull);
            }
            let source = self.reference_at(sender, from.ref_table);
            let source = source.map_err(by_sender)?;
            let target = self.reference_at(receiver, to.ref_table);
            let target = target.map_err(by_receiver)?;
            self.refs[target].link = self.refs[source].link;
            for cursor in [&mut *from, &mut *to] {
                if !mutant!(reference_again) {
                    cursor.ref_table += WORD_SIZE;
                }
                cursor.refs -= 1;
            }
        }
        Ok(Outcome::Sent)
    }

    /// If the current buffer is used up, takes the next one from the table.
    #[inline]
    fn next_buffer(&mut self, thread: Id<Thread>, cursor: &mut Cursor) -> Result<(), Stop> {
        if cursor.words == 0 && cursor.buffers > 0 {
            self.read_table(thread, cursor)?;
        }
        if cursor.words > 0 && !cursor.address.is_multiple_of(WORD_SIZE) {
            return Err(Insanity::BufferUnaligned.into());
        }
        Ok(())
    }

    #[inline(never)]
    fn read_table(&mut self, thread: Id<Thread>, cursor: &mut Cursor) -> Result<(), Stop> {
        while cursor.words == 0 && cursor.buffers > 0 {
            let mut entry = [0; size_of::<Buffer>()];
            self.copy_in(thread, cursor.table, &mut entry)?;
            let (address, words) = entry.split_at(WORD_SIZE as usize);
            cursor.address = word(address);
            cursor.words = word(words);
            if !mutant!(table_not_advanced) {
                cursor.table += size_of::<Buffer>() as u64;
            }
            cursor.buffers -= 1;
        }
        Ok(())
    }

    /// The reference object whose address a thread's reference table holds.
    fn reference_at(&mut self, thread: Id<Thread>, entry: u64) -> Result<Id<Ref>, Stop> {
        let mut handle = [0; WORD_SIZE as usize];
        self.copy_in(thread, entry, &mut handle)?;
        self.object(thread, word(&handle))
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |word, &byte| word << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = PAGE_SIZE;

    fn cursor(address: u64, words: u64) -> Cursor {
        Cursor {
            address,
            words,
            table: 0,
            buffers: 0,
            ref_table: 0,
            refs: 0,
        }
    }

    proptest! {
        /// A piece crosses no page on either side, is never empty, and pieces add up to the whole.
        #[test]
        fn pieces_cover_the_message(from in 0u64..2048, to in 0u64..2048, words in 1u64..5000) {
            let (mut from, mut to) = (cursor(from * 8, words), cursor(to * 8, 6000));
            let mut moved = 0;
            while from.words > 0 {
                let n = piece(&from, &to);
                prop_assert!(n > 0);
                for c in [&from, &to] {
                    prop_assert_eq!(c.address / PAGE, (c.address + n * 8 - 1) / PAGE);
                }
                from.advance(n);
                to.advance(n);
                moved += n;
            }
            prop_assert_eq!(moved, words);
        }

        /// Progress goes into the registers and comes out again, and leaves the entry number alone.
        #[test]
        fn registers_hold_the_cursor(address: u64, words: u64, buffers: u8, refs: u8, number: u16) {
            let cursor = Cursor { buffers, refs, ..cursor(address, words) };
            let mut frame = Frame { rax: u64::from(number), ..Frame::default() };
            cursor.store_sending(&mut frame);
            cursor.store_receiving(&mut frame);
            prop_assert_eq!(Cursor::sending(&frame), cursor);
            prop_assert_eq!(Cursor::receiving(&frame), cursor);
            prop_assert_eq!(CallWord(frame.rax).number(), number);
        }
    }

    #[test]
    fn the_papers_example() {
        // 8,192 bytes from 0x08001800; after 6,144 bytes, 2,048 are left at 0x08003000 (OSDI '99 4.3).
        let mut from = cursor(0x0800_1800, 8192 / 8);
        from.advance(6144 / 8);
        assert_eq!((from.address, from.words * 8), (0x0800_3000, 2048));
    }
}
