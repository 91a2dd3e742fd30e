//! What the command does with bad input: one line that says what to do, and the right status.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fluke_abi::layout;
use tempfile::TempDir;

/// The host cannot do it.
const FAILURE: i32 = 1;
/// The user should not have asked for it.
const MISUSE: i32 = 2;
/// It ran out of `--timeout`.
const TIMEOUT: i32 = 124;
/// A thread raised an exception that nobody handles.
const EXCEPTION: i32 = 126;

/// How the command ended.
struct Ended {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flukevm-under-test"));
    command
        .args(args)
        .env_remove("FLUKEVM_LOG")
        .env_remove("FLUKEVM_KVM")
        .env_remove("RUST_BACKTRACE");
    command
}

fn ended(mut command: Command) -> Ended {
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let ended = Ended {
        status: output.status.code(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    };
    // No sign of a panic of ours.
    for text in ["panicked", "RUST_BACKTRACE", "thread '"] {
        assert!(!ended.stderr.contains(text), "{}", ended.stderr);
    }
    ended
}

/// The command is refused with this status and this one line.
#[track_caller]
fn refused(command: Command, status: i32, line: &str) {
    let ended = ended(command);
    assert_eq!(ended.stderr, format!("error: {line}\n"));
    assert_eq!(ended.status, Some(status));
    assert_eq!(ended.stdout, "");
}

/// The arguments do not parse.
#[track_caller]
fn misparsed(args: &[&str], line: &str) {
    refused(command(args), 2, &format!("{line}; try '--help'"));
}

/// A program in a temporary directory.
struct Program {
    _directory: TempDir,
    path: PathBuf,
}

impl Program {
    fn new(data: &[u8]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("prog");
        fs::write(&path, data).unwrap();
        Self {
            _directory: directory,
            path,
        }
    }

    fn command(&self) -> Command {
        command(&["run", "--timeout", "60s", self.path.to_str().unwrap()])
    }
}

/// A file is no program, for this reason.
#[track_caller]
fn no_program(data: &[u8], why: &str) {
    let line = format!("`prog`: {why}; build it against libfluke (see tools/programs)");
    refused(Program::new(data).command(), MISUSE, &line);
}

/// Where code starts in [`elf`], from the start of the file and of the segment.
const CODE: usize = 0x100;

/// A minimal program with one segment.
fn elf(code: &[u8]) -> Vec<u8> {
    let base = layout::PROGRAM_BASE;
    let size = (CODE + code.len()) as u64;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2u16, 62].map(u16::to_le_bytes).concat()); // ET_EXEC, x86-64
    elf.extend(1u32.to_le_bytes());
    let entry = base + CODE as u64;
    elf.extend([entry, 64, 0].map(u64::to_le_bytes).concat());
    elf.extend(0u32.to_le_bytes());
    elf.extend([64u16, 56, 1, 64, 0, 0].map(u16::to_le_bytes).concat());
    elf.extend([1u32, 5].map(u32::to_le_bytes).concat()); // PT_LOAD, R+X
    let header = [0, base, base, size, size, 0x1000];
    elf.extend(header.map(u64::to_le_bytes).concat());
    elf.resize(CODE, 0);
    elf.extend(code);
    elf
}

/// The same with other bytes at `offset`.
fn with(mut elf: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    elf[offset..offset + bytes.len()].copy_from_slice(bytes);
    elf
}

const UD2: &[u8] = b"\x0f\x0b";

#[test]
fn files_that_are_no_programs() {
    no_program(b"", "not an ELF file");
    no_program(&[0xa5; 4096], "not an ELF file");
    no_program(b"#!/bin/sh\n", "not an ELF file");
    no_program(
        &with(elf(UD2), 4, &[1]),
        "a 32-bit ELF file, not 64-bit x86-64",
    );
    no_program(
        &with(elf(UD2), 18, &[183]),
        "an ELF file for another machine (number 183), not x86-64",
    );
    let writable = format!(
        "the segment at {:#x} is both writable and executable",
        layout::PROGRAM_BASE
    );
    no_program(&with(elf(UD2), 68, &[7]), &writable);
}

