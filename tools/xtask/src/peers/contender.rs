//! Who is compared: command lines, and how to know what they did.

use std::path::{Path, PathBuf};

/// What the guest runs.
pub const PROGRAM: &str = "hello";
/// What that prints.
pub const OUTPUT: &str = "arg 0: hello\n";

/// QEMU's small firmware.
pub const FIRMWARE: &str = "qboot.rom";
/// Where it may be.
pub const FIRMWARE_PLACES: [&str; 3] = [
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/usr/local/share/qemu",
];

/// A program that boots the guest, or does nothing but start.
pub struct Contender {
    /// Name in the table.
    pub name: &'static str,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its exit status when all is well.
    pub status: i32,
    /// What it writes to stderr when the first program of the guest is about to run; none if it boots no guest.
    pub marker: Option<&'static [u8]>,
    /// Whether nothing can be compared without it.
    pub needed: bool,
}

/// The kernel's event on port 0xf8, as a byte of QEMU's debug console there.
const QEMU_MARKER: &[u8] = &[1];
/// The same event in flukevm's log.
const FLUKEVM_MARKER: &[u8] = b"first user-mode instruction";
/// Log filter for that line.
pub const FLUKEVM_LOG: &str = "flukevm::devices=debug";

impl Contender {
    /// `flukevm run`.
    pub fn run(flukevm: &Path) -> Self {
        Self {
            name: "flukevm run",
            program: flukevm.into(),
            args: words(&["run", PROGRAM]),
            status: 0,
            marker: Some(FLUKEVM_MARKER),
            needed: true,
        }
    }

    /// `flukevm resume` of a snapshot.
    pub fn resume(flukevm: &Path, snapshot: &Path) -> Self {
        Self {
            name: "flukevm resume",
            args: words(&["resume", &snapshot.to_string_lossy()]),
            ..Self::run(flukevm)
        }
    }

    /// QEMU's smallest machine, with as few devices as it can have.
    pub fn microvm(qemu: &Path, firmware: &Path, image: &Path, kvm: bool) -> Self {
        let (name, accel) = match kvm {
            true => ("QEMU microvm, KVM", KVM),
            false => ("QEMU microvm, TCG", TCG),
        };
        let machine = "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,acpi=off";
        let firmware = firmware.to_string_lossy();
        let own = ["-M", machine, "-bios", &firmware];
        Self::qemu(name, qemu, &[&own, accel].concat(), image, kvm)
    }

    /// The machine that QEMU has by default.
    pub fn pc(qemu: &Path, image: &Path) -> Self {
        Self::qemu(
            "QEMU pc, KVM",
            qemu,
            &[&["-M", "pc"], KVM].concat(),
            image,
            false,
        )
    }

    fn qemu(name: &'static str, qemu: &Path, own: &[&str], image: &Path, needed: bool) -> Self {
        let mut args = words(own);
        args.extend(words(&COMMON));
        args.push(image.to_string_lossy().into_owned());
        Self {
            name,
            program: qemu.into(),
            args,
            // That of `isa-debug-exit` for 0.
            status: 1,
            marker: Some(QEMU_MARKER),
            needed,
        }
    }

    /// A program that only says its version: what starting it takes.
    pub fn version(name: &'static str, program: &Path) -> Self {
        Self {
            name,
            program: program.into(),
            args: words(&["--version"]),
            status: 0,
            marker: None,
            needed: true,
        }
    }
}

/// A KVM without hardware virtualization lacks the MSR that comes with `arch-capabilities`.
const KVM: &[&str] = &["-accel", "kvm", "-cpu", "host,arch-capabilities=off"];
const TCG: &[&str] = &["-accel", "tcg", "-cpu", "max"];

/// What every QEMU is given; the image follows. Memory is 64 MiB, as in a machine of flukevm's, and what
/// firmware may use of it.
const COMMON: [&str; 18] = [
    "-m",
    "80M",
    "-nodefaults",
    "-no-user-config",
    "-display",
    "none",
    "-no-reboot",
    "-monitor",
    "none",
    "-serial",
    "stdio",
    "-device",
    "isa-debug-exit,iobase=0xf4,iosize=4",
    "-chardev",
    "file,id=events,path=/proc/self/fd/2",
    "-device",
    "isa-debugcon,iobase=0xf8,chardev=events",
    "-kernel",
];

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}
