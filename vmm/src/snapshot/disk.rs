//! A snapshot on disk: a directory.
//!
//! | file | |
//! | --- | --- |
//! | `manifest.json` | what it is a snapshot of, and size and SHA-256 of the other files |
//! | `state.N` | the machine but for its memory, in postcard |
//! | `memory.N` | the memory; pages of zeros are holes, and only the others are in its SHA-256 |
//!
//! N is another number for each save into the directory. The manifest comes last, by a rename: so
//! whoever is killed in a save leaves the snapshot that was there, and files that nothing names,
//! which the next save removes. Saves and loads of one directory take turns.
//!
//! The SHA-256 of the manifest is its own last field, taken over the text with that field empty;
//! and a manifest that is not, byte for byte, what this module would write is refused too.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use fluke_abi::layout::PAGE_SIZE;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::memory::{ZERO, used_pages};
use super::vcpu::VcpuState;
use super::{MachineState, Snapshot};
use crate::config::{Configuration, MEMORY_MAX, MEMORY_MIN};
use crate::error::Error;
use crate::image;
use crate::memory::{self, Memory};

const MAGIC: &str = "flukevm snapshot";
/// Changes with everything that is written.
const FORMAT: u32 = 1;
const VERSION: &str = env!("CARGO_PKG_VERSION");

const MANIFEST: &str = "manifest.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";
/// No manifest or state is larger, bytes; what says that it is, is damaged.
const LARGEST: u64 = 64 << 20;

/// What can be said of a manifest of any format.
#[derive(Deserialize)]
struct Head {
    magic: String,
    format: u32,
    flukevm: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    magic: String,
    format: u32,
    /// Version of the flukevm that saved it.
    flukevm: String,
    /// Build id of the kernel image.
    kernel: Option<String>,
    configuration: Option<Configuration>,
    vcpus: u32,
    memory_bytes: u64,
    needs: Needs,
    state: Entry,
    memory: Entry,
    sha256: String,
}

/// What a host must have. The features of its CPU are compared with those in the state.
#[derive(Debug, Serialize, Deserialize)]
struct Needs {
    /// `syscall`, if programs trap by it; the other gate works everywhere.
    gate: Option<String>,
    tsc_khz: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    file: String,
    bytes: u64,
    sha256: String,
}

impl Manifest {
    /// Its text, with the checksum that it should have.
    fn seal(&mut self) -> Result<Vec<u8>, serde_json::Error> {
        self.sha256.clear();
        self.sha256 = hex(&Sha256::digest(serde_json::to_vec_pretty(self)?));
        serde_json::to_vec_pretty(self)
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let damaged = |_| format!("{MANIFEST} is damaged");
        let head: Head = serde_json::from_slice(text).map_err(damaged)?;
        if head.magic != MAGIC {
            return Err(format!("{MANIFEST} is not that of a snapshot"));
        }
        if head.format != FORMAT || head.flukevm != VERSION {
            return Err(format!(
                "flukevm {} saved it in format {}, and this is flukevm {VERSION}, which reads \
                 format {FORMAT}; resume it with the one that saved it",
                head.flukevm, head.format
            ));
        }
        let mut manifest: Self = serde_json::from_slice(text).map_err(damaged)?;
        if manifest.seal().map_err(damaged)? != text {
            return Err(format!("{MANIFEST} is damaged"));
        }
        let sizes = MEMORY_MIN..=MEMORY_MAX;
        match sizes.contains(&manifest.memory_bytes)
            && manifest.memory.bytes == manifest.memory_bytes
        {
            true => Ok(manifest),
            false => Err(format!("it has {} bytes of memory", manifest.memory_bytes)),
        }
    }
}

/// Sees that a snapshot can be saved in a directory, which is made if it is missing.
///
/// # Errors
/// If it cannot; the text says why.
pub fn prepare(directory: &Path) -> Result<(), Error> {
    open(directory).map(drop)
}

/// Saves a snapshot in a directory, in the place of the one that is there.
///
/// # Errors
/// If the host refuses; the one that was there stays.
pub fn save(snapshot: &Snapshot, directory: &Path) -> Result<(), Error> {
    let lock = open(directory)?;
    lock.lock().map_err(saving(directory))?;
    write(snapshot, directory, &lock).map_err(saving(directory))
}