#[test]
fn files_that_are_cut_short() {
    let elf = elf(UD2);
    no_program(&elf[..5], "an ELF file cut short in its header");
    no_program(&elf[..40], "an ELF file cut short in its header");
    no_program(
        &elf[..100],
        "an ELF file cut short before its program headers",
    );
    let segment = format!(
        "an ELF file cut short in the segment at {:#x}",
        layout::PROGRAM_BASE
    );
    no_program(&elf[..CODE + 1], &segment);
}

#[test]
fn a_program_of_the_host() {
    // This test itself.
    let path = std::env::current_exe().unwrap();
    let ended = ended(command(&["run", path.to_str().unwrap()]));
    let text = "a dynamically linked program of the host's, not a static guest program; build it \
                against libfluke (see tools/programs)\n";
    assert!(ended.stderr.ends_with(text), "{}", ended.stderr);
    assert_eq!(ended.stderr.lines().count(), 1);
    assert_eq!(ended.status, Some(MISUSE));
}

#[test]
fn an_entry_point_that_is_not_mapped() {
    let entry = layout::PROGRAM_BASE + (1 << 20);
    no_program(
        &with(elf(UD2), 24, &entry.to_le_bytes()),
        &format!("the entry point {entry:#x} is not in an executable segment"),
    );
}

#[test]
fn a_fault_in_the_first_instruction() {
    let entry = layout::PROGRAM_BASE + CODE as u64;
    for (code, what) in [
        (
            UD2,
            format!("exception InvalidOpcode (0x0) at rip {entry:#x}"),
        ),
        // mov [0], al
        (
            b"\x88\x04\x25\0\0\0\0",
            format!("page fault writing 0x0 at rip {entry:#x}: no memory there"),
        ),
    ] {
        let ended = ended(Program::new(&elf(code)).command());
        assert_eq!(ended.stdout, format!("prog: {what}\n"));
        assert_eq!(ended.stderr, "");
        assert_eq!(ended.status, Some(EXCEPTION));
    }
}

#[test]
fn programs_that_do_not_exist() {
    let ended = ended(command(&["run", "nosuch"]));
    let start = "error: `nosuch`: no program of that name is built in, and there is no such file; \
                 built in: ";
    assert!(ended.stderr.starts_with(start), "{}", ended.stderr);
    for name in ["hello", "sha256tree", "tour"] {
        assert!(ended.stderr.contains(name), "{}", ended.stderr);
    }
    assert_eq!(ended.stderr.lines().count(), 1);
    assert_eq!(ended.status, Some(MISUSE));
    assert_eq!(ended.stdout, "");

    let missing = missing();
    refused(
        command(&["run", &missing]),
        MISUSE,
        &format!(
            "cannot read `{missing}`: No such file or directory (os error 2); give the path of a \
             readable file"
        ),
    );
}

/// A path where nothing is.
fn missing() -> String {
    let directory = tempfile::tempdir().unwrap();
    let path: &Path = &directory.path().join("missing");
    path.to_str().unwrap().into()
}

#[test]
fn no_kvm() {
    let mut none = command(&["run", "hello"]);
    none.env("FLUKEVM_KVM", "/nonexistent");
    refused(
        none,
        FAILURE,
        "/nonexistent: there is no such device; enable virtualization in the firmware, load \
         kvm_intel or kvm_amd, or pass the device into the container",
    );
    let mut other = command(&["run", "hello"]);
    other.env("FLUKEVM_KVM", "/dev/null");
    refused(
        other,
        FAILURE,
        "/dev/null: this is not a KVM device; give the path of one in FLUKEVM_KVM",
    );
}

#[test]
fn numbers_of_vcpus() {
    refused(
        command(&["run", "--vcpus", "0", "hello"]),
        MISUSE,
        "a machine needs a vCPU; give --vcpus 1 or more",
    );
    // The limit is the host's.
    let ended = ended(command(&["run", "--vcpus", "5000", "hello"]));
    let start = "error: 5000 vCPUs are more than KVM on this host can have; give --vcpus ";
    assert!(ended.stderr.starts_with(start), "{}", ended.stderr);
    assert!(ended.stderr.ends_with(" or fewer\n"), "{}", ended.stderr);
    assert_eq!(ended.stderr.lines().count(), 1);
    assert_eq!(ended.status, Some(MISUSE));
    misparsed(
        &["run", "--vcpus", "many", "hello"],
        "invalid value 'many' for '--vcpus <N>': invalid digit found in string",
    );
}

