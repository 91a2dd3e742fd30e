//! The store device: a file on the host that guests write as a whole (`fluke_abi::store`).
//!
//! The kernel's driver writes the physical address of a [`StoreBlock`] to the port. What is written goes to a new
//! file beside the one that is meant, which takes its place when the guest commits it: so whatever happens in
//! between, the old file or the new one is there, whole.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use fluke_abi::port::{self, StoreBlock};
use fluke_abi::store::{Answer, COMMIT, READ, TRANSFER_MAX, WRITE};
use tempfile::NamedTempFile;

use crate::bus::{Access, Bus, Overlap, PioDevice, Signal};
use crate::error::Error;
use crate::memory::Memory;

/// Largest file that a guest may write, bytes.
const SIZE_MAX: u64 = 16 << 30;

/// The device.
pub struct Store {
    path: PathBuf,
    memory: Memory,
    contents: Contents,
    /// How often the guest has committed the file.
    commits: u64,
}

/// What reading sees.
enum Contents {
    /// What was written since the last commit.
    Written(NamedTempFile),
    /// What was committed last.
    Committed(File),
}

impl Store {
    /// A device for the file `path`.
    ///
    /// # Errors
    /// If no file can be made beside it.
    pub fn new(path: &Path, memory: &Memory) -> Result<Self, Error> {
        if path.is_dir() {
            return Err(unwritable(path)(io::ErrorKind::IsADirectory.into()));
        }
        Ok(Self {
            path: path.into(),
            memory: memory.clone(),
            contents: Contents::Written(beside(path).map_err(unwritable(path))?),
            commits: 0,
        })
    }

    /// Puts it on the bus.
    ///
    /// # Errors
    /// If there is no place for it.
    pub fn plug(self, bus: &mut Bus) -> Result<Arc<Mutex<Self>>, Overlap> {
        let store = Arc::new(Mutex::new(self));
        bus.insert(port::STORE, 4, store.clone())?;
        Ok(store)
    }

    /// How often the guest has committed the file.
    pub fn commits(&self) -> u64 {
        self.commits
    }

    fn read(&self, block: &StoreBlock) -> io::Result<u64> {
        let mut data = self.buffer(block)?;
        let file = match &self.contents {
            Contents::Written(file) => file.as_file(),
            Contents::Committed(file) => file,
        };
        let mut read = 0;
        while read < data.len() {
            match file.read_at(&mut data[read..], block.offset + read as u64)? {
                0 => break,
                more => read += more,
            }
        }
        let copied = self.memory.write(block.address, &data[..read]);
        copied.map_err(io::Error::other)?;
        Ok(read as u64)
    }

    fn write(&mut self, block: &StoreBlock) -> io::Result<u64> {
        let mut data = self.buffer(block)?;
        self.memory
            .read(block.address, &mut data)
            .map_err(io::Error::other)?;
        if let Contents::Committed(_) = self.contents {
            self.contents = Contents::Written(beside(&self.path)?);
        }
        if let Contents::Written(file) = &self.contents {
            file.as_file().write_all_at(&data, block.offset)?;
        }
        Ok(0)
    }

    fn commit(&mut self, size: u64) -> io::Result<u64> {
        let written = match &self.contents {
            Contents::Written(file) if size <= SIZE_MAX => file,
            // An answer that the guest has lost; the file is there.
            Contents::Committed(file) if file.metadata()?.len() == size => return Ok(0),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        };
        written.as_file().set_len(size)?;
        written.as_file().sync_all()?;
        let file = written.as_file().try_clone()?;
        let committed = Contents::Committed(file);
        if let Contents::Written(file) = std::mem::replace(&mut self.contents, committed) {
            file.persist(&self.path)?;
        }
        File::open(directory(&self.path))?.sync_all()?;
        self.commits += 1;
        Ok(0)
    }

