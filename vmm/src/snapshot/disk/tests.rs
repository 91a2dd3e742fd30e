use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::bus::Bus;
use crate::config::ConsoleSink;
use crate::devices::Devices;
use crate::kvm::Processor;
use crate::vm::Kind;

/// A snapshot of a machine without vCPUs, with a few pages in use.
fn snapshot(mark: u64) -> Snapshot {
    let memory = Memory::new(MEMORY_MIN).unwrap();
    memory.put(0x1000, &mark).unwrap();
    memory.put(MEMORY_MIN - 8, &mark).unwrap();
    let devices = Devices::new(&mut Bus::default(), ConsoleSink::buffer()).unwrap();
    let kind = Kind {
        configuration: Some(Configuration::ALL[0]),
        needs_syscall: true,
        processor: Processor::default(),
        tsc_khz: 1_000_000,
        stats: Some((0x1000, 0x1000)),
    };
    Snapshot {
        machine: Arc::new(MachineState {
            kind,
            chips: Vec::new(),
            clock: Default::default(),
            devices: devices.save(),
        }),
        vcpus: Arc::default(),
        memory,
        image: None,
    }
}

fn saved() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    save(&snapshot(7), directory.path()).unwrap();
    directory
}

fn marks(directory: &Path) -> [u64; 2] {
    let loaded = load(directory).unwrap();
    [0x1000, MEMORY_MIN - 8].map(|at| loaded.memory.get(at).unwrap())
}

/// It is refused with one line, which says this.
#[track_caller]
fn refused(directory: &Path, why: &str) {
    let error = load(directory).expect_err("it must be refused");
    let text = error.to_string();
    assert!(text.contains(why) && !text.contains('\n'), "{text}");
    assert_eq!(error.status(), 2, "{text}");
}

#[test]
fn what_is_saved_is_loaded() {
    let directory = saved();
    assert_eq!(marks(directory.path()), [7, 7]);
    let loaded = load(directory.path()).unwrap();
    assert_eq!(loaded.configuration(), Some(Configuration::ALL[0]));
    assert!(loaded.machine.kind.needs_syscall);
}

#[test]
fn zero_pages_take_no_room() {
    use std::os::unix::fs::MetadataExt;
    let directory = saved();
    let file = fs::metadata(directory.path().join("memory.1")).unwrap();
    assert_eq!(file.len(), MEMORY_MIN);
    assert!(file.blocks() * 512 < 1 << 20, "{} blocks", file.blocks());
}

#[test]
fn a_save_replaces_the_one_before_and_what_killed_ones_left() {
    let directory = saved();
    for name in ["memory.17", "manifest.json.17"] {
        fs::write(directory.path().join(name), "half").unwrap();
    }
    save(&snapshot(8), directory.path()).unwrap();
    assert_eq!(marks(directory.path()), [8, 8]);
    let mut names = names(directory.path()).unwrap();
    names.sort();
    assert_eq!(names, ["manifest.json", "memory.18", "state.18"]);
}

#[test]
fn every_cut_and_every_bit_flip_is_refused() {
    let directory = saved();
    for name in ["manifest.json", "state.1"] {
        let path = directory.path().join(name);
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            refused(directory.path(), "");
        }
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &flipped).unwrap();
            refused(directory.path(), "");
        }
        fs::write(&path, [&whole[..], b"\n"].concat()).unwrap();
        refused(directory.path(), "");
        fs::write(&path, &whole).unwrap();
    }
    assert_eq!(marks(directory.path()), [7, 7]);
}

#[test]
fn damaged_memory_is_refused() {
    let directory = saved();
    let path = directory.path().join("memory.1");
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    // In a page in use, in a hole, and at the end.
    for (at, old) in [(0x1000, 7), (0x1fff, 0), (0x5003, 0), (MEMORY_MIN - 1, 0)] {
        file.write_all_at(&[old ^ 0x10], at).unwrap();
        refused(directory.path(), "memory.1 is damaged");
        file.write_all_at(&[old], at).unwrap();
        assert_eq!(marks(directory.path()), [7, 7]);
    }
    for length in [0, 1, 0x1000, MEMORY_MIN - 1, MEMORY_MIN + 1] {
        file.set_len(length).unwrap();
        refused(
            directory.path(),
            &format!("memory.1 has {length} bytes, not {MEMORY_MIN}"),
        );
    }
}

#[test]
fn missing_files_are_named() {
    for name in ["manifest.json", "state.1", "memory.1"] {
        let directory = saved();
        fs::remove_file(directory.path().join(name)).unwrap();
        refused(directory.path(), &format!("{name} is missing"));
    }
    refused(Path::new("/nowhere/at/all"), "it cannot be opened");
}

#[test]
fn other_versions_are_told() {
    let directory = saved();
    let path = directory.path().join("manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    let change = |from: &str, to: &str, why| {
        assert!(text.contains(from), "{text}");
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        refused(directory.path(), why);
    };
    change("\"format\": 1", "\"format\": 2", "in format 2, and this is");
    let version = format!("\"flukevm\": \"{VERSION}\"");
    change(&version, "\"flukevm\": \"9.9\"", "flukevm 9.9 saved it");
    change(MAGIC, "something else", "not that of a snapshot");
    change("\"vcpus\": 0", "\"vcpus\": 1", "manifest.json is damaged");
}

#[test]
fn a_directory_with_other_files_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("thesis.tex"), "").unwrap();
    let error = save(&snapshot(1), directory.path()).unwrap_err();
    assert!(
        error.to_string().contains("it holds `thesis.tex`"),
        "{error}"
    );
    assert_eq!(error.status(), 2);
    assert_eq!(names(directory.path()).unwrap(), ["thesis.tex"]);
}

#[test]
fn a_file_is_no_directory() {
    let file = tempfile::NamedTempFile::new().unwrap();
    assert_eq!(save(&snapshot(1), file.path()).unwrap_err().status(), 1);
    refused(file.path(), "manifest.json cannot be read");
}