#[test]
fn sizes_of_memory() {
    for (size, line) in [
        (
            "1K",
            "1 KiB of memory is too little; give --mem 16 MiB or more",
        ),
        (
            "100G",
            "100 GiB of memory is too much; give --mem 3 GiB or less",
        ),
        (
            "20000001",
            "20000001 bytes of memory is no whole number of pages; give a multiple of 4 KiB",
        ),
    ] {
        refused(command(&["run", "--mem", size, "hello"]), MISUSE, line);
    }
    misparsed(
        &["run", "--mem", "12X"],
        "invalid value '12X' for '--mem <SIZE>': `X` is not a unit; write a size such as 64M or 1G",
    );
}

#[test]
fn the_least_memory_is_enough() {
    let ended = ended(command(&["run", "--mem", "16M", "hello", "5"]));
    assert_eq!(ended.stdout, "arg 0: hello\narg 1: 5\n");
    assert_eq!(ended.stderr, "");
    assert_eq!(ended.status, Some(5));
}

#[test]
fn files_for_the_guest() {
    let missing = missing();
    refused(
        command(&["run", "--file", &format!("data={missing}"), "hello"]),
        MISUSE,
        &format!(
            "cannot read `{missing}`: No such file or directory (os error 2); give the path of a \
             readable file"
        ),
    );
    for text in ["data", "=./data", "data="] {
        misparsed(
            &["run", "--file", text, "hello"],
            &format!(
                "invalid value '{text}' for '--file <NAME=PATH>': `{text}` is not NAME=PATH; \
                 write for example data=./file.bin"
            ),
        );
    }
}

#[test]
fn kernels_that_cannot_be() {
    refused(
        command(&["run", "--preempt", "full", "--model", "interrupt", "hello"]),
        MISUSE,
        "--preempt full cannot go with --model interrupt: full preemption needs kernel code that \
         can sleep holding a lock, and an interrupt-model kernel keeps no stack to sleep on; use \
         --model process",
    );
    misparsed(
        &["run", "--model", "continuation"],
        "invalid value 'continuation' for '--model <MODEL>' [possible values: process, interrupt]",
    );
}

#[test]
fn a_guest_that_loops() {
    for model in ["process", "interrupt"] {
        let ended = ended(command(&[
            "run",
            "--model",
            model,
            "--timeout",
            "2s",
            "spin",
        ]));
        assert_eq!(ended.stdout, "spinning\n");
        assert_eq!(
            ended.stderr,
            "flukevm: timeout: the guest ran for more than 2s\n"
        );
        assert_eq!(ended.status, Some(TIMEOUT));
    }
}

#[test]
fn a_guest_with_a_wild_pointer() {
    for model in ["process", "interrupt"] {
        let ended = ended(command(&[
            "run",
            "--model",
            model,
            "--timeout",
            "60s",
            "badptr",
        ]));
        let start = "badptr: page fault writing 0x10 at rip 0x";
        assert!(ended.stdout.starts_with(start), "{}", ended.stdout);
        assert_eq!(ended.stdout.lines().count(), 1);
        assert_eq!(ended.stderr, "");
        assert_eq!(ended.status, Some(EXCEPTION));
    }
}

#[test]
fn checkpoints_that_are_none() {
    let missing = missing();
    refused(
        command(&["run", "--restore-from", &missing]),
        MISUSE,
        &format!(
            "cannot read `{missing}`: No such file or directory (os error 2); give the path of a \
             readable file"
        ),
    );
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let path = path.to_str().unwrap();
    for (contents, why) in [
        (&b""[..], "not a checkpoint"),
        (b"\x7fELF", "not a checkpoint"),
        (b"FLUKECKP", "a checkpoint cut short: 8 of 4096 bytes"),
    ] {
        fs::write(path, contents).unwrap();
        refused(
            command(&["run", "--restore-from", path]),
            MISUSE,
            &format!("`{path}`: {why}; give a file that `flukevm run --checkpoint-to` has written"),
        );
    }
    refused(
        command(&["run", "--checkpoint-to", "/nonexistent/file", "hello"]),
        MISUSE,
        "cannot write `/nonexistent/file`: No such file or directory (os error 2); give the path of a \
         file in a directory that you may write to",
    );
    misparsed(
        &["run", "--restore-from", path, "hello"],
        "the argument '--restore-from <FILE>' cannot be used with '[PROGRAM [ARGS]]...'",
    );
}