    /// Room for a transfer that is no larger than the driver makes them.
    fn buffer(&self, block: &StoreBlock) -> io::Result<Vec<u8>> {
        let end = block.offset.checked_add(block.size);
        let fits = block.size <= TRANSFER_MAX && end.is_some_and(|end| end <= SIZE_MAX);
        match fits {
            true => Ok(vec![0; block.size as usize]),
            false => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl PioDevice for Store {
    fn write(&mut self, access: Access, data: &[u8]) -> Option<Signal> {
        let mut address = [0; 4];
        let size = data.len().min(4);
        address[..size].copy_from_slice(&data[..size]);
        let at = u64::from(u32::from_le_bytes(address));
        let Ok(mut block) = self.memory.get::<StoreBlock>(at) else {
            tracing::warn!(
                vcpu = access.vcpu,
                "a store request outside of memory, at {at:#x}"
            );
            return None;
        };
        let done = match block.request {
            READ => Self::read(self, &block),
            WRITE => Self::write(self, &block),
            COMMIT => self.commit(block.size),
            _ => Err(io::ErrorKind::Unsupported.into()),
        };
        block.answer = match done {
            Ok(done) => {
                block.done = done;
                Answer::Done
            }
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Answer::BadRequest,
            Err(error) => {
                tracing::error!("writing `{}`: {error}", self.path.display());
                Answer::Failed
            }
        } as u64;
        if let Err(error) = self.memory.put(at, &block) {
            tracing::warn!("{error}");
        }
        None
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn beside(path: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new()
        .prefix(".flukevm-")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(directory(path))
}

fn unwritable(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.display().to_string();
    move |error| {
        let error = error.to_string();
        // Of the file that was to be made beside it, only what went wrong.
        let error = error.split(" at path ").next().unwrap_or_default();
        Error::Config(format!(
            "cannot write `{path}`: {error}; give the path of a file in a directory that you may write to"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 0x1000;
    const DATA: u64 = 0x2000;

    struct Machine {
        bus: Bus,
        memory: Memory,
        store: Arc<Mutex<Store>>,
    }

    impl Machine {
        fn new(path: &Path) -> Self {
            let memory = Memory::new(0x10000).unwrap();
            let mut bus = Bus::default();
            let store = Store::new(path, &memory).unwrap().plug(&mut bus).unwrap();
            Self { bus, memory, store }
        }

        /// Makes a request; its answer and what was done.
        fn request(&self, request: u64, offset: u64, size: u64) -> (u64, u64) {
            let block = StoreBlock {
                request,
                offset,
                size,
                address: DATA,
                answer: u64::MAX,
                done: 0,
            };
            self.memory.put(BLOCK, &block).unwrap();
            let address = (BLOCK as u32).to_le_bytes();
            assert_eq!(self.bus.write(0, port::STORE, 4, &address), Ok(None));
            let block: StoreBlock = self.memory.get(BLOCK).unwrap();
            (block.answer, block.done)
        }
    }

    #[test]
    fn a_file_is_the_old_one_until_the_new_one_is_committed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "old").unwrap();
        let machine = Machine::new(&path);
        let done = Answer::Done as u64;
        machine.memory.write(DATA, b"new contents").unwrap();
        assert_eq!(machine.request(WRITE, 0, 12), (done, 0));
        assert_eq!(
            machine.request(READ, 4, 100),
            (done, 8),
            "written is seen at once"
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        for _ in 0..2 {
            assert_eq!(machine.request(COMMIT, 0, 8), (done, 0), "once or again");
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"new cont");
        assert_eq!(machine.store.lock().unwrap().commits(), 1);
        // The next one does not touch it.
        assert_eq!(machine.request(WRITE, 0, 4), (done, 0));
        assert_eq!(std::fs::read(&path).unwrap(), b"new cont");
        drop(machine);
        assert_eq!(
            std::fs::read_dir(&directory).unwrap().count(),
            1,
            "no other file is left"
        );
    }

    #[test]
    fn requests_that_cannot_be_are_answered_so() {
        let directory = tempfile::tempdir().unwrap();
        let machine = Machine::new(&directory.path().join("file"));
        let failed = Answer::Failed as u64;
        assert_eq!(machine.request(99, 0, 0), (Answer::BadRequest as u64, 0));
        assert_eq!(machine.request(WRITE, 0, TRANSFER_MAX + 1), (failed, 0));
        assert_eq!(machine.request(WRITE, u64::MAX, 8), (failed, 0));
        assert_eq!(machine.request(COMMIT, 0, u64::MAX), (failed, 0));
        let address = u32::MAX.to_le_bytes();
        assert_eq!(machine.bus.write(0, port::STORE, 4, &address), Ok(None));
    }

    #[test]
    fn a_place_that_cannot_be_written_is_refused() {
        let memory = Memory::new(0x1000).unwrap();
        for path in ["/nonexistent/file", "/"] {
            let error = Store::new(Path::new(path), &memory)
                .err()
                .unwrap()
                .to_string();
            assert!(
                error.starts_with(&format!("cannot write `{path}`: ")),
                "{error}"
            );
        }
    }
}
