//! The file on the host that a checkpoint is written to.

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use fluke_abi::ipc::{Buffer, Params, WORD_SIZE};
use fluke_abi::store::{Answer, COMMIT, READ, TRANSFER_MAX, WRITE};
use libfluke::object::Ref;
use libfluke::sys;

/// Why the file cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The machine has none.
    NoFile,
    /// The host failed.
    Failed,
    /// The program or the kernel has no memory left.
    NoMemory,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoFile => "there is no file to write to; run flukevm with --checkpoint-to",
            Self::Failed => "the host could not write it",
            Self::NoMemory => "out of memory",
        })
    }
}

/// The file.
pub struct Store {
    port: &'static Ref,
}

impl Store {
    /// The file behind a port.
    pub const fn new(port: &'static Ref) -> Self {
        Self { port }
    }

    /// Writes bytes at an offset.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        for (number, piece) in (0..).zip(bytes.chunks(TRANSFER_MAX as usize)) {
            let mut words = vec![0u64; piece.len().div_ceil(WORD_SIZE as usize)];
            for (word, bytes) in words.iter_mut().zip(piece.chunks(WORD_SIZE as usize)) {
                let mut padded = [0; WORD_SIZE as usize];
                padded[..bytes.len()].copy_from_slice(bytes);
                *word = u64::from_le_bytes(padded);
            }
            let request = [WRITE, offset + number * TRANSFER_MAX, piece.len() as u64];
            self.call(&request, &words, &mut [])?;
        }
        Ok(())
    }

    /// What was written becomes the host's file, with this size in bytes.
    pub fn commit(&self, size: u64) -> Result<(), Error> {
        self.call(&[COMMIT, 0, size], &[], &mut []).map(|_| ())
    }

    /// Reads so many bytes from the start, or what there is of them.
    pub fn read(&self, size: u64) -> Result<Vec<u8>, Error> {
        let mut file = Vec::new();
        let mut words = vec![0u64; (TRANSFER_MAX / WORD_SIZE) as usize];
        while (file.len() as u64) < size {
            let offset = file.len() as u64;
            let most = (size - offset).min(TRANSFER_MAX);
            let read = self.call(&[READ, offset, most], &[], &mut words)?;
            if read == 0 {
                break;
            }
            let bytes = words.iter().flat_map(|word| word.to_le_bytes());
            file.extend(bytes.take(read.min(most) as usize));
        }
        Ok(file)
    }

    /// Makes a request of two buffers, and takes the answer in two. Returns the second word of the answer.
    fn call(&self, request: &[u64; 3], data: &[u64], into: &mut [u64]) -> Result<u64, Error> {
        let mut answer = [u64::MAX, 0];
        let send = [Buffer {
            address: data.as_ptr() as u64,
            words: data.len() as u64,
        }];
        let receive = [Buffer {
            address: into.as_mut_ptr() as u64,
            words: into.len() as u64,
        }];
        let mut params = Params {
            send: Buffer {
                address: request.as_ptr() as u64,
                words: request.len() as u64,
            },
            send_table: send.as_ptr(),
            send_buffers: 1,
            recv: Buffer {
                address: answer.as_mut_ptr() as u64,
                words: answer.len() as u64,
            },
            recv_table: receive.as_ptr(),
            recv_buffers: 1,
            ..Params::default()
        };
        // SAFETY: buffers and tables are borrowed for the call.
        let called = unsafe { sys::ipc_call(self.port.handle(), &raw mut params) };
        sys::check(called).map_err(|_| Error::NoFile)?;
        match Answer::from_number(answer[0]) {
            Answer::Done => Ok(answer[1]),
            Answer::NoFile => Err(Error::NoFile),
            Answer::Failed | Answer::BadRequest => Err(Error::Failed),
        }
    }
}