#[test]
fn a_program_that_is_written_to_a_file_and_brought_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let path = path.to_str().unwrap();
    // It ends before it is to be written.
    let early = ended(command(&["run", "--checkpoint-to", path, "hello", "3"]));
    assert_eq!(early.stdout, "arg 0: hello\narg 1: 3\n");
    assert!(
        early.stderr.contains("no checkpoint was written to"),
        "{}",
        early.stderr
    );
    assert_eq!(early.status, Some(3));

    // It never ends: what is written is there all the same.
    let spinning = ended(command(&[
        "run",
        "--timeout",
        "20s",
        "--checkpoint-to",
        path,
        "--checkpoint-after",
        "100ms",
        "spin",
    ]));
    assert!(
        spinning.stdout.starts_with("spinning\ncheckpoint: "),
        "{}",
        spinning.stdout
    );
    assert_eq!(spinning.status, Some(TIMEOUT));
    let restored = ended(command(&["run", "--timeout", "3s", "--restore-from", path]));
    assert!(
        restored.stdout.starts_with("checkpoint: "),
        "{}",
        restored.stdout
    );
    assert_eq!(restored.status, Some(TIMEOUT));

    let mut damaged = fs::read(path).unwrap();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    fs::write(path, damaged).unwrap();
    refused(
        command(&["run", "--restore-from", path]),
        MISUSE,
        &format!(
            "`{path}`: a damaged checkpoint: its checksum is wrong; give a file that `flukevm run \
             --checkpoint-to` has written"
        ),
    );
}

/// Somebody interrupts the kernel wherever it waits for an interrupt, or is about to.
#[test]
fn a_machine_that_idles_is_counted_to_the_end() {
    let mut command = command(&["run", "--count", "--timeout", "2m"]);
    command.args([
        "--model",
        "process",
        "--preempt",
        "full",
        "flukeperf",
        "count",
        "only=extract-",
    ]);
    let ended = ended(command);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
}

/// Runs a program with its profile in a file of that name; what is there, and the JSON result.
fn profiled(file: &str, args: &[&str]) -> (String, serde_json::Value) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(file);
    let mut command = command(&["run", "--json", "--profile"]);
    command.arg(&path).args(args);
    let ended = ended(command);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    let result = serde_json::from_str(&ended.stdout).unwrap();
    (fs::read_to_string(path).unwrap(), result)
}

#[test]
fn a_profile_is_of_all_instructions_and_names_functions() {
    for model in ["process", "interrupt"] {
        let (folded, result) = profiled("p.folded", &["--model", model, "costs", "mutex"]);
        let stacks: Vec<_> = folded
            .lines()
            .map(|l| l.rsplit_once(' ').unwrap())
            .collect();
        let counted = |stacks: &mut dyn Iterator<Item = &(&str, &str)>| {
            let counts = stacks.map(|(_, count)| count.parse::<u64>().unwrap());
            counts.sum::<u64>()
        };
        let rows = result["counts"].as_array().unwrap();
        let total = |row: &serde_json::Value| row["total"].as_u64().unwrap();
        assert_eq!(
            counted(&mut stacks.iter()),
            rows.iter().map(total).sum::<u64>()
        );
        // What is called and what is inlined; a visit is what its entry point says.
        let lock = rows
            .iter()
            .find(|row| row["entry"] == "mutex_lock")
            .unwrap();
        let locks = || stacks.iter().filter(|(s, _)| s.starts_with("mutex_lock;"));
        assert_eq!(counted(&mut locks()), total(lock));
        for function in [";boundary::trap;", ";entry::mutex::mutex_lock"] {
            assert!(locks().any(|(s, _)| s.contains(function)), "{folded}");
        }
    }
}

#[test]
fn a_profile_is_a_flame_graph() {
    let (graph, _) = profiled("p.svg", &["costs", "null"]);
    assert!(graph.contains("<svg") && graph.contains("thread_self"));
    let mut nowhere = command(&["run", "--profile", "/no/such/p.svg", "hello"]);
    nowhere.env("FLUKEVM_LOG", "error");
    refused(
        nowhere,
        MISUSE,
        "cannot write `/no/such/p.svg`: No such file or directory (os error 2)",
    );
}
