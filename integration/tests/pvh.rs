//! The image that `flukevm image` writes, booted by another VMM: QEMU, under KVM.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

const QEMU: &str = "qemu-system-x86_64";

/// What QEMU ends with when the guest ends with `status`.
const fn debug_exit(status: i32) -> i32 {
    status << 1 | 1
}

fn flukevm(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flukevm-under-test"));
    command.args(args).env_remove("FLUKEVM_LOG");
    command
}

/// Writes an image; the directory that it is in, as `image`.
fn image(args: &[&str]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let mut command = flukevm(&["image", "--out", path.to_str().unwrap()]);
    let output = command.args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{said}");
    directory
}

/// Boots an image; the status that QEMU ends with, what came on the console, and on the event port.
fn boot(image: &Path, memory: &str) -> (Option<i32>, String, Vec<u8>) {
    let events = image.with_extension("events");
    let mut command = Command::new("timeout");
    command
        .args([
            "--signal=KILL",
            "60",
            QEMU,
            "-nodefaults",
            "-no-user-config",
        ])
        .args(["-display", "none", "-no-reboot", "-m", memory])
        .args(["-M", "microvm,x-option-roms=off,pit=off,pic=off,rtc=off"])
        // A KVM without hardware virtualization lacks the MSR that comes with this feature.
        .args([
            "-bios",
            "qboot.rom",
            "-accel",
            "kvm",
            "-cpu",
            "host,arch-capabilities=off",
        ])
        .args([
            "-serial",
            "stdio",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=4",
        ])
        .args([
            "-device",
            "isa-debugcon,iobase=0xf8,chardev=events",
            "-chardev",
        ])
        .arg(format!("file,id=events,path={}", events.display()))
        .arg("-kernel")
        .arg(image);
    let output = command.output().unwrap();
    let status = output.status.code();
    // As timeout(1) says.
    assert_ne!(
        status,
        Some(127),
        "there is no {QEMU}; this test needs it: install it, as by `apt-get install qemu-system-x86`"
    );
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert_eq!(complaints, "", "QEMU complains");
    let console = String::from_utf8(output.stdout).unwrap();
    (status, console, std::fs::read(events).unwrap())
}

/// The number of the kernel event that the first program is about to start.
const FIRST_USER: u8 = fluke_abi::port::Event::FirstUser as u8;

#[test]
fn qemu_boots_what_run_would_run() {
    for configuration in [
        ["--model=interrupt", "--preempt=none"],
        ["--model=process", "--preempt=full"],
    ] {
        let program = [
            concat!("--file=a=", env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"),
            "hello",
            "21",
        ];
        let args = [&configuration[..], &program].concat();
        let directory = image(&args);
        let (status, console, events) = boot(&directory.path().join("image"), "80M");
        let run = flukevm(&["run"]).args(&args).output().unwrap();
        assert_eq!(console, String::from_utf8(run.stdout).unwrap());
        assert!(
            console.starts_with("arg 0: hello\narg 1: 21\nfile a: "),
            "{console}"
        );
        assert_eq!(run.status.code(), Some(21));
        assert_eq!(status, Some(debug_exit(21)));
        assert_eq!(events, [FIRST_USER]);
    }
}

#[test]
fn a_machine_that_is_too_small_is_told_so() {
    let directory = image(&["--mem", "64M", "hello"]);
    let (status, console, events) = boot(&directory.path().join("image"), "64M");
    assert_eq!(
        console,
        "flukevm: this machine has too little memory; give it at least 2 MiB more than --mem of \
         flukevm image\n"
    );
    assert_eq!(status, Some(debug_exit(1)));
    assert_eq!(events, []);
}

#[test]
fn impossible_images_are_refused_in_one_line() {
    let refused = |args: &[&str], line: &str| {
        let output = flukevm(args).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(said, format!("error: {line}\n"));
        assert_eq!(output.status.code(), Some(2));
    };
    refused(
        &["image", "--vcpus", "2", "--out", "/dev/null", "hello"],
        "an image starts one CPU, not 2; leave --vcpus out",
    );
    refused(
        &["image", "--mem", "8M", "--out", "/dev/null", "hello"],
        "8 MiB of memory is too little; give --mem 16 MiB or more",
    );
    refused(
        &["image", "hello"],
        "the following required arguments were not provided: --out <FILE>; try '--help'",
    );
    refused(
        &["image", "--out", "/nonexistent/image", "hello"],
        "cannot write `/nonexistent/image`: No such file or directory (os error 2); give the path of a \
         file in a directory that you may write to",
    );
}
