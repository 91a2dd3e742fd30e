//! Exceptions that a keeper is told of.

use core::fmt;

use fluke_abi::code::{Exception, Insanity};
use fluke_abi::ipc::{EXCEPTION_MAGIC, ExceptionMessage};
use fluke_abi::state::Prot;

/// The exception in a keeper's message, if it is one.
pub fn parse(words: &[u64]) -> Option<ExceptionMessage> {
    let words: &[u64; ExceptionMessage::WORDS] = words.first_chunk()?;
    let &[
        magic,
        code,
        subcode,
        access,
        region_offset,
        region_hash,
        thread_hash,
        rip,
    ] = words;
    (magic == EXCEPTION_MAGIC).then_some(ExceptionMessage {
        magic,
        code,
        subcode,
        access,
        region_offset,
        region_hash,
        thread_hash,
        rip,
    })
}

/// Shows an exception in words.
#[derive(Debug)]
pub struct Describe<'a>(pub &'a ExceptionMessage);

impl fmt::Display for Describe<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ExceptionMessage {
            code,
            subcode,
            access,
            rip,
            ..
        } = *self.0;
        match Exception::from_number(code) {
            Some(Exception::PageFault) => {
                let access = Prot::from_bits_truncate(access);
                let verb = if access.contains(Prot::WRITE) {
                    "writing"
                } else if access.contains(Prot::EXECUTE) {
                    "executing"
                } else if access.contains(Prot::READ) {
                    "reading"
                } else {
                    "accessing"
                };
                write!(
                    f,
                    "page fault {verb} {subcode:#x} at rip {rip:#x}: no memory there"
                )
            }
            Some(Exception::Insanity) => {
                let name = Insanity::from_number(subcode).map_or("unknown", Insanity::name);
                write!(
                    f,
                    "misuse of an entry point at rip {rip:#x}: insanity {name}"
                )
            }
            Some(Exception::NoMemory) => {
                write!(
                    f,
                    "the kernel has no memory for a page table, for {subcode:#x}"
                )
            }
            Some(code) => {
                write!(
                    f,
                    "exception {} ({subcode:#x}) at rip {rip:#x}",
                    code.name()
                )
            }
            None => write!(f, "exception {code} ({subcode:#x}) at rip {rip:#x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    #[test]
    fn a_write_to_nowhere_reads_as_one() {
        let message = ExceptionMessage {
            magic: EXCEPTION_MAGIC,
            code: Exception::PageFault as u64,
            subcode: 0x10,
            access: Prot::WRITE.bits(),
            rip: 0x1000_0040,
            ..ExceptionMessage::default()
        };
        let parsed = parse(&message.to_words()).unwrap();
        assert_eq!(parsed, message);
        assert_eq!(
            Describe(&parsed).to_string(),
            "page fault writing 0x10 at rip 0x10000040: no memory there"
        );
    }

    #[test]
    fn other_messages_are_not_exceptions() {
        assert_eq!(parse(&[EXCEPTION_MAGIC, 1]), None);
        assert_eq!(parse(&[0; 9]), None);
    }
}
