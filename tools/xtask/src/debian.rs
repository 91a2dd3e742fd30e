//! What the lab takes from Debian, by apt's own commands: QEMU, installed; a kernel and a static
//! busybox, downloaded and unpacked but not installed.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// The emulator's program name.
pub const QEMU: &str = "qemu-system-x86_64";

const QEMU_PACKAGE: &str = "qemu-system-x86";
const KERNEL_PACKAGE: &str = "linux-image-amd64";
const BUSYBOX_PACKAGE: &str = "busybox-static";

/// Installs QEMU unless it is there.
pub fn ensure_qemu() -> Result<()> {
    if on_path(QEMU) {
        return Ok(());
    }
    eprintln!("lab: installing {QEMU_PACKAGE}");
    let install = [
        "apt-get",
        "-o",
        "DPkg::Lock::Timeout=300",
        "install",
        "-y",
        "--no-install-recommends",
        QEMU_PACKAGE,
    ];
    update()
        .and_then(|()| as_root(&install))
        .with_context(|| format!("the lab needs {QEMU} on PATH (Debian package {QEMU_PACKAGE})"))?;
    ensure!(on_path(QEMU), "{QEMU_PACKAGE} came without {QEMU}");
    Ok(())
}

/// Path of QEMU.
pub fn qemu() -> Result<PathBuf> {
    found(QEMU).with_context(|| format!("there is no {QEMU} on PATH"))
}

/// Downloads a kernel image package and unpacks it below `work`; returns where it is.
pub fn fetch_kernel(work: &Path) -> Result<PathBuf> {
    eprintln!("lab: fetching Debian's kernel");
    let name = refreshing(kernel_package).context("cannot tell which kernel Debian has")?;
    fetch(&name, work)
}

/// Downloads the static busybox and unpacks it below `work`; returns the program.
pub fn fetch_busybox(work: &Path) -> Result<PathBuf> {
    eprintln!("lab: fetching {BUSYBOX_PACKAGE}");
    let root = fetch(BUSYBOX_PACKAGE, work)?;
    ["bin/busybox", "usr/bin/busybox"]
        .iter()
        .map(|path| root.join(path))
        .find(|path| path.is_file())
        .with_context(|| format!("{BUSYBOX_PACKAGE} holds no busybox"))
}

/// The real package behind the one that always names the newest kernel.
fn kernel_package() -> Result<String> {
    let output = run(Command::new("apt-cache").args(["depends", KERNEL_PACKAGE]))?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_string)
        .with_context(|| format!("{KERNEL_PACKAGE} depends on no kernel"))
}

fn fetch(package: &str, work: &Path) -> Result<PathBuf> {
    let download = work.join(format!("{package}.download"));
    let root = work.join(package);
    fs::create_dir_all(&download)?;
    refreshing(|| {
        run(Command::new("apt-get")
            .args(["download", package])
            .current_dir(&download))
    })
    .with_context(|| format!("cannot download Debian's package {package}"))?;
    let archive = fs::read_dir(&download)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get download {package} left no package"))?;
    run(Command::new("dpkg").arg("-x").arg(archive).arg(&root))?;
    Ok(root)
}

/// Tries `action`; if it fails, refreshes the package lists and tries again.
fn refreshing<T>(action: impl Fn() -> Result<T>) -> Result<T> {
    action().or_else(|first| {
        update().with_context(|| format!("{first:#}; then"))?;
        action()
    })
}

fn update() -> Result<()> {
    as_root(&["apt-get", "update"])
}

/// Runs a command as root: as it is, or by sudo if that asks no password.
fn as_root(command: &[&str]) -> Result<()> {
    let root = run(Command::new("id").arg("-u"))?.stdout == b"0\n";
    let sudo: &[&str] = if root { &[] } else { &["sudo", "-n"] };
    ensure!(
        root || on_path("sudo"),
        "`{}` must be run as root, and there is no sudo",
        command.join(" ")
    );
    let words = [sudo, command].concat();
    run(Command::new(words[0])
        .args(&words[1..])
        .env("DEBIAN_FRONTEND", "noninteractive"))?;
    Ok(())
}

/// Runs a command silently; if it fails, the error holds what it had to say.
fn run(command: &mut Command) -> Result<Output> {
    let name = format!(
        "{} {}",
        command.get_program().display(),
        command
            .get_args()
            .map(|arg| arg.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ")
    );
    let output = command
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .output()
        .with_context(|| format!("cannot run `{name}`"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{name}` failed: {}", said.trim());
    }
    Ok(output)
}

fn on_path(program: &str) -> bool {
    found(program).is_some()
}

fn found(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
}
