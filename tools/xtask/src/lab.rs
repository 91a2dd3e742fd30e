//! The lab: a flukevm command on a hardware-like `/dev/kvm`, from one command line to the
//! command's own output and exit status.

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::initramfs::Base;
use crate::qemu::{Event, Machine, Qemu};
use crate::{command, debian};

/// Exit status when the time is up, as of timeout(1).
pub const STATUS_TIMEOUT: u8 = 124;

/// Exit status when the lab itself fails, as of timeout(1).
pub const STATUS_BROKEN: u8 = 125;

/// Options of `cargo xtask lab`.
#[derive(Args)]
#[command(after_help = "\
stdout, stderr and the exit status are the command's own. The exit status is 124 when the time is \
up and 125 when the lab itself fails. Host files that arguments name (PATH or NAME=PATH) are \
carried into the lab. Commands divided by a ';' run one after the other, until one fails. QEMU and a kernel are fetched with apt when they are missing.")]
pub struct Options {
    /// CPUs of the machine [default: 2, with --icount 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Memory of the machine
    #[arg(long, value_name = "SIZE", default_value = "2G")]
    memory: String,
    /// Let guest time count instructions (slower, and for one CPU only)
    #[arg(long)]
    icount: bool,
    /// Time after which the machine is killed: seconds, or 90s, 5m
    #[arg(long, value_name = "DURATION", default_value = "300", value_parser = duration)]
    timeout: Duration,
    /// Keep the initramfs, QEMU's command line and the kernel's messages, and say where
    #[arg(long)]
    keep: bool,
    /// Bring this file out of the lab, which the command writes there
    #[arg(long, value_name = "PATH")]
    fetch: Option<PathBuf>,
    /// Run this program in the place of flukevm
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// The command: flukevm and its arguments; or several, divided by ';'
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Options {
    /// To run commands with another program in flukevm's place, for so long, and to bring out a file.
    pub fn of(
        binary: PathBuf,
        command: Vec<String>,
        fetch: Option<PathBuf>,
        timeout: Duration,
    ) -> Self {
        Self {
            cpus: None,
            memory: "2G".into(),
            icount: false,
            timeout,
            keep: false,
            fetch,
            binary: Some(binary),
            command,
        }
    }

    /// Number of CPUs. QEMU 7.2 hands the instruction count from one CPU to the next so rarely
    /// that Linux never gets to start a second one.
    fn cpus(&self) -> Result<u32> {
        match self.cpus {
            Some(cpus) if self.icount && cpus > 1 => {
                bail!("--icount works with one CPU only, not with --cpus {cpus}")
            }
            Some(cpus) => Ok(cpus),
            None if self.icount => Ok(1),
            None => Ok(2),
        }
    }
}

/// Runs the command; returns its exit status.
pub fn run(options: &Options) -> Result<u8> {
    for command in command::commands(&options.command) {
        let name = command.first().context("no command")?;
        ensure!(
            name == "flukevm",
            "the lab runs flukevm commands (cargo xtask lab -- flukevm run), not {name:?}"
        );
    }
    let cpus = options.cpus()?;
    let target = target_directory()?;
    let binary = match &options.binary {
        Some(path) => path.clone(),
        None => build(&target)?,
    };
    debian::ensure_qemu()?;
    let base = Base::get(&target.join("lab"))?;
    let mut directory = tempfile::Builder::new().prefix("flukevm-lab-").tempdir()?;
    directory.disable_cleanup(options.keep);
    let initramfs = directory.path().join("initramfs.cpio");
    let own = command::archive(&binary, &options.command, options.fetch.as_deref())?;
    let mut whole = File::create(&initramfs)?;
    io::copy(&mut File::open(&base.initramfs)?, &mut whole)?;
    io::copy(&mut own.as_slice(), &mut whole)?;
    let machine = Machine {
        kernel: &base.kernel,
        initramfs: &initramfs,
        cpus,
        memory: &options.memory,
        icount: options.icount,
    };
    let mut qemu = Qemu::start(&machine, directory.path())?;
    let outcome = wait(&mut qemu, options.timeout, || {
        // QEMU holds all it needs: nothing is left behind even if the lab is killed.
        if !options.keep {
            let _ = fs::remove_dir_all(directory.path());
        }
    });
    if options.keep {
        fs::write(directory.path().join("messages"), qemu.last_words())?;
        eprintln!("lab: kept {}", directory.path().display());
    }
    if let Some(path) = &options.fetch {
        let file = qemu.file();
        ensure!(!file.is_empty(), "the command wrote no {}", path.display());
        fs::write(path, file).with_context(|| format!("cannot write {}", path.display()))?;
    }
    outcome
}

/// Waits for the end of the command, or of the time.
fn wait(qemu: &mut Qemu, timeout: Duration, ready: impl Fn()) -> Result<u8> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match qemu.events().recv_timeout(left) {
            Ok(Event::Ready) => ready(),
            Ok(Event::Exit(status)) => {
                qemu.finish();
                return Ok(status);
            }
            Ok(Event::Broken(reason)) => bail!("{reason}{}", tail(&qemu.last_words())),
            Err(RecvTimeoutError::Timeout) => {
                let timeout = humantime::format_duration(timeout);
                let tail = tail(&qemu.last_words());
                eprintln!("lab: killed, not finished after {timeout}{tail}");
                return Ok(STATUS_TIMEOUT);
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the machine stopped early{}", tail(&qemu.last_words()));
            }
        }
    }
}

/// The end of the messages, introduced, as the explanation of a failure.
fn tail(messages: &str) -> String {
    let lines: Vec<_> = messages.lines().collect();
    let last = &lines[lines.len().saturating_sub(20)..];
    if last.is_empty() {
        return String::new();
    }
    format!("; its last messages:\n{}", last.join("\n"))
}

/// Builds flukevm as a user would and returns the program. Silent unless it has never been built.
pub fn build(target: &Path) -> Result<PathBuf> {
    let binary = target.join("release/flukevm");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args([
            "build",
            "--release",
            "--package",
            "flukevm",
            "--bin",
            "flukevm",
        ])
        .arg("--manifest-path")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml"))
        .arg("--target-dir")
        .arg(target)
        .stdin(Stdio::null());
    if binary.exists() {
        command.arg("--quiet");
    } else {
        eprintln!("lab: building flukevm");
    }
    let status = command.status().context("cannot run cargo")?;
    ensure!(status.success(), "flukevm does not build");
    Ok(binary)
}

/// Cargo's target directory, which this program is in: `TARGET/debug/xtask`.
pub fn target_directory() -> Result<PathBuf> {
    let program = env::current_exe().context("cannot tell where this program is")?;
    let directory = program.parent().and_then(Path::parent);
    Ok(directory.context("not run by cargo")?.to_path_buf())
}

fn duration(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
        Err(_) => humantime::parse_duration(text).map_err(|error| error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_seconds_or_has_a_unit() {
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(duration("soon").is_err());
    }

    #[test]
    fn a_tail_is_the_last_lines() {
        let messages: String = (0..30).map(|line| format!("{line}\n")).collect();
        assert!(tail(&messages).starts_with("; its last messages:\n10\n11\n"));
        assert_eq!(tail(""), "");
    }
}
