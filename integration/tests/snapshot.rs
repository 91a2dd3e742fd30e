//! Machines saved by the command and gone on with, and saves that are killed.

use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use flukevm::config::{Configuration, VmConfig};
use flukevm::point::Point;
use flukevm::snapshot::disk;
use flukevm::vm::Vm;

/// A run that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(120);
/// Environment variable with the number of saves to kill, for more than the usual.
const KILLS_VARIABLE: &str = "FLUKEVM_TEST_KILLS";
const KILLS: u32 = 40;

/// How the command ended.
#[derive(Debug)]
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
        .env_remove("RUST_BACKTRACE");
    command
}

fn run(args: &[&str]) -> Ended {
    let output = command(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ended {
        status: output.status.code(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

/// A directory for a snapshot, and its path.
fn directory() -> (TempDir, String) {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("saved").to_str().unwrap().into();
    (parent, path)
}

/// Runs a program that is saved on the way, and goes on with what was saved, twice. Returns what
/// the run and the resumed runs printed.
fn saved_and_resumed(model: &str, vcpus: &str, program: &[&str]) -> (String, [String; 2]) {
    let (_parent, saved) = directory();
    let machine = [
        "run",
        "--timeout",
        "120s",
        "--model",
        model,
        "--vcpus",
        vcpus,
    ];
    let save = ["--snapshot-to", &saved, "--snapshot-after", "100ms"];
    let whole = run(&[&machine[..], &save, program].concat());
    assert_eq!(whole.stderr, "", "{model} {vcpus} {program:?}");
    assert_eq!(whole.status, Some(0), "{whole:?}");
    let rest = [(); 2].map(|()| {
        let rest = run(&["resume", "--timeout", "120s", &saved]);
        assert_eq!(rest.stderr, "", "{model} {vcpus} {program:?}");
        assert_eq!(rest.status, Some(0), "{rest:?}");
        rest.stdout
    });
    (whole.stdout, rest)
}

const MACHINES: [(&str, &str); 4] = [
    ("process", "1"),
    ("process", "4"),
    ("interrupt", "1"),
    ("interrupt", "4"),
];

#[test]
fn a_tour_goes_on() {
    for (model, vcpus) in MACHINES {
        let (whole, rests) = saved_and_resumed(model, vcpus, &["tour"]);
        for rest in rests {
            assert!(rest.ends_with(" checks, 0 failed\n"), "{rest}");
            assert!(!rest.contains("FAILED"), "{rest}");
            assert_eq!(rest.lines().last(), whole.lines().last());
            let lines = |text: &str| text.lines().count();
            assert!(lines(&rest) <= lines(&whole), "{rest}");
        }
    }
}

#[test]
fn hashes_are_right() {
    let data = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..8_000_077u32)
        .map(|n| (n.wrapping_mul(n) >> 7) as u8)
        .collect();
    fs::write(&data, &bytes).unwrap();
    let digest: String = Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let file = format!("f={}", data.path().display());
    for (model, vcpus) in MACHINES {
        let (whole, rests) = saved_and_resumed(model, vcpus, &["--file", &file, "sha256tree"]);
        assert!(whole.contains(&digest), "{whole}");
        for rest in rests {
            assert!(whole.ends_with(&rest), "{rest} is no end of {whole}");
            assert!(rest.contains(&digest), "{rest}");
        }
    }
}

#[test]
fn the_status_is_the_guests() {
    let (_parent, saved) = directory();
    let args = ["3", "a b"].map(String::from);
    let config = VmConfig::fluke(Configuration::ALL[0], "hello", &args).unwrap();
    let mut vm = Vm::new(config).unwrap();
    assert!(vm.run_to(0, Point::FirstUser, PATIENCE).unwrap());
    disk::save(&vm.snapshot().unwrap(), Path::new(&saved)).unwrap();
    let plain = run(&["resume", &saved]);
    assert_eq!(plain.status, Some(3), "{plain:?}");
    assert!(plain.stdout.contains("arg 2: a b\n"), "{plain:?}");
    let json = run(&["resume", "--json", &saved]);
    assert_eq!(json.status, Some(3), "{json:?}");
    let report: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(report["model"], "process");
    assert_eq!(report["status"], 3);
    assert!(json.stderr.contains("arg 2: a b\n"), "{json:?}");
}

/// A machine that spins and is saved on SIGUSR1.
struct Spinning(Child);

impl Spinning {
    fn start(saved: &str) -> Self {
        let args = [
            "run",
            "--mem",
            "16M",
            "--timeout",
            "120s",
            "--snapshot-to",
            saved,
            "spin",
        ];
        let mut child = command(&args)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert_eq!(line, "spinning\n");
        Self(child)
    }

    fn save(&self) {
        let pid = Pid::from_child(&self.0);
        kill_process(pid, Signal::USR1).unwrap();
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_signal_saves() {
    let (_parent, saved) = directory();
    let machine = Spinning::start(&saved);
    let start = Instant::now();
    while !Path::new(&saved).join("manifest.json").exists() {
        machine.save();
        sleep(Duration::from_millis(20));
        assert!(start.elapsed() < PATIENCE, "nothing is saved");
    }
    machine.kill();
    let rest = run(&["resume", "--timeout", "1s", &saved]);
    assert_eq!(rest.status, Some(124), "{rest:?}");
    assert_eq!(rest.stdout, "");
    assert_eq!(
        rest.stderr,
        "flukevm: timeout: the guest ran for more than 1s\n"
    );
}

#[test]
fn killed_saves_leave_whole_snapshots() {
    let kills = std::env::var(KILLS_VARIABLE).map_or(KILLS, |n| n.parse().unwrap());
    let (_parent, saved) = directory();
    let saved = Path::new(&saved);
    let (mut unfinished, mut manifests) = (0, 0);
    let mut last = Vec::new();
    for _ in 0..kills {
        let machine = Spinning::start(saved.to_str().unwrap());
        // Within the first saves, or between them.
        let delay = RandomState::new().build_hasher().finish() % 60_000;
        let end = Instant::now() + Duration::from_micros(delay);
        while Instant::now() < end {
            machine.save();
            sleep(Duration::from_millis(1).min(end.saturating_duration_since(Instant::now())));
        }
        machine.kill();
        // Before the first save is complete there is none.
        let Ok(manifest) = fs::read(saved.join("manifest.json")) else {
            assert_eq!(manifests, 0, "the snapshot has gone");
            continue;
        };
        disk::load(saved).unwrap();
        manifests += u32::from(manifest != last);
        last = manifest;
        unfinished += u32::from(fs::read_dir(saved).unwrap().count() > 3);
    }
    println!("{kills} kills: {manifests} left a new snapshot, {unfinished} unfinished files");
    assert!(manifests > 1 && unfinished > 0, "{manifests} {unfinished}");
    let rest = run(&["resume", "--timeout", "1s", saved.to_str().unwrap()]);
    assert_eq!(rest.status, Some(124), "{rest:?}");
}

/// The command is refused as misuse with this one line.
#[track_caller]
fn refused(args: &[&str], line: &str) {
    let ended = run(args);
    assert_eq!(ended.status, Some(2), "{ended:?}");
    assert_eq!(ended.stderr, format!("error: {line}\n"));
    assert_eq!(ended.stdout, "");
}

#[test]
fn what_cannot_be_resumed_is_told_in_a_line() {
    let (parent, saved) = directory();
    refused(
        &["resume", &saved],
        &format!("snapshot `{saved}`: it cannot be opened: No such file or directory (os error 2)"),
    );
    let empty = parent.path().to_str().unwrap();
    refused(
        &["resume", empty],
        &format!("snapshot `{empty}`: manifest.json is missing"),
    );
    fs::write(parent.path().join("notes"), "").unwrap();
    refused(
        &["run", "--snapshot-to", empty, "hello"],
        &format!(
            "snapshot `{empty}`: it holds `notes`, which is no part of a snapshot; give another \
             directory"
        ),
    );
    let early = run(&[
        "run",
        "--snapshot-to",
        &saved,
        "--snapshot-after",
        "100s",
        "hello",
    ]);
    assert_eq!(early.status, Some(0), "{early:?}");
    assert!(
        early.stderr.contains("ended before it was to be saved"),
        "{early:?}"
    );
    let alone = run(&["run", "--snapshot-after", "1s", "hello"]);
    assert_eq!(alone.status, Some(2), "{alone:?}");
    assert!(alone.stderr.contains("--snapshot-to"), "{alone:?}");
}