/// Opens a directory to save in.
fn open(directory: &Path) -> Result<File, Error> {
    fs::create_dir_all(directory).map_err(saving(directory))?;
    let foreign = |name: &String| name != MANIFEST && number(name).is_none();
    let names = names(directory).map_err(saving(directory))?;
    if let Some(name) = names.iter().find(|name| foreign(name)) {
        return Err(Error::Snapshot {
            path: directory.into(),
            why: format!(
                "it holds `{name}`, which is no part of a snapshot; give another directory"
            ),
        });
    }
    File::open(directory).map_err(saving(directory))
}

fn saving(directory: &Path) -> impl Fn(io::Error) -> Error {
    move |source| Error::Saving {
        path: directory.into(),
        source,
    }
}

fn names(directory: &Path) -> io::Result<Vec<String>> {
    fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// The number of a file of a save; none if it is something else.
fn number(name: &str) -> Option<u64> {
    let (what, number) = name.rsplit_once('.')?;
    let digits = number.bytes().all(|b| b.is_ascii_digit());
    ([STATE, MEMORY, MANIFEST].contains(&what) && digits).then(|| number.parse().ok())?
}

fn write(snapshot: &Snapshot, directory: &Path, handle: &File) -> io::Result<()> {
    let machine = &snapshot.machine;
    let others = names(directory)?;
    let last = others.iter().filter_map(|name| number(name)).max();
    let id = last.unwrap_or(0).wrapping_add(1);
    let state = postcard::to_stdvec(&(&**machine, &*snapshot.vcpus)).map_err(io::Error::other)?;
    let state = write_state(directory, format!("{STATE}.{id}"), &state)?;
    let memory = write_memory(directory, format!("{MEMORY}.{id}"), &snapshot.memory)?;
    let mut manifest = Manifest {
        magic: MAGIC.into(),
        format: FORMAT,
        flukevm: VERSION.into(),
        kernel: snapshot.image.as_ref().and_then(|i| image::build_id(i)),
        configuration: snapshot.configuration(),
        vcpus: snapshot.vcpus(),
        memory_bytes: snapshot.memory_size(),
        needs: Needs {
            gate: machine.kind.needs_syscall.then(|| "syscall".into()),
            tsc_khz: machine.kind.tsc_khz,
        },
        state,
        memory,
        sha256: String::new(),
    };
    let text = manifest.seal()?;
    let name = format!("{MANIFEST}.{id}");
    write_state(directory, name.clone(), &text)?;
    handle.sync_all()?;
    fs::rename(directory.join(&name), directory.join(MANIFEST))?;
    handle.sync_all()?;
    for old in others.iter().filter(|name| number(name).is_some()) {
        // What stays is in nobody's way.
        let _ = fs::remove_file(directory.join(old));
    }
    Ok(())
}

fn write_state(directory: &Path, name: String, bytes: &[u8]) -> io::Result<Entry> {
    let file = File::create_new(directory.join(&name))?;
    file.write_all_at(bytes, 0)?;
    file.sync_all()?;
    Ok(Entry {
        file: name,
        bytes: bytes.len() as u64,
        sha256: hex(&Sha256::digest(bytes)),
    })
}

fn write_memory(directory: &Path, name: String, memory: &Memory) -> io::Result<Entry> {
    let file = File::create_new(directory.join(&name))?;
    file.set_len(memory.size())?;
    let mut digest = Sha256::new();
    for run in memory.extents().map_err(io::Error::other)? {
        for page in used_pages(memory, run) {
            let (at, bytes) = page.map_err(io::Error::other)?;
            file.write_all_at(&bytes, at)?;
            add_page(&mut digest, at, &bytes);
        }
    }
    file.sync_all()?;
    Ok(Entry {
        file: name,
        bytes: memory.size(),
        sha256: hex(&digest.finalize()),
    })
}

fn add_page(digest: &mut Sha256, at: u64, bytes: &[u8]) {
    digest.update(at.to_le_bytes());
    digest.update(bytes);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Loads the snapshot in a directory, having checked all of it. Whether this host can run it is
/// seen when it is made a machine.
///
/// # Errors
/// If there is none, or it is damaged or another flukevm's.
pub fn load(directory: &Path) -> Result<Snapshot, Error> {
    read(directory).map_err(|why| match why {
        Unreadable::Snapshot(why) => Error::Snapshot {
            path: directory.into(),
            why,
        },
        Unreadable::Host(error) => error,
    })
}

enum Unreadable {
    Snapshot(String),
    Host(Error),
}

impl From<String> for Unreadable {
    fn from(why: String) -> Self {
        Self::Snapshot(why)
    }
}

fn read(directory: &Path) -> Result<Snapshot, Unreadable> {
    let lock = File::open(directory).map_err(|e| format!("it cannot be opened: {e}"))?;
    // A file system without locks has no saves in progress.
    let _ = lock.lock_shared();
    let manifest = read_file(directory, MANIFEST, None)?;
    let manifest = Manifest::parse(&manifest)?;
    let state = read_file(directory, &manifest.state.file, Some(manifest.state.bytes))?;
    let damaged = |entry: &Entry| format!("{} is damaged", entry.file);
    if hex(&Sha256::digest(&state)) != manifest.state.sha256 {
        return Err(damaged(&manifest.state).into());
    }
    let (machine, vcpus): (MachineState, Vec<VcpuState>) =
        postcard::from_bytes(&state).map_err(|_| damaged(&manifest.state))?;
    if vcpus.len() != manifest.vcpus as usize {
        return Err(format!("it has {} vCPUs, not {}", vcpus.len(), manifest.vcpus).into());
    }
    let kernel = manifest.kernel.as_deref();
    Ok(Snapshot {
        machine: Arc::new(machine),
        vcpus: Arc::new(vcpus),
        memory: read_memory(directory, &manifest.memory)?,
        image: kernel
            .and_then(image::kernel_of_build)
            .map(|i| Arc::new(i.to_vec())),
    })
}

fn open_file(directory: &Path, name: &str) -> Result<(File, u64), String> {
    let open = || {
        let file = File::open(directory.join(name))?;
        let length = file.metadata()?.len();
        Ok((file, length))
    };
    open().map_err(|error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => format!("{name} is missing"),
        _ => format!("{name} cannot be read: {error}"),
    })
}

/// Reads a file that must have so many bytes.
fn read_file(directory: &Path, name: &str, bytes: Option<u64>) -> Result<Vec<u8>, String> {
    let (file, length) = open_file(directory, name)?;
    check_length(name, length, bytes.unwrap_or(length).min(LARGEST))?;
    let mut text = Vec::new();
    file.take(length)
        .read_to_end(&mut text)
        .map_err(|error| format!("{name} cannot be read: {error}"))?;
    Ok(text)
}

fn check_length(name: &str, length: u64, bytes: u64) -> Result<(), String> {
    match length == bytes {
        true => Ok(()),
        false => Err(format!("{name} has {length} bytes, not {bytes}")),
    }
}

fn read_memory(directory: &Path, entry: &Entry) -> Result<Memory, Unreadable> {
    let (file, length) = open_file(directory, &entry.file)?;
    check_length(&entry.file, length, entry.bytes)?;
    let memory = Memory::new(entry.bytes).map_err(Unreadable::Host)?;
    let unreadable = |error: io::Error| format!("{} cannot be read: {error}", entry.file);
    let mut digest = Sha256::new();
    let mut page = ZERO;
    for run in memory::extents(&file, length).map_err(unreadable)? {
        for at in run.step_by(PAGE_SIZE as usize) {
            file.read_exact_at(&mut page, at).map_err(unreadable)?;
            if page != ZERO {
                memory.write(at, &page).map_err(Unreadable::Host)?;
                add_page(&mut digest, at, &page);
            }
        }
    }
    match hex(&digest.finalize()) == entry.sha256 {
        true => Ok(memory),
        false => Err(format!("{} is damaged", entry.file).into()),
    }
}

#[cfg(test)]
mod tests;
